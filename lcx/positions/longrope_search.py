"""LongRoPE's search (Ding et al. 2024) for the factor of every channel: an evolution of lists that never fall.

A list is as good as the perplexity that it gives. The best of a population are the parents of mutants and of crossings.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

GRID = 0.01  # factors are multiples of it
CHANGED, COPIED, TRIES = 0.3, 0.5, 20

Factors = tuple[float, ...]


class Found(NamedTuple):
    """The best list, its loss, and the loss of the best after every generation, from that of the start on."""

    factors: Factors
    loss: float
    history: list[float]


def search(
    loss: Callable[[Factors], float],
    start: Factors,
    *,
    most: float,
    population: int = 64,
    iterations: int = 40,
    parents: int = 32,
    mutants: int = 16,
    crossings: int = 16,
    seed: int = 0,
) -> Found:
    """Lists between 1 and `most`, from `start`: in the paper the harmonic YaRN's, up to 1 more than the extension.

    loss: perplexity at the target length, smaller is better; asked once a list. The published numbers are the defaults.
    Raises ValueError if `start` falls, leaves the range, or the numbers leave no place for parents.
    """
    start = tuple(round(round(x / GRID) * GRID, 2) for x in start)
    if any(b < a for a, b in itertools.pairwise(start)) or start[0] < 1 or start[-1] > most:
        raise ValueError(f"search: start = {start}: expected factors that never fall, from 1 to most = {most}")
    if not 1 <= parents <= population or iterations < 1 or mutants + crossings < 1:
        raise ValueError(f"search: {parents} parents of {population}, {mutants} mutants, {crossings} crossings: expected some")
    rng, losses = np.random.default_rng(seed), {start: loss(start)}

    def add(made: Factors) -> None:
        if made not in losses:
            losses[made] = loss(made)

    for _ in range(population - 1):
        add(_mutant(start, most, rng, losses))
    history = [losses[start]]
    for _ in range(iterations):
        best = sorted(losses, key=losses.__getitem__)[:parents]
        history.append(losses[best[0]])
        for _ in range(mutants):
            add(_mutant(best[rng.integers(len(best))], most, rng, losses))
        for _ in range(crossings):
            first, second = (best[n] for n in rng.integers(len(best), size=2))
            add(_crossing(first, second, most, rng, losses))
    best = min(losses, key=losses.__getitem__)
    return Found(best, losses[best], [*history, losses[best]])


def _mutant(parent: Factors, most: float, rng: np.random.Generator, known: dict[Factors, float]) -> Factors:
    """Some factors drawn anew between their neighbours; the parent itself if nothing new is found in so many tries."""
    for _ in range(TRIES):
        made = list(parent)
        for n in np.flatnonzero(rng.random(len(made)) < CHANGED):
            low = made[n - 1] if n else 1.0
            high = made[n + 1] if n + 1 < len(made) else most
            made[n] = round(low + GRID * int(rng.integers(0, round((high - low) / GRID), endpoint=True)), 2)
        if tuple(made) not in known:
            return tuple(made)
    return parent


def _crossing(first: Factors, second: Factors, most: float, rng: np.random.Generator, known: dict[Factors, float]) -> Factors:
    """The first with some factors of the second, if that never falls and is new; else a mutant of the first."""
    for _ in range(TRIES):
        taken = (rng.random(len(first)) < CHANGED) & (rng.random(len(first)) < COPIED)
        made = tuple(b if take else a for a, b, take in zip(first, second, taken, strict=True))
        if made not in known and all(b >= a for a, b in itertools.pairwise(made)):
            return made
    return _mutant(first, most, rng, known)
