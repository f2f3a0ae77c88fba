"""Random combinations of everything that attention on a mesh can vary in: refused with a reason, or equal to the reference.

A draw is a config and data. Configs vary mask, layout, communication, mesh, backend, dtype, heads and a bias by distance; the
first 32 are those that must always run. DATA draws of rows (packed documents, shared and reader segments, any order) share a
compiled config.
"""

import dataclasses
import functools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from infos import random_info

from lcx.attention.all_gather import AllGather
from lcx.attention.communication import Communication
from lcx.attention.mask import Causal, Chunk, Mask, Sink, Window, tokens_of
from lcx.attention.ring import Ring
from lcx.attention.sharded import sharded_attend
from lcx.attention.ulysses import RingUlysses, Ulysses
from lcx.parallel.layout import Layout, Striped, Zigzag
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.parts import parts
from lcx.positions.linear_bias import LinearBias
from lcx.spec import edit, edits
from lcx.support import broken
from lcx.support_rules.walk import sequence_axes
from lcx.support_table import base
from pallas_kernels.tile_attention import reference

ROWS, LENGTH, HEAD_DIM = 2, 64, 8
DATA = 10  # draws of data a config
KINDS = ("packed", "documents", "special", "mixed")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # of the largest entry
TWO_AXES = Rules(batch=("data",), sequence=("fsdp", "context"))
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Config:
    mask: Mask
    layout: Layout
    communication: Communication
    mesh: MeshSpec
    rules: Rules
    backend: str
    dtype: str
    heads: int
    kv_heads: int
    bias: LinearBias | None = None

    def refusal(self) -> str | None:
        """What the validator of whole configs says of it."""
        mixer = {"mask": self.mask, "backend": self.backend, "heads": self.heads, "kv_heads": self.kv_heads}
        mixer["distance_bias"] = self.bias
        changes: list[tuple[str, Any]] = [(f"model.pattern[0].mixer.{name}", value) for name, value in mixer.items()]
        changes += [("model.communication", self.communication), ("model.rules", self.rules), ("layout", self.layout)]
        changes += [("mesh", self.mesh), ("data.length", LENGTH), ("data.batch_size", ROWS), ("model.compute", self.dtype)]
        return next(broken(edits(base(), changes)), None)

    @functools.cached_property
    def shards(self) -> int:
        return int(np.prod(list(sequence_axes(edits(base(), [("mesh", self.mesh), ("model.rules", self.rules)])).values())))


def always() -> list[Config]:
    """Masks x layouts x communications on grouped heads."""
    masks = (Causal(), Window(size=9), Sink(size=2) | Window(size=6), Chunk(size=16))
    layouts = (Zigzag(), Striped(granularity=4))
    found = []
    for communication in (AllGather(), Ring(), Ulysses(), RingUlysses()):
        for mask in masks:
            for layout in layouts:
                mesh, rules = MeshSpec(fsdp=2, context=4), TWO_AXES
                found.append(Config(mask, layout, communication, mesh, rules, "xla", "float32", 8, 2))
    return found


def config(number: int) -> Config:
    """Config `number`: one of `always`, then random ones."""
    if number < len(always()):
        return always()[number]
    draw = random.Random(number)
    examples = lambda kind: draw.choice([example for cls in parts(kind) for example in cls.examples()])
    meshes = [MeshSpec(context=n) for n in (1, 2, 4, 8)] + [MeshSpec(context=4, tensor=2), MeshSpec(data=2, context=4)]
    meshes += [MeshSpec(fsdp=2, context=n) for n in (2, 4)] + [MeshSpec(fsdp=2, context=2, tensor=2)]
    mesh = draw.choice(meshes)
    heads, kv_heads = draw.choice([(8, 8), (8, 4), (8, 2), (8, 1), (4, 2), (12, 4), (16, 2)])
    rules = TWO_AXES if mesh.fsdp > 1 else Rules()
    return Config(
        mask=examples(Mask),
        layout=examples(Layout),
        communication=examples(Communication),
        mesh=mesh,
        rules=edit(rules, "kv_heads", ()) if mesh.tensor > 1 and number % 2 else rules,
        backend=draw.choice(["auto", "xla", "xla", "reference"]),
        dtype=draw.choice(["float32", "float32", "bfloat16"]),
        heads=heads,
        kv_heads=kv_heads,
        bias=draw.choice([None, *(example for cls in parts(LinearBias) for example in cls.examples())]),
    )


