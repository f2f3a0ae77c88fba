"""What a frequency rule does to a trained model: how far it can read, and how new the angles are that it sees.

A pair that turned in full within the trained window has seen every angle; a slower one has not, and meets new angles once its
frequency times the place exceeds what it reached while training (Liu et al. 2023). A pair is measured against plain RoPE of the
same base, which is what was trained.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lcx.positions.dprope import disturbance
from lcx.positions.frequencies import FrequencyRule, geometric

BINS = 360  # of a turn, for distributions of angles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
    """trained: the window. turning: pairs that turn in full within it. effective: tokens up to which no slower pair meets a new
    angle; None if none turns at all beyond. scale: what logits are multiplied by. spread: distances that training with the rule
    reached, if that is known."""

    trained: int
    turning: int
    effective: int | None
    scale: float
    spread: int | None = None

    @property
    def critical_dimension(self) -> int:
        """Channels, two a pair."""
        return 2 * self.turning


def trained_window(rule: FrequencyRule, default: int) -> int:
    """The one that a rule names, else `default`."""
    return getattr(rule, "original_length", None) or default


def reach(rule: FrequencyRule, head_dim: int, length: int, trained: int | None = None, spread: int | None = None) -> Reach:
    """Of a rule in rows of `length` tokens. trained: the window if the rule names none, by default the row. spread: training
    with the rule has shown all distances below it, by skipped positions."""
    trained = trained_window(rule, trained or length)
    rates, before = _rates(rule, head_dim, length)
    seen = before * trained if spread is None else np.maximum(before * trained, rates * spread)  # angles
    slow = seen < 2 * math.pi
    moving = slow & (rates > 0)
    most = (seen[moving] / rates[moving]).min() if moving.any() else math.inf
    factor = rule.frequencies(head_dim, length).at(length).factor
    return Reach(
        trained=trained,
        turning=int((~slow).sum()),
        effective=None if math.isinf(most) else int(most * (1 + 1e-9)),
        scale=float(factor) ** 2,
        spread=spread,
    )


def disturbances(rule: FrequencyRule, head_dim: int, trained: int, length: int) -> Float[np.ndarray, "C"]:
    """DPRoPE's measure (2024): the divergence of each pair's angles over `length` tokens from those over the trained window."""
    rates, before = _rates(rule, head_dim, length)
    return disturbance(tuple(rates), tuple(before), trained, length, BINS, "new_to_old")


def plot(rules: Mapping[str, FrequencyRule], head_dim: int, trained: int, length: int, path: Path | str) -> None:
    """Writes a PNG: the wavelength of each pair of channels under each rule, and how new its angles are at `length`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    waves, angles = figure.subplots(1, 2)
    for name, rule in rules.items():
        rates, _ = _rates(rule, head_dim, length)
        pairs = np.arange(len(rates))
        waves.plot(pairs[rates > 0], 2 * np.pi / rates[rates > 0], marker=".", label=name)
        angles.plot(pairs, np.maximum(disturbances(rule, head_dim, trained, length), 1e-6), marker=".", label=name)
    for n, style in ((trained, "--"), (length, ":")):
        waves.axhline(n, color="gray", linestyle=style, label=f"{n} tokens")
    waves.set(yscale="log", xlabel="pair of channels", ylabel="tokens a turn", title="wavelengths")
    angles.set(yscale="log", xlabel="pair of channels", ylabel="nats", title=f"disturbance of angles at {length} tokens")
    waves.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _rates(rule: FrequencyRule, head_dim: int, length: int) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
    """Radians a token under the rule, and as trained."""
    rates = rule.frequencies(head_dim, length).at(length).inv_freq
    return rates, geometric(rule.base, 2 * len(rates))
