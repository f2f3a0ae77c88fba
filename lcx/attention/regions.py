"""Attention whose rotation depends on the region of a pair: one fold a region of a distance plan, merged."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from lcx.attention.distance_fold import DistanceFold
from lcx.attention.merge import merge
from lcx.positions.distance_plan import plain
from lcx.positions.rotate import rotate
from pallas_kernels.tile_attention import op


class Regions(DistanceFold):
    def forward(self, q, k, v, q_tokens, k_tokens):
        parts = []
        for region, fold in self._folds():
            turned = self._turn(q, "query", region, q_tokens), self._turn(k, "key", region, k_tokens)
            turned = tuple(x.astype(q.dtype) for x in turned)
            parts.append(fold.forward(*turned, v, q_tokens, k_tokens))
        return functools.reduce(merge, parts)

    def backward(self, q, k, v, q_tokens, k_tokens, lse, delta, d_out):
        sums = None
        for region, fold in self._folds():
            turn_q = functools.partial(self._turn, side="query", region=region, tokens=q_tokens)
            turn_k = functools.partial(self._turn, side="key", region=region, tokens=k_tokens)
            (turned_q, back_q), (turned_k, back_k) = (
                jax.vjp(turn, x.astype(jnp.float32)) for turn, x in ((turn_q, q), (turn_k, k))
            )
            rounded = turned_q.astype(q.dtype), turned_k.astype(k.dtype)
            dq, dk, dv = fold.backward(*rounded, v, q_tokens, k_tokens, lse, delta, d_out)
            found = back_q(dq)[0], back_k(dk)[0], dv
            sums = found if sums is None else tuple(a + b for a, b in zip(sums, found, strict=True))
        return sums

    def _folds(self):
        for region in self.distances.regions:
            yield region, op.Tiled(self.form, self.mask & region.mask, self.scale, self.softcap)

    def _turn(self, x, side: Literal["query", "key"], region, tokens):
        plain_frequencies = frequencies = self.distances.frequencies
        if region.axes is not None:
            frequencies = dataclasses.replace(frequencies, axis=region.axes)
        places = getattr(region, side)(tokens.index)
        if not self.distances.plan.chooses:
            return rotate(x, places, frequencies, side=side)
        chosen, others = jnp.split(x, 2, axis=-1) if side == "query" else (x, x)
        chosen = rotate(chosen, places, frequencies, side=side)
        others = rotate(others, plain(tokens.index), plain_frequencies, side=side)
        return jnp.concatenate([chosen, others], axis=-1)
