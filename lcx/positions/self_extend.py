"""SelfExtend (Jin et al. 2024): near keys as trained, far ones at positions that a group of tokens shares."""

import dataclasses

from lcx.attention.mask import Ahead, Beyond, Window, Within
from lcx.positions.distance_plan import PlanReach, Region, RegionPlan, plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfExtend(RegionPlan):
    """Keys less than `window` tokens back keep their distance; of others, query i stands at i // group + window - window //
    group and key j at j // group. With L trained tokens, T fit if group >= (T - window) / (L - window).

    bidirectional: keys ahead as well, mirrored (LongEmbed, Zhu et al. 2024), for encoders.
    """

    group: int
    window: int
    bidirectional: bool = False

    def validate(self):
        self.check(self.group >= 1, "group", "at least 1")
        self.check(self.window >= 1, "window", "at least 1 token")
        self.check(self.window % self.group == 0, "window", f"a multiple of group = {self.group}")

    def regions(self, pairs):
        shift = self.window - self.window // self.group
        grouped = lambda index: plain(index // self.group)
        shifted = lambda index: plain(index // self.group + shift)
        far = Region(Beyond(size=self.window), shifted, grouped)
        if not self.bidirectional:
            return Region(Within(size=self.window), plain, plain), far
        return Region(Window(size=self.window), plain, plain), far, Region(Ahead(size=self.window), grouped, shifted)

    def reach(self, trained):
        far = grouped_reach(self.window, self.group, trained)
        return PlanReach(far, far)

    @property
    def both_ways(self):
        return self.bidirectional

    @classmethod
    def examples(cls):
        return (cls(group=2, window=4), cls(group=3, window=6, bidirectional=True))


def grouped_reach(window: int, group: int, trained: int) -> int:
    """Tokens of the longest document that stays within `trained` positions: (trained - window) group + window."""
    return max(trained, (trained - window) * group + window)
