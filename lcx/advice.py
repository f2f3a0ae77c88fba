"""What to write instead, for a value that its field does not take: how a part is written, and which field a part is for."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

import fiddle

from lcx.parts import parts
from lcx.spec import Spec, matches

MOST = 2  # fields that are named
Places = Iterator[tuple[str, Any]]  # path and annotation of fields


def advice(value: Any, hint: Any, tree: Any) -> str:
    """The end of the sentence that refuses `value` in a field of this annotation, or nothing. tree: of the whole config."""
    words = [word for choice in _choices(hint) if typing.get_origin(choice) is Literal for word in typing.get_args(choice)]
    if value is None and "none" in words:
        return "; write none, not None"
    if isinstance(value, str):
        none = value.lower() in ("none", "null") and matches(None, hint)
        return "; write None" if none else _of_name(value, hint, tree)
    return f"; {home(type(value), tree)}" if isinstance(value, Spec) and home(type(value), tree) else ""


def required(cls: type[Spec]) -> list[str]:
    """The fields of a part that have no default."""
    missing = dataclasses.MISSING
    return [field.name for field in dataclasses.fields(cls) if field.default is field.default_factory is missing]


def written(cls: type[Spec]) -> str:
    """A part with what it needs: `YaRN(factor=..., original_length=...)`."""
    return f"{cls.__name__}({', '.join(f'{name}=...' for name in required(cls))})"


def shown(value: Any) -> str:
    """A value, of a part only what is not as by default, in at most 120 characters."""
    if isinstance(value, Spec):
        given = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        fields = [f"{field.name}={held!r}" for field, held in given if held != field.default]
        text = f"{type(value).__name__}({', '.join(fields)})"
    else:
        text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def home(cls: type[Spec], tree: Any) -> str:
    """'ALiBi is a LinearBias, for model.pattern[0].mixer.distance_bias', or nothing if no field is for such a part: fields of
    the config if it has one, else of any part; single ones before tuples."""
    anywhere = [(f"{owner.__name__}.{name}", hint) for owner in parts() for name, hint in typing.get_type_hints(owner).items()]
    for places in (list(_places(tree)), anywhere):
        for elements in (False, True):
            found = [(path, kind) for path, hint in places for kind in kinds(hint, elements) if issubclass(cls, kind)]
            if found:
                fields, kind = " or ".join(path for path, _ in found[:MOST]), found[0][1]
                return f"{cls.__name__} is {'' if kind is cls else f'a {kind.__name__}, '}for {fields}"
    return ""


def _of_name(value: str, hint: Any, tree: Any) -> str:
    """Where a word names a part, which is no word."""
    name, fitting = value.rpartition(".")[2], [cls for cls in parts() if _fits(cls, hint)]
    for cls in parts():
        if cls.__name__ == name:
            return f"; the part is written {written(cls)}" if cls in fitting else f"; {home(cls, tree) or name + ' is a part'}"
    spelt = {cls.__name__.lower(): cls for cls in fitting}
    close = difflib.get_close_matches(name.lower(), list(spelt), n=1, cutoff=0.6)
    return f"; did you mean {written(spelt[close[0]])}?" if close else ""


def _fits(cls: type[Spec], hint: Any) -> bool:
    return any(issubclass(cls, kind) for kind in kinds(hint))


def _places(node: Any, path: str = "") -> Places:
    """Every field below a tree."""
    if isinstance(node, tuple):
        for i, element in enumerate(node):
            yield from _places(element, f"{path}[{i}]")
    elif isinstance(node, fiddle.Buildable):
        given = fiddle.ordered_arguments(node)
        for name, hint in typing.get_type_hints(fiddle.get_callable(node)).items():
            here = f"{path}.{name}" if path else name
            yield here, hint
            yield from _places(given.get(name), here)


def kinds(hint: Any, elements: bool = False) -> list[type[Spec]]:
    """The kinds of parts that a field takes; with `elements`, that its tuple does."""
    choices = _choices(hint)
    if elements:
        tuples = [typing.get_args(choice) for choice in choices if typing.get_origin(choice) is tuple]
        choices = [choice for arguments in tuples for argument in arguments for choice in _choices(argument)]
    return [kind for kind in choices if isinstance(kind, type) and issubclass(kind, Spec) and kind is not Spec]


def _choices(hint: Any) -> tuple[Any, ...]:
    """What a union is of, or the one annotation."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
