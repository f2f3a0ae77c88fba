"""How many tokens a layer's queries spread over as their documents grow: Entropy-ABF's analysis (Zhang et al. 2024).

    python -m lcx.evaluation.attention_entropy

H = -sum_j p_j ln p_j of a query that sees n tokens, in nats, the mean over documents and heads: ln n where it looks at all
alike, 0 where at one. The paper finds that H rises with n in the first two layers alone, and sharpens the queries of all others
(`LogN.skip_layers`); its code takes the entropy of one head's attention averaged over documents instead, which is larger.

With p the softmax of scores s, H = ln sum_j exp(s_j) - sum_j p_j s_j, and the sum is the query times the average of its keys:
attention whose values are the keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcx.attention.attend import attend
from lcx.attention.mask import Mask
from lcx.batch import Batch, TokenInfo, causal_info, lengths_of
from lcx.data.sources import StandardLibrary
from lcx.evaluation.raw_heads import raw_heads
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.models.decoder import DecoderModel
from lcx.positions.rotate import rotate
from lcx.training.checkpoint import load_model
from lcx.training.run_folder import read_config
from lcx.training.shipped import run_folder

MODELS, DOCUMENTS, FAR, ROWS = ("copier", "reader"), 128, 4, 8  # FAR: times the trained length; ROWS: read at a time


def entropy(
    q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], info: TokenInfo, *, mask: Mask, scale: float
) -> Float[Array, "B T H"]:
    """H of each query, 0 on padding."""
    averaged, lse = attend(q, k, k, info, info, mask=mask, scale=scale)
    found = lse - scale * (q * averaged).sum(axis=-1)
    return jnp.where((jnp.asarray(info.segments) != 0)[..., None], found, 0.0)


def entropies(model: DecoderModel, batch: Batch) -> Float[Array, "L T"]:
    """H of each layer at each place, the mean over heads and rows, which hold one document each, all of one length.

    Raises ValueError if a layer is not read by `raw_heads`, or has scores that are more than queries times keys.
    """
    return jnp.stack([_of_layer(model, batch, layer) for layer in range(model.spec.depth)])


@functools.partial(jax.jit, static_argnames="layer")
def _of_layer(model: DecoderModel, batch: Batch, layer: int) -> Float[Array, "T"]:
    (q, k), info = raw_heads(model, batch, layer), batch.info
    mixer = model.slots[0].mixer
    spec, frequencies = mixer.spec, mixer.frequencies(q.shape[1])
    more = {"softcap": spec.softcap, "distances": spec.distances, "distance_bias": spec.distance_bias}
    present = [name for name, part in more.items() if part is not None]
    present += ["learned sinks"] * (spec.sinks == "learned") + ["persistent keys"] * (spec.persistent > 0)
    if present:
        raise ValueError(f"attention_entropy: {present[0]}: expected scores that are queries times keys alone")
    if model.rope is not None:
        raise ValueError("attention_entropy: a learned rope: expected one whose frequencies are known")
    if spec.query_scale is not None:
        q = q * spec.query_scale.scale(info.index, jnp.int32(layer), lengths_of(info))[..., None, None]
    if frequencies is not None:
        q, k = (rotate(x, info.positions, frequencies, lengths_of(info), side) for x, side in ((q, "query"), (k, "key")))
    return entropy(q, k, info, mask=spec.mask, scale=spec.scale or q.shape[-1] ** -0.5).mean(axis=(0, 2))


def slope(found: Float[np.ndarray, "*n T"], first: int, last: int) -> Float[np.ndarray, "*n"]:
    """What H grows by as ln n grows by 1, by least squares over queries that see from `first` to `last` tokens."""
    n = np.log(np.arange(first, last + 1))
    return np.asarray(found)[..., first - 1 : last] @ (n - n.mean()) / np.square(n - n.mean()).sum()


def main() -> None:
    for name in MODELS:
        folder = run_folder(name)
        experiment = read_config(folder)
        model, trained = load_model(folder, experiment.model), experiment.data.length
        rows = Perplexity(source=StandardLibrary(split="heldout"), windows=DOCUMENTS).inputs(
            experiment.data.tokenizer, FAR * trained
        )
        tokens = np.asarray(rows, np.int32).reshape(-1, ROWS, FAR * trained)
        info = causal_info(np.ones_like(tokens[0]))
        found = np.mean([np.asarray(entropies(model, Batch(tokens=part, info=info))) for part in tokens], axis=0)
        places = [trained // 8 * 2**n for n in range(4)] + [2 * trained, FAR * trained]
        inside, beyond = slope(found, places[0], trained), slope(found, trained, FAR * trained)
        heads = [f"n = {n:,}" for n in places] + [f"slope to {trained:,}", "slope beyond"]
        print(f"| {name}, layer | {' | '.join(heads)} |\n| --- |" + " ---: |" * len(heads))
        for layer, values in enumerate(found):
            cells = [*(values[n - 1] for n in places), inside[layer], beyond[layer]]
            print(f"| {layer} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)
        print()


if __name__ == "__main__":
    main()
