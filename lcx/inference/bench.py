"""Prefill, decoding and loading of a Llama beside `transformers` on torch, this machine's CPU, float32, two threads.

    python -m lcx.inference.bench              all cases, both sides in turn, medians and ratios as a Markdown table
    python -m lcx.inference.bench lcx 0        one side of one case, a line of JSON (what the above runs in fresh processes)

Both read one folder of random weights, 4 layers of width 256, 8 heads, 4 key heads. Decoding is greedy, NEW tokens each time,
behind a prompt that is cached; `transformers` decodes as its `generate` does, without its bookkeeping. Loading is of a folder
of 2 GB, 8 layers of width 2,048: time and the peak of memory beyond imports, as a share of the folder.
"""

import dataclasses
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lcx.side_by_side import in_turn, timed

SIDES, NEW = ("lcx", "transformers"), 32
FOLDERS = Path(os.environ.get("LCX_BENCH_FOLDER", tempfile.gettempdir())) / "lcx-bench"
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1024}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16, "vocab_size": 32000}


@dataclasses.dataclass(frozen=True)
class Case:
    """kind: what is measured, of a prompt of `length` tokens."""

    name: str
    kind: str
    length: int = 0


CASES = (
    Case("prefill of 2,048 tokens", "prefill", 2048),
    Case("decoding behind 2,048 tokens", "decode", 2048),
    Case("decoding behind 16,384 tokens", "decode", 16384),
    Case("loading 2 GB", "load"),
)


def folder(shape: dict) -> Path:
    """A checkpoint folder of that shape, made once."""
    path = FOLDERS / f"{shape['hidden_size']}"
    if not (path / "config.json").is_file():
        from safetensors.numpy import save_file

        from lcx.interop.families import family_of
        from lcx.interop.families.config import Config

        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4, "dtype": "float32"}
        config |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **shape}
        family = family_of(Config(config))
        rng = np.random.default_rng(0)
        draw = lambda t: rng.standard_normal(t.shape, np.float32) / 16 if len(t.shape) > 1 else np.ones(t.shape, np.float32)
        tensors = family.tensors(family.decoder(Config(config)))
        path.mkdir(parents=True, exist_ok=True)
        save_file({tensor.name: draw(tensor) for tensor in tensors}, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
    return path


def prompt(length: int) -> list[int]:
    return np.random.default_rng(1).integers(0, SMALL["vocab_size"], length).tolist()


def of_lcx(case: Case) -> Callable[[], float]:
    import jax
    import jax.numpy as jnp

    from lcx.inference.decoding import Asked, decode, keys_of, nothing_decoded, stop_rows
    from lcx.inference.reading import prefill
    from lcx.inference.sampling import Sampling, sampling_rows
    from lcx.interop.folder import Folder
    from lcx.interop.hf import read_decoder
    from lcx.spec import edit
    from lcx.training.checkpoint import load_model

    path = folder(LARGE if case.kind == "load" else SMALL)
    spec = edit(read_decoder(Folder(path))[0], "unroll", "all")
    if case.kind == "load":
        return lambda: float(jax.block_until_ready(load_model(path, spec)).embedding[0, 0])
    model, ids = load_model(path, spec), prompt(case.length)
    if case.kind == "prefill":
        return lambda: float(jax.block_until_ready(prefill(model, [ids], 1, NEW, 2048)).last[0, 0])
    whole = jnp.full(1, NEW, jnp.int32)
    options = {"sampling": sampling_rows([Sampling()]), "stops": jnp.asarray(stop_rows([()]))}
    asked = Asked(key=keys_of([0]), made=0 * whole, limit=1000 * whole, **options)
    held = [prefill(model, [ids], 1, 8 * NEW, 2048)]  # for all measurements

    def once() -> float:
        made = decode(model, nothing_decoded(held.pop(), NEW, jnp.zeros(1, bool)), asked, jnp.int32(NEW))
        held.append(made.read)
        return float(made.logprobs.sum())

    return once


def of_transformers(case: Case) -> Callable[[], float]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(2)
    load = lambda shape: AutoModelForCausalLM.from_pretrained(folder(shape), dtype=torch.float32).eval()
    if case.kind == "load":
        return lambda: float(load(LARGE).model.embed_tokens.weight[0, 0].detach())
    model, ids = load(SMALL), torch.tensor([prompt(case.length)])
    read = lambda ids, cache: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if case.kind == "prefill":

        @torch.no_grad()
        def prefilled() -> float:
            return float(read(ids, DynamicCache()).logits[0, 0, 0])

        return prefilled
    cache = DynamicCache()
    with torch.no_grad():
        token = read(ids, cache).logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def once() -> float:
        nonlocal token
        for _ in range(NEW):
            token = read(token, cache).logits[:, -1:].argmax(-1)
        return float(token)

    return once


def compare() -> str:
    """The table: both sides of every case in fresh processes, in turn, medians over all rounds."""
    for shape in (SMALL, LARGE):
        folder(shape)
    size = sum(file.stat().st_size for file in folder(LARGE).glob("*.safetensors"))
    lines = ["| | lcx | transformers | times as fast |", "| --- | ---: | ---: | ---: |"]
    for number, case in enumerate(CASES):
        runs = in_turn("lcx.inference.bench", SIDES, number)
        seconds = [statistics.median(s for run in runs[side] for s in run["seconds"]) for side in SIDES]
        if case.kind == "load":
            cells = [f"{s:.1f} s" for s in seconds]
            peaks = [statistics.median(run["peak"] - run["base"] for run in runs[side]) / size for side in SIDES]
        else:
            tokens = case.length if case.kind == "prefill" else NEW
            cells = [f"{tokens / s:,.0f} tokens/s" for s in seconds]
        lines.append(f"| {case.name} | {cells[0]} | {cells[1]} | {seconds[1] / seconds[0]:.2f} |")
    lines.append(f"| its peak, of {size / 1e9:.1f} GB | {peaks[0]:.2f} | {peaks[1]:.2f} | |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if not argv:
        print(compare())
        return
    side, case = argv[0], CASES[int(argv[1])]
    if side == "lcx":
        import jax

        jax.block_until_ready(jax.numpy.zeros(1))
    else:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    base, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter()
    once = (of_lcx if side == "lcx" else of_transformers)(case)
    loading = case.kind == "load"
    if loading:
        start = time.perf_counter()
        once()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {"seconds": [time.perf_counter() - start], "peak": peak}
    else:
        found = timed(once, begin, warm=1, steps=5)
    print(json.dumps(found | {"base": base}))


if __name__ == "__main__":
    main(sys.argv[1:])
