"""Training speed beside Hugging Face's Llama on torch, same shapes, on this machine's CPU.

    python -m lcx.training.bench            all shapes, both sides in turn, medians and ratios as a markdown table
    python -m lcx.training.bench lcx 0      one side of one shape, a line of JSON (what the above runs in fresh processes)

Both sides: float32, the same parameter count, AdamW with clipping, random tokens, loss over every position. A side's process
reports its time from start of the program's imports to the end of the first step, its step times and its peak memory.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from lcx.side_by_side import in_turn, timed


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    heads: int
    hidden: int
    vocab: int
    rows: int
    length: int

    @property
    def name(self) -> str:
        return f"width {self.width} x {self.layers}, {self.rows} x {self.length}"


SHAPES = (
    Shape(width=128, layers=2, heads=4, hidden=384, vocab=264, rows=8, length=512),
    Shape(width=128, layers=2, heads=4, hidden=384, vocab=264, rows=2, length=2048),
    Shape(width=256, layers=4, heads=4, hidden=768, vocab=264, rows=4, length=512),
    Shape(width=512, layers=8, heads=8, hidden=1408, vocab=2048, rows=2, length=512),
)
SIDES = ("lcx", "torch")


def lcx_step(shape: Shape) -> tuple[Callable[[], float], int]:
    """(one training step that returns its loss, parameter count) of this project."""
    import jax

    from lcx.channels.glu import GLU
    from lcx.data.rows import Row, collate
    from lcx.mixers.attention import Attention
    from lcx.models.decoder import Decoder
    from lcx.models.layer import Layer
    from lcx.objectives.language_modeling import LanguageModeling
    from lcx.parallel.mesh import MeshSpec
    from lcx.training.optimizer import AdamW
    from lcx.training.placement import place_batch
    from lcx.training.schedules import Constant
    from lcx.training.step import TrainStep

    mixer = Attention(heads=shape.heads, kv_heads=shape.heads, head_dim=shape.width // shape.heads)
    layer = Layer(mixer=mixer, channel=GLU(hidden=shape.hidden))
    model = Decoder(vocab=shape.vocab, width=shape.width, pattern=(layer,), periods=shape.layers, unroll="all")
    step = TrainStep(
        model=model,
        objective=LanguageModeling(),
        optimizer=AdamW(learning_rate=Constant(peak=1e-3)),
        mesh=MeshSpec().build(),
        steps=100,
    )
    tokens = _tokens(shape)
    ones = np.ones((shape.rows, shape.length), np.int32)
    rows = [Row(t[:-1], t[1:], o.astype(np.float32), o) for t, o in zip(tokens, ones, strict=True)]
    batch = place_batch(collate(rows), model.rules, step.mesh, hosts=1)
    compiled, state = step.compile(batch), step.init()
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def once() -> float:
        nonlocal state
        state, results = compiled(state, batch)
        return float(results["sums"]["total_sum"] / results["sums"]["weight"])

    return once, count


def torch_step(shape: Shape) -> tuple[Callable[[], float], int]:
    """The same of `transformers.LlamaForCausalLM` with torch's fused attention and fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    tokens = torch.from_numpy(_tokens(shape)[:, :-1].astype(np.int64))

    def once() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return once, sum(p.numel() for p in model.parameters())


def side(name: str, shape: Shape, begin: float) -> dict:
    """Runs one side in this process."""
    once, count = {"lcx": lcx_step, "torch": torch_step}[name](shape)
    return {"parameters": count} | timed(once, begin)


def compare() -> str:
    """The table: both sides of every shape in fresh processes, in turn, medians over all rounds."""
    lines = [
        "| shape | parameters | lcx tokens/s | torch tokens/s | ratio | first step, s (lcx, torch) | peak, MB (lcx, torch) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for number, shape in enumerate(SHAPES):
        runs = in_turn("lcx.training.bench", SIDES, number)
        speed = {
            name: shape.rows * shape.length / statistics.median(s for run in found for s in run["seconds"])
            for name, found in runs.items()
        }
        middle = {
            (name, key): statistics.median(run[key] for run in found)
            for name, found in runs.items()
            for key in ("first", "peak")
        }
        lines.append(
            f"| {shape.name} | {runs['lcx'][0]['parameters']:,} | {speed['lcx']:,.0f} | {speed['torch']:,.0f} "
            f"| {speed['lcx'] / speed['torch']:.2f} | {middle['lcx', 'first']:.1f}, {middle['torch', 'first']:.1f} "
            f"| {middle['lcx', 'peak'] / 1e6:.0f}, {middle['torch', 'peak'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def _tokens(shape: Shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, shape.vocab, (shape.rows, shape.length + 1)).astype(np.int32)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(side(sys.argv[1], SHAPES[int(sys.argv[2])], time.perf_counter())))
    else:
        print(compare())
