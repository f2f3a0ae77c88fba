"""K-means by Lloyd's algorithm, from centres that k-means++ draws (Arthur and Vassilvitskii 2007): the first evenly, each other
one with a chance in proportion to the squared distance from the nearest of those before it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

AT_ONCE = 1024  # points whose distances to all centres exist at once


def directions(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """Of length 1; zeros stay."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def kmeans(
    x: Float[Array, "N D"], there: Bool[Array, "N"], count: Int[Array, ""], key: Array, *, most: int, rounds: int
) -> Int[Array, "N"]:
    """The centre, below `count`, that each point is nearest to, after at most `rounds` moves of the centres; -1 for points that
    are not there. most: that `count` may be. A centre that loses all its points stays where it was."""
    x = jnp.where(there[:, None], x.astype(jnp.float32), 0)
    real = jnp.arange(most) < count

    def nearest(centres):
        half = jnp.where(real, jnp.square(centres).sum(axis=1) / 2, jnp.inf)
        of = lambda point: jnp.argmin(half - jnp.matmul(centres, point, precision="highest")).astype(jnp.int32)
        return jnp.where(there, jax.lax.map(of, x, batch_size=min(AT_ONCE, len(x))), -1)

    def moved(centres, labels):
        place = jnp.where(there, labels, most)
        size = jnp.zeros(most).at[place].add(1.0, mode="drop")
        total = jnp.zeros_like(centres).at[place].add(x, mode="drop")
        return jnp.where(size[:, None] > 0, total / jnp.maximum(size, 1)[:, None], centres)

    def turn(state):
        n, centres, labels, _ = state
        centres = moved(centres, labels)
        new = nearest(centres)
        return n + 1, centres, new, (new != labels).any()

    centres = _drawn(x, there, count, key, most)
    start = (jnp.int32(0), centres, nearest(centres), jnp.bool_(True))
    return jax.lax.while_loop(lambda state: state[3] & (state[0] < rounds), turn, start)[2]


def _drawn(x, there, count, key, most: int) -> Float[Array, "most D"]:
    draws = jax.random.uniform(key, (most,))

    def one(n, state):
        centres, far = state
        weight = jnp.where(far.sum() > 0, far, there.astype(jnp.float32))  # every point is a centre already
        edges = jnp.cumsum(weight)
        place = jnp.searchsorted(edges, jnp.minimum(draws[n] * edges[-1], jnp.nextafter(edges[-1], 0.0)), side="right")
        new = x[jnp.minimum(place, len(x) - 1)]
        far = jnp.minimum(far, jnp.where(there, jnp.square(x - new).sum(axis=1), 0))
        return centres.at[n].set(new), far

    far = jnp.where(there, jnp.float32(jnp.finfo(jnp.float32).max / (2 * len(x))), 0)
    return jax.lax.fori_loop(0, count, one, (jnp.zeros((most, x.shape[1])), far))[0]
