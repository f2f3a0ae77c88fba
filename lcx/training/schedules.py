"""Learning-rate schedules: pure functions of the 0-based update number, built for a run of `steps` updates with optax.

All warm up linearly: update n < warmup uses peak * (n + 1) / warmup, so that the first update is not lost. What follows
runs over the remaining steps - warmup updates.
"""

import abc
import dataclasses

import optax

from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(Spec, abc.ABC):
    """Base of every schedule. peak: the largest learning rate. warmup: updates of linear growth up to it."""

    peak: float
    warmup: int = 0

    def validate(self):
        self.check(self.peak > 0, "peak", "a positive learning rate")
        self.check(self.warmup >= 0, "warmup", "0 or more updates")

    def build(self, steps: int) -> optax.Schedule:
        """The learning rate of each update of a run of `steps` updates. Raises SpecError if the phases do not fit in it."""
        if self.warmup >= steps:
            self.fail("warmup", self.warmup, f"fewer than the {steps} steps of the run")
        after = self.after_warmup(steps - self.warmup)
        if self.warmup == 0:
            return after
        rise = optax.linear_schedule(self.peak / self.warmup, self.peak, max(self.warmup - 1, 1))
        return optax.join_schedules([rise, after], [self.warmup])

    @abc.abstractmethod
    def after_warmup(self, steps: int) -> optax.Schedule:
        """The learning rate of the `steps` updates that follow the warm-up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak to the end."""

    def after_warmup(self, steps):
        return optax.constant_schedule(self.peak)

    @classmethod
    def examples(cls):
        return (cls(peak=1e-3), cls(peak=1e-3, warmup=3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Final(Schedule):
    """final: the share of the peak that is reached after the last update."""

    final: float = 0.1

    def validate(self):
        super().validate()
        self.check(0 <= self.final <= 1, "final", "a share of the peak from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(_Final):
    """A straight line from the peak to final * peak."""

    def after_warmup(self, steps):
        return optax.linear_schedule(self.peak, self.final * self.peak, steps)

    @classmethod
    def examples(cls):
        return (cls(peak=1e-3, final=0.0), cls(peak=1e-3, warmup=2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(_Final):
    """Half a cosine from the peak to final * peak (SGDR, 2017)."""

    def after_warmup(self, steps):
        return optax.cosine_decay_schedule(self.peak, steps, alpha=self.final)

    @classmethod
    def examples(cls):
        return (cls(peak=1e-3), cls(peak=1e-3, warmup=2, final=0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSD(_Final):
    """Warm-up, stable, decay (MiniCPM, 2024): the peak, then a straight line to final * peak over the last `decay` updates."""

    decay: int

    def validate(self):
        super().validate()
        self.check(self.decay >= 1, "decay", "at least 1 update")

    def after_warmup(self, steps):
        if self.decay > steps:
            self.fail("decay", self.decay, f"at most the {steps} updates after the warm-up")
        fall = optax.linear_schedule(self.peak, self.final * self.peak, self.decay)
        return optax.join_schedules([optax.constant_schedule(self.peak), fall], [steps - self.decay])

    @classmethod
    def examples(cls):
        return (cls(peak=1e-3, decay=4), cls(peak=1e-3, warmup=2, decay=3, final=0.0))
