"""Specs as Fiddle configs: the tree that a command line edits before any spec exists.

A config tree is `fiddle.Config` nodes over spec classes, tuples and plain values. `expand` writes out every default, so that
every field of every part has a dotted path (`model.pattern[0].mixer.heads`); `assign` changes one field; `build` makes the
specs and names the path of whatever is refused; `dumps` and `loads` keep a tree as JSON that repeats the run alone.
Everything a person can get wrong raises `SpecError`, one line.
"""

import dataclasses
import difflib
import inspect
import json
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fiddle
from fiddle.experimental import serialization

from lcx.advice import advice, home, kinds, required, shown, written
from lcx.parts import parts
from lcx.spec import Spec, SpecError, describe, matches

Tree = Any  # fiddle.Config over a Spec class, tuple of trees, or a plain value


def of_spec(spec: Any) -> Tree:
    """The tree of a finished spec: every field is set."""
    if isinstance(spec, Spec):
        values = {field.name: of_spec(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
        return fiddle.Config(type(spec), **values)
    return tuple(map(of_spec, spec)) if isinstance(spec, tuple) else spec


def expand(tree: Tree) -> Tree:
    """A copy in which every default is written out and no node is shared between two places.

    Raises TypeError where a config calls something that is no spec: such a function lacks `@auto_config`.
    """
    if isinstance(tree, Spec):
        return of_spec(tree)
    if isinstance(tree, tuple):
        return tuple(map(expand, tree))
    if not isinstance(tree, fiddle.Buildable):
        return tree
    cls = fiddle.get_callable(tree)
    if not is_spec_class(cls):
        raise TypeError(f"a config calls {cls.__module__}.{cls.__qualname__}, which is no spec: decorate it with @auto_config")
    given = fiddle.ordered_arguments(tree)
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in given:
            values[field.name] = expand(given[field.name])
        elif field.default is not dataclasses.MISSING:
            values[field.name] = expand(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = expand(field.default_factory())
    return fiddle.Config(cls, **values)


def assign(tree: Tree, path: str, value: Any) -> Tree:
    """The tree with the field at `path` set to `value`, a plain value or a tree."""
    if not re.fullmatch(r"\w+(\.\w+|\[\d+\])*", path):
        raise SpecError(f"{path!r} is no path to a field: expected names and places, such as model.pattern[0].mixer.heads")
    return _assign(tree, tuple(re.findall(r"\w+", path)), value, "")


def build(tree: Tree, path: str = "", whole: Tree = None) -> Any:
    """The specs of a tree, which is all of the config or, at `path`, part of a whole one. Raises SpecError with the path of the
    refused part in front."""
    whole = tree if whole is None else whole
    if isinstance(tree, tuple):
        return tuple(build(element, f"{path}[{i}]", whole) for i, element in enumerate(tree))
    if not isinstance(tree, fiddle.Buildable):
        return tree
    cls, given = fiddle.get_callable(tree), fiddle.ordered_arguments(tree)
    for name, value in given.items():
        if isinstance(value, fiddle.Buildable) and _misplaced(cls, name, value):
            part = fiddle.get_callable(value)
            where = f"; {home(part, whole)}" if home(part, whole) else ""
            raise SpecError(f"{path or cls.__name__}.{name} = {written(part)}: expected {accepted(cls, name)}{where}")
    values = {name: build(value, f"{path}.{name}" if path else name, whole) for name, value in given.items()}
    try:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given.keys() - set(known):
            raise SpecError(f"{cls.__name__} has no field {name!r}.{suggestion(name, known)}")
        if missing := [name for name in required(cls) if name not in values]:
            raise SpecError("; ".join(f"{cls.__name__}.{name} is missing: expected {accepted(cls, name)}" for name in missing))
        hints = typing.get_type_hints(cls)
        for name, value in values.items():
            if not matches(value, hints[name]):
                expected = f"expected {accepted(cls, name)}{advice(value, hints[name], whole)}"
                raise SpecError(f"{cls.__name__}.{name} = {shown(value)}: {expected}")
        return cls(**values)
    except SpecError as error:
        raise SpecError(f"{path}: {error}" if path else str(error)) from None


def _misplaced(cls: type[Spec], field: str, tree: Tree) -> bool:
    """Whether a part that its field does not take lacks fields too, so that the first is what is to be told."""
    part, taken = fiddle.get_callable(tree), kinds(typing.get_type_hints(cls).get(field, Any))
    lacks = set(required(part)) - fiddle.ordered_arguments(tree).keys()
    return bool(lacks and taken) and not issubclass(part, tuple(taken))


def dumps(spec: Spec) -> str:
    """JSON from which `loads` gives the same tree, every default written out."""
    return serialization.dump_json(of_spec(spec), pyref_policy=ONLY_PARTS, indent=1) + "\n"


def loads(text: str) -> Tree:
    """The tree of `dumps`. Raises SpecError if the text is none, or names a part that this version does not have."""
    try:
        held = json.loads(text)
    except ValueError as error:
        raise SpecError(f"not a config of this version: not JSON: {error}") from None
    if not isinstance(held, dict) or not {"root", "objects"} <= held.keys():
        found = f"an object of {', '.join(map(repr, held)) or 'nothing'}" if isinstance(held, dict) else repr(held)
        raise SpecError(f"not a config of this version: expected what a run writes as config.json, found {found[:120]}")
    try:
        tree = serialization.load_json(text, pyref_policy=ONLY_PARTS)
    except (ValueError, KeyError, AttributeError, ImportError, TypeError) as error:
        raise SpecError(f"not a config of this version: {type(error).__name__}: {error}") from error
    except (serialization.DeserializationError, serialization.PyrefPolicyError) as error:
        raise SpecError(f"not a config of this version: {error}") from error
    if not isinstance(tree, fiddle.Buildable):
        raise SpecError(f"not a config of this version: expected a config, found {tree!r}")
    return tree


def load_file(path: Path) -> Tree:
    """The tree in a file of `dumps`. Raises SpecError as `loads` does, and for a file that cannot be read as text."""
    try:
        return loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"not a config: not UTF-8 at byte {error.start}") from None


class _OnlyParts(serialization.PyrefPolicy):
    """A stored config names specs of lcx and containers, nothing else: reading one runs no other code."""

    def allows_import(self, module, symbol):
        return module.partition(".")[0] in ("lcx", "fiddle", "builtins")

    def allows_value(self, value):
        return is_spec_class(value) or value in (tuple, dict, list) or value.__module__.startswith("fiddle.")


ONLY_PARTS = _OnlyParts()


def is_spec_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Spec)


def accepted(cls: type[Spec], field: str) -> str:
    """What a field takes, in words: `FrequencyRule or None (Rope, YaRN)`, the parts of an abstract kind by name."""
    hint = typing.get_type_hints(cls)[field]
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if inspect.isabstract(kind) and is_spec_class(kind)]
    names = [part.__name__ for kind in kinds for part in parts(kind)]
    return describe(hint) + (f" ({', '.join(names)})" if names else "")


