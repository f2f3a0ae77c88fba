"""Which pairs of channels carry a model's attention: what DPE (Lu et al. 2025) regroups, the others keep their positions.

    python -m lcx.evaluation.key_dimensions copier 8 runs/dimensions

A pair counts by the mean over tokens of the length of a query's pair times that of the same token's key's, before rotation.
The command chooses so many pairs of every head of a trained model, from 10 samples of training text at its trained length, a
half and a quarter of it (as published for Llama 3). It writes chosen.npy and, to compare, as many at random: random-0.npy, ...
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from lcx.batch import Batch, causal_info
from lcx.data.sources import StandardLibrary
from lcx.evaluation.raw_heads import raw_heads
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.models.decoder import DecoderModel
from lcx.spec import SpecError
from lcx.training.checkpoint import load_model
from lcx.training.run_folder import read_config
from lcx.training.shipped import run_folder

SAMPLES, RANDOM = 10, 3


def key_dimensions(model: DecoderModel, batches: Iterable[Batch], count: int) -> Bool[np.ndarray, "L H C"]:
    """The `count` pairs of each layer and query head that count most, over batches of text, for `DimensionGroups.dimensions`.

    Raises ValueError if heads have not as many pairs, or a layer is not read by `raw_heads`.
    """
    total = sum(np.asarray(_lengths(model, batch)) for batch in batches)
    if not 1 <= count <= total.shape[-1]:
        raise ValueError(f"key_dimensions: count = {count}: expected from 1 to the {total.shape[-1]} pairs of a head")
    rank = np.argsort(np.argsort(-total, axis=-1, kind="stable"), axis=-1)
    return rank < count


@jax.jit
def _lengths(model: DecoderModel, batch: Batch):
    """[L, H, C], the mean over tokens."""
    real = (jnp.asarray(batch.info.segments) != 0)[..., None, None]

    def of_layer(layer):
        q, k = raw_heads(model, batch, layer)
        pair = lambda x: jnp.hypot(*jnp.split(x, 2, axis=-1))
        product = pair(q) * jnp.repeat(pair(k), q.shape[2] // k.shape[2], axis=2)
        return jnp.where(real, product, 0).sum(axis=(0, 1)) / real.sum()

    return jnp.stack([of_layer(layer) for layer in range(model.spec.depth)])


def random_dimensions(shape: tuple[int, int, int], count: int, seed: int) -> Bool[np.ndarray, "L H C"]:
    """As many pairs of every layer and head, at random: what a choice must beat."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.broadcast_to(np.arange(shape[-1]) < count, shape), axis=-1)


def main(name: str, count: str, target: str) -> None:
    folder = run_folder(name)
    experiment = read_config(folder)
    model, trained = load_model(folder, experiment.model), experiment.data.length
    text = Perplexity(source=StandardLibrary(split="train"), windows=SAMPLES)
    rows = [np.asarray(text.inputs(experiment.data.tokenizer, trained // n), np.int32) for n in (4, 2, 1)]
    chosen = key_dimensions(model, [Batch(tokens=part, info=causal_info(np.ones_like(part))) for part in rows], int(count))
    Path(target).mkdir(parents=True, exist_ok=True)
    np.save(Path(target) / "chosen.npy", chosen)
    for seed in range(RANDOM):
        np.save(Path(target) / f"random-{seed}.npy", random_dimensions(chosen.shape, int(count), seed))
    print("how many heads chose each pair, from the fastest\n| layer | pairs |\n| ---: | --- |")
    for layer, heads in enumerate(chosen.sum(axis=1)):
        print(f"| {layer} | {' '.join(map(str, heads))} |")


if __name__ == "__main__":
    if len(sys.argv) != 4 or not sys.argv[2].isdigit():
        sys.exit(f"{__doc__}\nexpected a model, a number of pairs and a folder: got {sys.argv[1:]}")
    try:
        main(*sys.argv[1:])
    except SpecError as error:
        sys.exit(f"key_dimensions: {error}")
