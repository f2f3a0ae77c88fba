"""What a frequency rule does to a trained model: how far it can read, how new the angles are that it sees; and pictures.

A pair that turned in full within the trained window has seen every angle; a slower one has not, and meets new angles once its
frequency times the place exceeds what it reached while training (Liu et al. 2023). A pair is measured against plain RoPE of the
same base, which is what was trained.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lcx.positions.distance_plan import DistancePlan, RegionPlan
from lcx.positions.dprope import angle_histogram, disturbance
from lcx.positions.frequencies import FrequencyRule, geometric
from pallas_kernels.tile_attention.tokens import Tokens

BINS = 360  # of a turn, for distributions of angles
DRAWN = 72  # of them in a picture


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


def angles(
    rule: FrequencyRule, head_dim: int, trained: int, length: int, bins: int = BINS
) -> tuple[Float[np.ndarray, "C bins"], Float[np.ndarray, "C bins"]]:
    """The share of positions whose angle is in each bin of a turn, by pair: in the trained window, and under the rule in
    `length` tokens (DPRoPE's histograms)."""
    rates, before = _rates(rule, head_dim, length)
    return angle_histogram(before, trained, bins), angle_histogram(rates, length, bins)


def distances(plan: RegionPlan, pairs: int, length: int) -> Float[np.ndarray, "T P"]:
    """How far back the plan puts each key, the first one first, for the last of `length` tokens; a column for each way in which
    pairs of channels see it."""
    tokens = lambda index: Tokens(index, index, np.ones_like(index), np.zeros_like(index))
    last, every = np.full((1, 1), length - 1, np.int32), np.arange(length, dtype=np.int32)[None]
    found = np.full((length, 1), np.nan)
    for region in plan.regions(pairs):
        inside = np.asarray(region.mask.term(tokens(last), tokens(every)))[0]
        found = np.where(inside[:, None], np.asarray(region.query(last) - region.key(every))[0], found)
    return found


def plot(
    parts: Mapping[str, FrequencyRule | DistancePlan],
    head_dim: int,
    trained: int,
    length: int,
    path: Path | str,
    *,
    angles_of: Sequence[int] = (),
) -> None:
    """Writes a PNG. Of frequency rules: the wavelength of each pair of channels, and how new its angles are at `length`; of
    distance plans: where they put the keys of the last of `length` tokens. angles_of: pairs of channels whose distributions of
    angles are drawn too, in the trained window and at `length`.

    Raises ValueError for a plan that chooses keys by what they hold, and for pairs that some rule does not have.
    """
    from matplotlib.figure import Figure

    rules = {name: part for name, part in parts.items() if isinstance(part, FrequencyRule)}
    plans = {name: part for name, part in parts.items() if isinstance(part, RegionPlan)}
    for name, part in parts.items():
        if name not in rules | plans:
            expected = "expected a frequency rule or a plan of regions, which go by places alone"
            raise ValueError(f"plot: {name} = {part}: {expected}")
    pairs = min((rule.rotated(head_dim) // 2 for rule in rules.values()), default=0)
    if wrong := [pair for pair in angles_of if not 0 <= pair < pairs]:
        raise ValueError(f"plot: angles_of = {wrong[0]}: expected pairs of channels below {pairs}, which all rules have")
    given = head_dim, trained, length
    panels = [functools.partial(_draw_waves, rules, *given), functools.partial(_draw_newness, rules, *given)] if rules else []
    panels += [functools.partial(_draw_distances, plans, *given)] if plans else []
    panels += [functools.partial(_draw_angles, rules, *given, pair) for pair in angles_of]
    if not panels:
        raise ValueError("plot: parts = {}: expected a frequency rule or a plan of regions")
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, draw in zip(places, panels, strict=False):
        draw(place)
        place.legend(fontsize="small")
    for place in places[len(panels) :]:
        place.set_axis_off()
    figure.savefig(path, format="png", dpi=120)


def _draw_waves(rules, head_dim, trained, length, axes):
    for name, rule in rules.items():
        rates, _ = _rates(rule, head_dim, length)
        axes.plot(np.flatnonzero(rates > 0), 2 * np.pi / rates[rates > 0], marker=".", label=name)
    for n, style in ((trained, "--"), (length, ":")):
        axes.axhline(n, color="gray", linestyle=style, label=f"{n} tokens")
    axes.set(yscale="log", xlabel="pair of channels", ylabel="tokens a turn", title="wavelengths")


def _draw_newness(rules, head_dim, trained, length, axes):
    for name, rule in rules.items():
        axes.plot(np.maximum(disturbances(rule, head_dim, trained, length), 1e-6), marker=".", label=name)
    axes.set(yscale="log", xlabel="pair of channels", ylabel="nats", title=f"disturbance of angles at {length} tokens")


def _draw_distances(plans, head_dim, trained, length, axes):
    for name, plan in plans.items():
        found = distances(plan, head_dim // 2, length)[::-1]
        first, *others = axes.plot(found, label=name)
        for line in others:
            line.set(color=first.get_color(), label=None)
    axes.axhline(trained, color="gray", linestyle="--", label=f"{trained} tokens")
    axes.set(xlabel="tokens back", ylabel="positions back", title=f"keys of the last of {length} tokens")


def _draw_angles(rules, head_dim, trained, length, pair, axes):
    edges = np.linspace(0, 1, DRAWN + 1)
    for i, (name, rule) in enumerate(rules.items()):
        before, found = angles(rule, head_dim, trained, length, DRAWN)
        if i == 0:
            axes.stairs(before[pair], edges, fill=True, color="lightgray", label=f"trained, {trained} tokens")
        axes.stairs(found[pair], edges, label=f"{name}, {length} tokens")
    axes.set(xlabel="turn", ylabel="share of positions", title=f"angles of pair {pair}")


def _rates(rule: FrequencyRule, head_dim: int, length: int) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
    """Radians a token under the rule, and as trained."""
    rates = rule.frequencies(head_dim, length).at(length).inv_freq
    return rates, geometric(rule.base, 2 * len(rates))
