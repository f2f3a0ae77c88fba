"""Config values as text: what a command line may write, and how a resolved config is printed.

`parse` reads a Python literal (`8.0`, `None`, `(1, 2)`), a bare word or path as a string (`bfloat16`, `runs/a`), or a part as
an expression over spec classes: `YaRN(factor=4.0, original_length=128)`, `Sink(size=4) | Window(size=64)`. Nothing is
evaluated. `render` prints one field a line under the path that sets it.
"""

import ast
import dataclasses
from collections.abc import Iterator
from typing import Any

import fiddle

from lcx.advice import required, written
from lcx.config import Tree, accepted, expand, others, suggestion
from lcx.parts import parts
from lcx.spec import Spec, SpecError

_OPERATORS = {ast.BitAnd: "And", ast.BitOr: "Or"}  # of masks


class NoSuchPart(SpecError):
    """A text names a part that there is not."""


def parse(text: str) -> Tree:
    """The value that `text` stands for. Raises SpecError for an expression over something that is no part."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        if "never closed" in error.msg or "unmatched" in error.msg or "does not match" in error.msg:
            raise SpecError(f"{text!r}: {error.msg}; a string with brackets needs quotes") from None
        return text
    if any(isinstance(child, ast.Call) for child in ast.walk(node)):
        return expand(_value(node))
    try:
        return ast.literal_eval(node)
    except ValueError:
        return text


def render(value: Any, name: str = "") -> str:
    """Every field of a spec, one a line, nested by indentation; `name` heads the first line."""
    return "\n".join(_lines(name, value, ""))


def fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every plain field, in order; a spec itself stands before its fields, by its class name."""
    if isinstance(value, Spec):
        yield path, type(value).__name__
        for field in dataclasses.fields(value):
            yield from fields(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(value, tuple) and any(isinstance(element, Spec) for element in value):
        yield path, f"{len(value)} parts"
        for i, element in enumerate(value):
            yield from fields(element, f"{path}[{i}]")
    else:
        yield path, value


def first_difference(a: Spec, b: Spec) -> str | None:
    """'path: value in a, value in b' of the first field in which two specs differ; None if they are equal."""
    left, right = dict(fields(a)), dict(fields(b))
    for path in dict.fromkeys([*left, *right]):
        if left.get(path) != right.get(path):
            sides = (repr(side[path]) if path in side else "absent" for side in (left, right))
            return f"{path or 'class'}: {' against '.join(sides)}"
    return None


def _lines(name: str, value: Any, indent: str) -> Iterator[str]:
    head = f"{indent}{name} = " if name else indent
    if isinstance(value, Spec):
        yield f"{head}{type(value).__name__}"
        for field in dataclasses.fields(value):
            yield from _lines(field.name, getattr(value, field.name), indent + "  ")
    elif isinstance(value, tuple) and any(isinstance(element, Spec) for element in value):
        for i, element in enumerate(value):
            yield from _lines(f"{name}[{i}]", element, indent)
    else:
        yield f"{head}{value!r}"


def _value(node: ast.expr) -> Tree:
    """The tree of an expression."""
    if isinstance(node, ast.Call):
        return _part(node)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return fiddle.Config(_class(_OPERATORS[type(node.op)]), terms=(_value(node.left), _value(node.right)))
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(map(_value, node.elts))
    try:
        return ast.literal_eval(node)
    except ValueError:
        text = ast.unparse(node)
        for cls in parts():
            if text == cls.__name__:
                raise SpecError(f"{text!r}: the part is written {written(cls)}") from None
        raise SpecError(f"{text!r} is neither a literal nor a part; a string needs quotes here: {text!r}") from None


def _part(node: ast.Call) -> Tree:
    name = ast.unparse(node.func)
    cls = _class(name)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise SpecError(f"{name}: fields are given by name, such as {_example(cls)}")
    known = [field.name for field in dataclasses.fields(cls)]
    for keyword in node.keywords:
        if keyword.arg not in known:
            wanted = suggestion(keyword.arg, known)
            more = others(cls, keyword.arg)
            raise SpecError(f"{name} has no field {keyword.arg!r}.{wanted} It has {', '.join(known) or 'none'}{more}")
    return fiddle.Config(cls, **{keyword.arg: _of_field(cls, keyword) for keyword in node.keywords})


def _of_field(cls: type[Spec], keyword: ast.keyword) -> Tree:
    """The value of a field of a part. Raises SpecError, with what the field takes, where it names a part that there is not."""
    try:
        return _value(keyword.value)
    except NoSuchPart as error:
        raise SpecError(f"{error} {cls.__name__}.{keyword.arg} takes {accepted(cls, keyword.arg)}") from None


def _example(cls: type[Spec]) -> str:
    """With the fields that the part needs, or its first ones."""
    first = ", ".join(f"{field.name}=..." for field in dataclasses.fields(cls)[:2])
    return written(cls) if required(cls) else f"{cls.__name__}({first})"


def _class(name: str) -> type[Spec]:
    """The spec class of a bare or dotted name."""
    found = [cls for cls in parts() if name in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}")]
    if len(found) > 1:
        raise SpecError(f"{name!r} is ambiguous: {' or '.join(f'{cls.__module__}.{cls.__name__}' for cls in found)}")
    if not found:
        raise NoSuchPart(f"there is no part {name!r}.{suggestion(name, [cls.__name__ for cls in parts()])}")
    return found[0]
