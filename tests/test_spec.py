"""Specs refuse wrong types and impossible values in one line, and are edited by path."""

import dataclasses
from typing import Literal

import pytest

from lcx.spec import Spec, SpecError, edit, edits, fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Spec):
    size: int = 4
    kind: Literal["a", "b"] = "a"

    def validate(self):
        self.check(self.size >= 1, "size", "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Spec):
    parts: tuple[Inner, ...] = (Inner(), Inner(size=2))
    rate: float = 0.5
    one: Inner | None = None
    pair: tuple[int, str] = (1, "x")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rate": "fast"}, "Outer.rate = 'fast': expected float"),
        ({"rate": True}, "Outer.rate = True: expected float"),
        ({"rate": float("inf")}, "Outer.rate = inf: expected finite numbers"),
        ({"one": 3}, "Outer.one = 3: expected Inner or None"),
        ({"parts": (Inner(), 5)}, "Outer.parts = .*: expected a tuple of Inner"),
        ({"parts": [Inner()]}, "Outer.parts = .*: expected a tuple of Inner"),
        ({"pair": (1, 2)}, "Outer.pair = .*: expected a tuple of int and str"),
        ({"pair": (1, "x", 3)}, "Outer.pair"),
    ],
)
def test_wrong_types_are_refused(given, message):
    with pytest.raises(SpecError, match=message):
        Outer(**given)


def test_wrong_choice_and_value_are_refused():
    with pytest.raises(SpecError, match=r"Inner\.kind = 'c': expected one of 'a', 'b'"):
        Inner(kind="c")
    with pytest.raises(SpecError, match=r"Inner\.size = 0: expected at least 1"):
        Inner(size=0)
    with pytest.raises(SpecError, match=r"Inner\.size = True"):
        Inner(size=True)


def test_an_int_is_a_float():
    assert Outer(rate=1).rate == 1


def test_edit_replaces_one_leaf_and_checks_again():
    changed = edit(Outer(), "parts[1].size", 9)
    assert changed == Outer(parts=(Inner(), Inner(size=9)))
    with pytest.raises(SpecError, match=r"Inner\.size = -1"):
        edit(Outer(), "parts[0].size", -1)
    assert edits(Outer(), [("rate", 2.0), ("one", Inner(size=3)), ("one.size", 5)]).one == Inner(size=5)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("parts[2].size", r"no element \[2\]"),
        ("parts[0].sise", "Inner has no field 'sise'; it has size, kind"),
        ("rate.x", "has no fields"),
    ],
)
def test_misspelt_paths_are_refused(path, message):
    with pytest.raises(SpecError, match=message):
        edit(Outer(), path, 1)


def test_fingerprint_follows_equality():
    assert fingerprint(Outer()) == fingerprint(Outer(parts=(Inner(), Inner(size=2))))
    assert fingerprint(Outer()) != fingerprint(edit(Outer(), "rate", 0.25))
    assert Outer(rate=1) == Outer(rate=1.0) and fingerprint(Outer(rate=1)) == fingerprint(Outer(rate=1.0))


def test_integers_in_tuples_of_floats_print_alike():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Shares(Spec):
        at: tuple[float, ...] | None = None
        pair: tuple[int, float] = (1, 2.0)

    given, same = Shares(at=(0, 1), pair=(3, 4)), Shares(at=(0.0, 1.0), pair=(3, 4.0))
    assert given == same and fingerprint(given) == fingerprint(same)
    assert repr(given.pair) == "(3, 4.0)"
