"""DPE, dimension-wise positional embeddings (Lu et al. 2025): SelfExtend with a group size for each range of channels."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lcx.attention.mask import Beyond, Within
from lcx.positions.distance_plan import PlanReach, Region, RegionPlan, plain
from lcx.positions.self_extend import grouped_reach


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimensionGroups(RegionPlan):
    """The rotated pairs in as many equal ranges as there are `groups`, fast to slow, each with its group size; 1 is unscaled.

    dimensions: a .npy file of which pairs of each layer and query head are grouped, bool [L, H, C]; the others keep their
    positions in the far region too. `lcx.evaluation.key_dimensions` makes it. None is all. It doubles the products of scores.

    Published for windows of 1024: Llama-3-8B (2, 8, 2, 8, 32, 32, 32, 4), Mistral-v0.2 (4, 16, 2, 16, 32, 16, 16, 2),
    Llama-3.1-8B (2, 32, 32, 2, 2, 2, 2, 1), Qwen2.5-7B (2, 16, 8, 8, 32, 8, 2, 4).
    """

    groups: tuple[int, ...]
    window: int
    dimensions: str | None = None

    def validate(self):
        self.check(len(self.groups) >= 1 and min(self.groups) >= 1, "groups", "sizes of at least 1")
        self.check(self.window >= 1, "window", "at least 1 token")
        for size in self.groups:
            self.check(self.window % size == 0, "window", f"a multiple of every group, such as {size}")

    def regions(self, pairs):
        self.check(pairs % len(self.groups) == 0, "groups", f"as many as divide the {pairs} rotated pairs")
        sizes = np.asarray(self.groups)
        shift = self.window - self.window // sizes
        key = lambda index: jnp.asarray(index[..., None] // sizes, jnp.float32)
        query = lambda index: jnp.asarray(index[..., None] // sizes + shift, jnp.float32)
        axes = np.repeat(np.arange(len(sizes)), pairs // len(sizes))
        return Region(Within(size=self.window), plain, plain), Region(Beyond(size=self.window), query, key, axes)

    def reach(self, trained):
        """The pairs of the smallest group, or those that are not chosen, reach least."""
        near, far = (grouped_reach(self.window, size, trained) for size in (min(self.groups), max(self.groups)))
        return PlanReach(trained if self.chooses else near, far)

    @property
    def chooses(self):
        return self.dimensions is not None

    def check_model(self, layers, heads, pairs):
        self.regions(pairs)
        if self.chooses and (found := self._held().shape) != (layers, heads, pairs):
            wanted = f"{layers} layers of {heads} heads of {pairs} pairs of channels, all of them rotated"
            self.fail("dimensions", self.dimensions, f"a choice for {wanted}, not one of shape {found}")

    def chosen(self, q, layer):
        if layer is None:
            self.fail("dimensions", self.dimensions, "None in a mixer outside of a model's layers")
        self.check_model(len(held := self._held()), q.shape[2], q.shape[3] // 2)
        mine = jnp.asarray(held)[layer]
        mine = jnp.concatenate([mine, mine], axis=-1)
        return jnp.concatenate([jnp.where(mine, q, 0), jnp.where(mine, 0, q)], axis=-1)

    def _held(self) -> np.ndarray:
        expected = "a .npy file of bool [layers, heads, pairs], from python -m lcx.evaluation.key_dimensions"
        try:
            held = np.load(self.dimensions)
        except (OSError, ValueError):
            self.fail("dimensions", self.dimensions, expected)
        if held.dtype != bool or held.ndim != 3:
            self.fail("dimensions", self.dimensions, f"{expected}, not {held.dtype} of {held.ndim} axes")
        return held

    @classmethod
    def examples(cls):
        return (cls(groups=(1, 2), window=4),)
