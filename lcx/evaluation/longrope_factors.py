"""LongRoPE's search on a trained model (Ding et al. 2024): the factors with the least perplexity of long training text.

    python -m lcx.evaluation.longrope_factors copier 4       a shipped model or a run folder, times its trained length

From the harmonic factors of YaRN; then as many first positions are kept as help the factors found. The paper searches on five
samples of PG-19, with populations of 64 for 40 iterations; for a model of another size, change the constants below.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np

from lcx.data.sources import StandardLibrary
from lcx.data.tokenizers import Tokenizer
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.inference.language_model import LocalModel
from lcx.models.decoder import DecoderModel, rebuild
from lcx.positions.longrope import LongRoPE
from lcx.positions.longrope_search import Factors, search
from lcx.positions.rope import Rope
from lcx.positions.yarn import YaRN
from lcx.spec import SpecError, edit
from lcx.support_rules.walk import reads_rope
from lcx.training.checkpoint import load_model
from lcx.training.run_folder import read_config
from lcx.training.shipped import run_folder

WINDOWS = 16
EVOLUTION = {"population": 16, "iterations": 10, "parents": 8, "mutants": 4, "crossings": 4}
KEPT = (0, 1, 2, 4, 8, 16, 32, 64)  # of the first positions


def harmonic(rope: Rope, head_dim: int, *, trained: int, scale: float) -> Factors:
    """What YaRN's harmonic ramp divides each pair's frequency by: where the search begins."""
    ramp = YaRN(base=rope.base, rotary=rope.rotary, factor=scale, original_length=trained, ramp="harmonic")
    rotary_dim = rope.rotated(head_dim)
    return tuple(map(float, rope.inverse_frequencies(rotary_dim, 0) / ramp.inverse_frequencies(rotary_dim, 0)))


def longrope(rope: Rope, factors: Factors, *, trained: int, scale: float, kept: int = 0) -> LongRoPE:
    """The rope of a model trained with plain RoPE, with these factors beyond its window."""
    shared = {"base": rope.base, "rotary": rope.rotary, "pairing": rope.pairing}
    short = (1.0,) * len(factors)
    return LongRoPE(original_length=trained, short=short, long=factors, factor=scale, kept_positions=kept, **shared)


def perplexity(model: DecoderModel, tokenizer: Tokenizer, rows: Sequence[Sequence[int]], rope: LongRoPE) -> float:
    """Of all tokens of the rows but their first, under another rope."""
    read = LocalModel(rebuild(model, edit(model.spec, "rope", rope)), tokenizer, window=max(map(len, rows)))
    scored = read.logprobs(rows, [1] * len(rows))
    return math.exp(-np.concatenate([row.logprobs for row in scored]).astype(np.float64).mean())


def main(name: str, scale: str) -> None:
    folder, times = run_folder(name), float(scale)
    experiment = read_config(folder)
    trained, tokenizer, rope = experiment.data.length, experiment.data.tokenizer, experiment.model.rope
    if type(rope) is not Rope or rope.sections or not reads_rope(experiment.model):
        raise SpecError(f"longrope_factors: {name} has the rope {rope}: expected Rope of one axis that its layers read")
    model, length = load_model(folder, experiment.model), round(times * trained)
    rows = Perplexity(source=StandardLibrary(split="train"), windows=WINDOWS).inputs(tokenizer, length)
    start = harmonic(rope, experiment.model.pattern[0].mixer.head_dim, trained=trained, scale=times)

    def loss(factors: Factors, kept: int = 0) -> float:
        return perplexity(model, tokenizer, rows, longrope(rope, factors, trained=trained, scale=times, kept=kept))

    found = search(loss, start, most=1 + times, **EVOLUTION)
    print(f"{name} at {length:,} tokens, perplexity of {WINDOWS} windows of training text")
    print(f"after each generation: {', '.join(f'{value:.3f}' for value in found.history)}")
    print(f"harmonic: {tuple(round(x, 2) for x in start)}\nfound: {found.factors}")
    print("\n| first positions kept | perplexity |\n| ---: | ---: |")
    for kept in KEPT:
        print(f"| {kept} | {loss(found.factors, kept):.3f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdigit() or int(sys.argv[2]) < 2:
        sys.exit(f"{__doc__}\nexpected a model, and how many times its length, 2 or more: got {sys.argv[1:]}")
    try:
        main(*sys.argv[1:])
    except SpecError as error:
        sys.exit(f"longrope_factors: {error}")