def check(number: int, data: int) -> dict[str, Any]:
    """The row of one draw. Raises AssertionError if it is neither refused nor equal to the reference."""
    chosen = config(number)
    row = {"config": number, "data": data} | ({} if data else {"choice": str(chosen)})
    if reason := chosen.refusal():
        return row | {"refused": reason}
    seed = 1000 * number + data
    inputs = _inputs(seed, chosen)
    errors = {}
    for name, got, wanted in zip(NAMES, _sharded(chosen)(*inputs), _dense(chosen)(*inputs), strict=True):
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
        finite = np.isfinite(wanted)
        np.testing.assert_array_equal(np.where(finite, 0, got), np.where(finite, 0, wanted), f"{name}, {row}, {chosen}")
        largest = np.abs(wanted[finite]).max(initial=1e-3)
        errors[name] = float(f"{np.abs(got[finite] - wanted[finite]).max(initial=0) / largest:.2g}")
    allowed = TOLERANCE[chosen.dtype]
    assert max(errors.values()) <= allowed, (errors, row, chosen)
    return row | {"devices": chosen.mesh.size, "dtype": chosen.dtype, "shards": chosen.shards, "error": errors}


@functools.lru_cache(maxsize=2)
def _sharded(chosen: Config):
    places = chosen.layout.permutation(LENGTH, chosen.shards)
    back = np.argsort(places)

    @jax.jit
    def run(q, k, v, info, d_out, d_lse):
        q, k, v, info, d_out, d_lse = jax.tree.map(lambda x: x[:, places], (q, k, v, info, d_out, d_lse))
        options = {"rules": chosen.rules, "communication": chosen.communication, "backend": chosen.backend}
        options |= {"mask": chosen.mask, "scale": 0.35, "bias": chosen.bias}
        attention = lambda q, k, v: sharded_attend(q, k, v, info, info, **options)
        (out, lse), pull = jax.vjp(attention, *(x.astype(chosen.dtype) for x in (q, k, v)))
        return jax.tree.map(lambda x: x[:, back], (out, lse, *pull((d_out, d_lse))))

    def on_mesh(*inputs):
        with jax.set_mesh(chosen.mesh.build()):
            return run(*inputs)

    return on_mesh


@functools.lru_cache(maxsize=2)
def _dense(chosen: Config):
    @jax.jit
    def run(q, k, v, info, d_out, d_lse):
        tokens = tokens_of(info)
        round_off = lambda x: x.astype(chosen.dtype).astype(jnp.float32)
        bias = None if chosen.bias is None else chosen.bias.decay(chosen.heads).bias(q)
        form = lambda q, k, v: reference.forward(q, k, v, tokens, tokens, mask=chosen.mask, scale=0.35, bias=bias)
        (out, lse), pull = jax.vjp(form, *map(round_off, (q, k, v)))
        return out, lse, *pull((d_out, jnp.where(lse == -jnp.inf, 0, d_lse)))

    return run


def _inputs(seed: int, chosen: Config):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    B, T, H, K, D = ROWS, LENGTH, chosen.heads, chosen.kv_heads, HEAD_DIM
    info = random_info(rng, B, T, KINDS[seed % len(KINDS)])
    return normal(B, T, H, D), normal(B, T, K, D), normal(B, T, K, D), info, normal(B, T, H, D), normal(B, T, H)
