"""Tile sizes of the Hopper kernels and the shared memory that they take.

128 tokens of the outputs stay with a program, those of the other side pass by, `stages` tiles of them in shared memory. Bytes:
    forward   q + stages (k + v + tokens)      dq   q + dout + stages (k + v + tokens)
    dk, dv    k + v + stages (q + dout + lse + delta + tokens)
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.tile_attention.blocks import Shape
from pallas_kernels.tile_attention.gpu_arrays import power_of_two
from pallas_kernels.tile_attention.triton_blocks import KIB
from pallas_kernels.tile_attention.triton_blocks import SHARED as EACH

MAJOR = 128  # tokens that stay: 64 for each of two warpgroups
GPUS = ("H100", "H200")
SHARED = min(EACH[gpu] for gpu in GPUS)
OWN = 3 * KIB  # barriers and alignment
WIDEST = 256
TOGETHER = 256  # head sizes of keys and values whose gradients one kernel keeps in registers; wider ones take a kernel each


class Passing(NamedTuple):
    """Tokens of the tiles that pass by, a multiple of 64, and how many tiles of them are in shared memory."""

    tokens: int
    stages: int


class Blocks(NamedTuple):
    """Of each kernel."""

    forward: Passing
    query_gradient: Passing
    key_gradient: Passing


def takes(shape: Shape, dtype: Any, scale: float, gpu: str | None) -> bool:
    """Whether the kernels serve a call on a GPU: bfloat16, heads up to 256, a positive scale."""
    return gpu in GPUS and jnp.dtype(dtype) == jnp.bfloat16 and max(shape.D, shape.E) <= WIDEST and scale > 0


def padded_width(width: int) -> int:
    """64, 128 or 256."""
    return max(64, power_of_two(width))


def choose_blocks(shape: Shape, given: Blocks | None = None, most: int | None = None) -> Blocks:
    """The tiles for a head size, of at most so many tokens, or `given`. Raises ValueError if they do not fit."""
    D, E = padded_width(shape.D), padded_width(shape.E)
    smaller = lambda passing: passing if most is None or passing.tokens <= most else Passing(most, passing.stages)
    blocks = Blocks(*map(smaller, given or TARGETS[max(D, E)]))
    for name, passing in blocks._asdict().items():
        if passing.tokens % 64 or passing.tokens < 64 or passing.stages < 1:
            raise ValueError(f"{name} = {tuple(passing)}: expected a multiple of 64 tokens, and at least one stage")
        if (bytes_ := shared_bytes(name, D, E, passing)) > SHARED:
            raise ValueError(
                f"{name} = {tuple(passing)} with heads of {D} and {E} takes {bytes_ / KIB:.0f} KiB of shared memory: expected"
                f" at most {SHARED / KIB:.0f}"
            )
    return blocks


def shared_bytes(name: str, D: int, E: int, passing: Passing) -> int:
    """Of a program of a kernel, at most."""
    stays = {"forward": D, "query_gradient": D + E, "key_gradient": D + E}[name]
    rows = 4 * (6 if name == "key_gradient" else 4)  # tokens, lse and delta
    return 2 * MAJOR * stays + passing.stages * passing.tokens * (2 * (D + E) + rows) + OWN


TARGETS = {  # by head size, the fastest of those tried on an H200
    64: Blocks(Passing(256, 2), Passing(128, 2), Passing(128, 3)),
    128: Blocks(Passing(128, 2), Passing(128, 2), Passing(64, 3)),
    256: Blocks(Passing(64, 2), Passing(64, 1), Passing(64, 1)),
}
