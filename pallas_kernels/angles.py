"""Angles of positions, in turns, that stay right at positions of millions; and cosines and sines of them.

A position times a frequency loses its fraction of a turn long before float32 runs out of integers. So the frequency, in turns
a position, comes in parts of 12 bits, and the position is split into two of 12 bits: each product is then exact, or tiny, and
is reduced modulo one turn before anything is added.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

BITS = 4096.0  # 2 ** 12
SINE = tuple((-1) ** n * (2 * math.pi) ** (2 * n + 1) / math.factorial(2 * n + 1) for n in range(8))  # Taylor's, in turns


def parts(per_position: Any) -> tuple[Any, Any, Any]:
    """Turns a position in three parts, of which the first two have 12 bits each."""
    round_ = np.round if isinstance(per_position, np.ndarray) else jnp.round
    first = round_(per_position * BITS) / BITS
    second = round_((per_position - first) * BITS**2) / BITS**2
    return first, second, per_position - first - second  # the last alone has a gradient, times the position


def turns(position, first, second, third):
    """position times the sum of three parts, in [-0.5, 0.5]: arrays that broadcast, in float32."""
    high = jnp.floor(position / BITS)
    low = position - high * BITS
    total = low * third
    for part in (first, second):
        total = total + fraction(low * part) + fraction(fraction(high * part) * BITS)
    return fraction(total + fraction(high * (third * BITS)))


def sine(turn):
    """sin(2 pi turn) of turns in [-0.5, 0.75], by its series on a quarter of a turn: within 1e-6, for kernels."""
    turn = fraction(turn)
    turn = jnp.where(turn > 0.25, 0.5 - turn, jnp.where(turn < -0.25, -0.5 - turn, turn))
    square, total = turn * turn, jnp.full_like(turn, SINE[-1])
    for term in SINE[-2::-1]:
        total = total * square + term
    return total * turn


def fraction(x):
    """In [-0.5, 0.5), off by whole turns."""
    return x - jnp.floor(x + 0.5)
