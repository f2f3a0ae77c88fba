"""Arrays of all layers of a scan and the layer meant: what one reads of them, and writes, stays where it lies.

A scan over layers that cut the arrays of a layer out of its states, and put them back, would copy all slots twice a token. A
state names in `in_place` the fields that it reads and writes so; the others are cut out.
"""

from typing import Any

import jax
from jaxtyping import Array, Int

from lcx.record import record, replaced


@record
class Layered:
    """every: arrays [L, ...]. layer: the one meant."""

    every: Any
    layer: Int[Array, ""]

    def own(self) -> Any:
        """The layer's arrays."""
        return _cut(self.every, self.layer)

    def put(self, **own: Any) -> "Layered":
        """With other arrays of the layer in some fields of `every`."""
        new = {name: _put(getattr(self.every, name), x, self.layer) for name, x in own.items()}
        return replaced(self, every=replaced(self.every, **new))


def rows_of(tree: Any) -> Any:
    """Arrays [L, B, ...] as rows of all layers, [L B, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def rows_from(tree: Any, first: Int[Array, ""] | int, rows: int) -> Any:
    """So many rows of arrays [n, ...], from one on."""
    return jax.tree.map(lambda x: x if len(x) == rows else jax.lax.dynamic_slice_in_dim(x, first, rows), tree)


def of_layer(states: Any, layer: Int[Array, ""]) -> Any:
    """One layer's states of states of all layers, [L, ...]."""

    def cut(x):
        fields = {name: Layered(every=getattr(x, name), layer=layer) for name in getattr(x, "in_place", ())}
        return replaced(_cut(replaced(x, **dict.fromkeys(fields)), layer), **fields) if fields else _cut(x, layer)

    return jax.tree.map(cut, states, is_leaf=_some_in_place)


def in_layers(states: Any, new: Any, layer: Int[Array, ""]) -> Any:
    """States of all layers, with new ones of one: the inverse of `of_layer`."""

    def put(x, new):
        fields = {name: getattr(new, name).every for name in getattr(x, "in_place", ())}
        if not fields:
            return _put(x, new, layer)
        apart = dict.fromkeys(fields)
        return replaced(_put(replaced(x, **apart), replaced(new, **apart), layer), **fields)

    return jax.tree.map(put, states, new, is_leaf=_some_in_place)


def _some_in_place(x: Any) -> bool:
    return hasattr(x, "in_place")


def _cut(every: Any, layer: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), every)


def _put(every: Any, own: Any, layer: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda x, one: jax.lax.dynamic_update_index_in_dim(x, one, layer, 0), every, own)
