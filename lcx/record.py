"""record: a frozen dataclass that is a JAX pytree.

Rebuilding one from leaves skips its constructor, so a record of arrays maps to a record of anything: shardings, shapes, axes.
"""

import dataclasses
from typing import Any, dataclass_transform

import jax


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type) -> type:
    """Makes `cls` a frozen, keyword-only dataclass whose fields, but for those that are `static()`, are a pytree's children."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(cls)
    names = tuple(field.name for field in fields if not field.metadata.get("static"))
    static_names = tuple(field.name for field in fields if field.metadata.get("static"))
    held = lambda value: tuple(getattr(value, name) for name in static_names)

    def flatten_with_keys(value):
        return tuple((jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names), held(value)

    def unflatten(static_values, children):
        value = object.__new__(cls)
        for name, child in zip(names + static_names, (*children, *static_values), strict=True):
            object.__setattr__(value, name, child)
        return value

    def flatten(value):
        return tuple(getattr(value, name) for name in names), held(value)

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def static() -> Any:
    """A field of a record that is part of its structure: hashable, and known when a program is traced."""
    return dataclasses.field(metadata={"static": True})


def replaced(value: Any, **fields: Any) -> Any:
    """`dataclasses.replace` of a record without its constructor, so that arrays may have any shape, as a map's may."""
    made = object.__new__(type(value))
    for field in dataclasses.fields(value):
        object.__setattr__(made, field.name, fields.get(field.name, getattr(value, field.name)))
    return made
