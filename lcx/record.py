"""record: a frozen dataclass that is a JAX pytree.

Rebuilding one from leaves skips its constructor, so a record of arrays maps to a record of anything: shardings, shapes, axes.
"""

import dataclasses
from typing import dataclass_transform

import jax


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type) -> type:
    """Makes `cls` a frozen, keyword-only dataclass whose fields are the children of a pytree."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))

    def flatten_with_keys(value):
        return tuple((jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names), None

    def unflatten(_, children):
        value = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(value, name, child)
        return value

    def flatten(value):
        return tuple(getattr(value, name) for name in names), None

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
