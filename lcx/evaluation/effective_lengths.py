"""How far each range of channels reads: the group sizes of DPE (Lu et al. 2025), searched one range at a time.

    python -m lcx.evaluation.effective_lengths copier 4

For a model trained at L, used at T, so many times as long: all ranges but one are grouped by 2 T / L, the one by T / l, for
l = T, T / 2 down to the window. The size that finds far copies best is its own, and l its effective length. Copies of 24
letters at least L tokens back, nats a byte, 24 examples; a window of L / 2, 8 ranges. At the end: the sizes together, and equal
sizes.
"""

import sys
from collections.abc import Callable, Iterator, Sequence

from lcx.data.copying import Copies
from lcx.data.sources import StandardLibrary
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.inference.language_model import LocalModel
from lcx.models.decoder import rebuild
from lcx.positions.dimension_groups import DimensionGroups
from lcx.spec import SpecError, edits
from lcx.training.checkpoint import load_model
from lcx.training.run_folder import read_config
from lcx.training.shipped import run_folder

RANGES = 8


def searched(
    loss: Callable[[tuple[int, ...]], float], ranges: int, sizes: Sequence[int], others: int
) -> Iterator[dict[int, float]]:
    """Of each range, the loss with each of `sizes` for it and `others` for all other ranges."""
    one = lambda n, size: tuple(size if m == n else others for m in range(ranges))
    for n in range(ranges):
        yield {size: loss(one(n, size)) for size in sizes}


def best(found: Sequence[dict[int, float]]) -> tuple[int, ...]:
    """The size of each range with the least loss, of equal ones the smallest, which reads farthest."""
    return tuple(min(sorted(losses), key=losses.__getitem__) for losses in found)


def main(name: str, times: str) -> None:
    folder, scale = run_folder(name), int(times)
    experiment = read_config(folder)
    model, trained = load_model(folder, experiment.model), experiment.data.length
    length, window = scale * trained, trained // 2
    task = Retrieval(name="copy", generator=Copies(haystack=StandardLibrary(split="heldout"), far=trained), examples_each=24)

    def loss(groups: tuple[int, ...]) -> float:
        slots = range(len(model.spec.pattern))
        plan = DimensionGroups(groups=groups, window=window)
        spec = edits(model.spec, [(f"pattern[{n}].mixer.distances", plan) for n in slots])
        rows = task.measure(LocalModel(rebuild(model, spec), experiment.data.tokenizer, window=length), length)
        (found,) = [row["value"] for row in rows if row["metric"] == "nll"]
        return found

    sizes = [1 << n for n in range((length // window).bit_length())]
    heads = " | ".join(f"l = {length // size:,}" for size in sizes)
    print(f"| range, from the fastest | {heads} |\n|{' ---: |' * (len(sizes) + 1)}")
    found = []
    for n, losses in enumerate(searched(loss, RANGES, sizes, 2 * scale)):
        found.append(losses)
        print(f"| {n} | {' | '.join(f'{losses[size]:.2f}' for size in sizes)} |", flush=True)
    chosen, equal = best(found), (2 * scale,) * RANGES
    print(f"\n| groups | nats a byte |\n| --- | ---: |\n| {chosen} | {loss(chosen):.2f} |\n| {equal} | {loss(equal):.2f} |")


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdigit() or int(sys.argv[2]) < 2:
        sys.exit(f"{__doc__}\nexpected a model, and how many times as long it is used: got {sys.argv[1:]}")
    try:
        main(*sys.argv[1:])
    except SpecError as error:
        sys.exit(f"effective_lengths: {error}")
