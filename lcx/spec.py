"""Spec: the frozen, keyword-only record that is both the config and the identity of a part.

A spec checks the type of every field against its annotation, and that numbers are finite, then calls `validate()`. Both raise
`SpecError`, whose message names the field, shows the offending value and says what would be accepted. `edit` and `edits` make
changed copies by dotted path; every copy is checked again, so an impossible combination never exists.
"""

import dataclasses
import functools
import hashlib
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union


class SpecError(ValueError):
    """A config is impossible. The message is one line for the person who wrote the config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Base of every spec. Subclasses are `@dataclasses.dataclass(frozen=True, kw_only=True)`."""

    def __post_init__(self):
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            if not matches(value, hint):
                self.fail(name, value, describe(hint))
            if not _finite(value):
                self.fail(name, value, "finite numbers")
            object.__setattr__(self, name, _settled(value, hint))  # equal specs then print and fingerprint alike
        self.validate()

    def validate(self) -> None:
        """Raises `SpecError` (through `fail` or `check`) if the values of this spec cannot work together."""

    def fail(self, field: str, value: Any, accepted: str) -> typing.NoReturn:
        """Raises the one-line error for `field`."""
        raise SpecError(f"{type(self).__name__}.{field} = {_short(value)}: expected {accepted}")

    def check(self, ok: bool, field: str, accepted: str) -> None:
        """Raises the one-line error for `field` unless `ok`."""
        if not ok:
            self.fail(field, getattr(self, field), accepted)

    @classmethod
    def examples(cls) -> Iterable["Spec"]:
        """Small instances for the contract tests; empty only for abstract kinds."""
        return ()


def edit(spec: Any, path: str, value: Any) -> Any:
    """A copy of `spec` with the field at the dotted `path` (`model.pattern[0].mixer.heads`) replaced by `value`."""
    return _edit(spec, tuple(re.findall(r"[^.\[\]]+", path)), value, path)


def edits(spec: Any, changes: Iterable[tuple[str, Any]]) -> Any:
    """`edit`, several times, in order."""
    for path, value in changes:
        spec = edit(spec, path, value)
    return spec


def below(value: Any, path: str = "") -> Iterator[tuple[str, Spec]]:
    """(path, spec) of every spec below a value, itself included."""
    if isinstance(value, Spec):
        yield path, value
        for name in value.__dataclass_fields__:
            yield from below(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, tuple):
        for i, element in enumerate(value):
            yield from below(element, f"{path}[{i}]")


def fingerprint(spec: Any) -> str:
    """Sixteen hex digits that identify the spec: equal specs give equal fingerprints in every process."""
    return hashlib.sha256(repr(spec).encode()).hexdigest()[:16]


def _edit(node: Any, keys: tuple[str, ...], value: Any, path: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, tuple):
        if not key.isdigit() or int(key) >= len(node):
            raise SpecError(f"{path}: no element [{key}]; the tuple has {len(node)} elements")
        return (*node[: int(key)], _edit(node[int(key)], rest, value, path), *node[int(key) + 1 :])
    if not dataclasses.is_dataclass(node):
        raise SpecError(f"{path}: {_short(node)} has no fields, so no {key!r}")
    names = [field.name for field in dataclasses.fields(node)]
    if key not in names:
        raise SpecError(f"{path}: {type(node).__name__} has no field {key!r}; it has {', '.join(names)}")
    return dataclasses.replace(node, **{key: _edit(getattr(node, key), rest, value, path)})


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _settled(value: Any, hint: Any) -> Any:
    """A value that matches its annotation, with every integer that stands for a float made one, in tuples too."""
    if type(value) is int:
        return value if matches(value, _without_float(hint)) else float(value)
    if type(value) is tuple:
        choices = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
        for choice in choices:
            if typing.get_origin(choice) is tuple and matches(value, choice):
                arguments = typing.get_args(choice)
                each = arguments[:1] * len(value) if arguments[-1:] == (Ellipsis,) else arguments
                return tuple(map(_settled, value, each))
    return value


def _finite(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@functools.cache
def _without_float(hint: Any) -> Any:
    """The annotation with every `float` of a union replaced by what no value matches."""
    if hint is float:
        return Literal[()]
    if typing.get_origin(hint) in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_without_float, typing.get_args(hint)))
    return hint


def matches(value: Any, hint: Any) -> bool:
    """Whether `value` has the annotated type: classes, unions, literals, tuples. An int is a float; a bool is not an int."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(matches(value, choice) for choice in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(matches(element, arguments[0]) for element in value)
        return len(value) == len(arguments) and all(map(matches, value, arguments))
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (float, int)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def describe(hint: Any) -> str:
    """The annotation in words, for error messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is tuple:
        return "a tuple of " + " and ".join(describe(choice) for choice in arguments if choice is not Ellipsis)
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