def accepted_at(tree: Tree, path: str) -> str:
    """What the field at `path` takes, in words. Raises SpecError if there is no such field."""
    assign(tree, path, None)
    *keys, last = re.findall(r"\w+", path)
    for key in keys:
        tree = tree[int(key)] if key.isdigit() else getattr(tree, key)
    return "an element" if last.isdigit() else accepted(fiddle.get_callable(tree), last)


def suggestion(name: str, known: Iterable[str]) -> str:
    """' Did you mean x?' for the nearest known names, or nothing."""
    spelt = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name, list(spelt.values()), n=3, cutoff=0.6)
    close = close or [spelt[each] for each in difflib.get_close_matches(name.lower(), list(spelt), n=3, cutoff=0.6)]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def others(cls: type[Spec], field: str) -> str:
    """'; KVCache has it', of the parts that may stand where this one does; if there is none, of one that this one is a part of:
    '; Evict(score=SnapKV(), keep=...) has it'."""
    kind = next((base for base in cls.__mro__ if is_spec_class(base) and inspect.isabstract(base)), None)
    held = [] if kind is None else [part.__name__ for part in parts(kind) if field in part.__dataclass_fields__]
    if held:
        return f"; {' and '.join(held)} {'has' if len(held) == 1 else 'have'} it"
    for owner in sorted(parts(), key=lambda owner: len(owner.__mro__)):
        if field in owner.__dataclass_fields__:
            for name, hint in typing.get_type_hints(owner).items():
                if any(issubclass(cls, kind) for kind in kinds(hint)):
                    return f"; {owner.__name__}({name}={written(cls)}, {field}=...) has it"
    return ""


def _assign(node: Tree, keys: tuple[str, ...], value: Any, above: str) -> Tree:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, tuple):
        if not key.isdigit() or int(key) >= len(node):
            raise SpecError(f"{above} has no element [{key}]: it has {len(node)}")
        place = int(key)
        return (*node[:place], _assign(node[place], rest, value, f"{above}[{place}]"), *node[place + 1 :])
    if not isinstance(node, fiddle.Buildable):
        raise SpecError(f"{above} = {node!r} has no fields, so no {key!r}")
    cls = fiddle.get_callable(node)
    names = [field.name for field in dataclasses.fields(cls)]
    where = f"{above}: {cls.__name__}" if above else cls.__name__
    if key not in names:
        raise SpecError(f"{where} has no field {key!r}.{suggestion(key, names)} It has {', '.join(names)}{others(cls, key)}")
    given = fiddle.ordered_arguments(node)
    if rest and key not in given:
        raise SpecError(f"{where}.{key} is not set yet: expected {accepted(cls, key)}")
    given[key] = _assign(given.get(key), rest, value, f"{above}.{key}" if above else key)
    return fiddle.Config(cls, **given)
