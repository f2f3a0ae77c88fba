"""Writes Activation Beacon's layout, window by window, and golden logits of a tiny model with beacons, of its authors' code.

    python tests/oracles/activation_beacon.py CHECKOUTS    # needs the `oracles` extra; writes golden/activation_beacon.npz

    FlagEmbedding  FlagOpen/FlagEmbedding 7ed43d67ec03fbe5c31c0992dbfa941fb1860549, research/Long_LLM/activation_beacon/src

The second version of the method. `Memory` is run with the cache of a layer whose keys are the numbers of tokens: raw token t is
t, the n-th beacon of the sequence 1000 + n, which shows what a window holds. Per window, W raw tokens, stride W, ratio a:

    keys       [sink | beacons of the windows before, in order | raw and beacons of this window]; all before RoPE
    positions  0.. over these keys as they stand (rotated anew each window), queries the last of them: beacons have one each;
               the exceptions are the appended layouts below, m being the number of keys before the window
    interleave a beacon behind every a raw tokens, one counter over the pieces that a window comes in, also in a last window
               that is not full; causal mask, so that raw tokens see the beacons before them
    append     W / a beacons behind a full window. Beacon i sees every key before the window and of the window, besides itself:
                 full-coverage    all raw tokens and the beacons before it; position m + W + i
                 step-expansion   raw tokens before (i + 1) a; position m + (i + 1) a, + i where it sees beacons before it
                 segmentation     raw tokens from i a to (i + 1) a; position m + a, + i where it sees beacons before it
               beacons before it: all if `attend_prev`, else none; raw tokens never see beacons of their own window
    memory     after a full window the keys of its beacons are kept and its raw keys dropped; a window that is not full keeps
               all (its raw tokens and, interleaved, its beacons) and goes on with the next piece
    sink s     keys of the first s raw tokens of the first window stay in front, and beacons stand for them as well
    ratio 0    the raw keys of the window are kept in place of beacons
    training   the window that ends the sequence has no beacons, also if it is full; labels are shifted before windows are cut,
               beacons have -100, and so has the first window unless it is interleaved with full coverage
    weights    beacon tokens have an embedding and q, k, v (any of q, k, v, o) projections of their own, for the rest the
               model's

    layout/<case>/{rows [N,Q], columns [N,K], positions [N,K], mask [N,Q,K], kept [N,M]}, and labels [N,Q] in training
        of N windows, -1 behind what one has less than the longest; kept: sink, memory and unfinished window after it; cases are
        below; `pieces` are calls with so many tokens each
    model/<case>/{tokens [1,T], logits [T,48], sizes [N]}, training: and loss; each raw token's logits, windows in a row
    model/weights/<name>    beacons' weights alone; the others are those of llama.npz (transformers' names there, the same here)
    model/<case>/{key,value}/<layer> [1,2,M,6]    beacons' keys, before RoPE, and values at the end

What the arrays avoid: interleaving with step-expansion masks columns 0 and 1 and not the beacons', as it takes a mask of
integers for places; a stride shorter than the window fails by a name that is not defined; a sink whose first window comes in
pieces takes its tokens from the last piece; windows in parallel. Segmentation fails where it asks for a row by a number for its
shape: here it gets the row.
The loss is the mean over labels of all windows together.
Written with torch 2.13.0 and transformers 5.24.
"""

import contextlib
import itertools
import logging
import math
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
from authors import definitions, in_float64, told_float64

MARK = 1000
LAYOUTS = {  # window, ratio(s), layout, coverage, attend_prev, sink, pieces, training
    "interleave": (8, [2], "interleave", "full-coverage", True, 0, (20,), False),
    "interleave_pieces": (8, [4], "interleave", "full-coverage", True, 0, (5, 7, 10), False),
    "interleave_training": (8, [4], "interleave", "full-coverage", True, 0, (24,), True),
    "append_full": (8, [4], "append", "full-coverage", True, 0, (20,), False),
    "append_step": (8, [4], "append", "step-expansion", True, 0, (20,), False),
    "append_step_apart": (8, [2], "append", "step-expansion", False, 0, (20,), False),
    "append_segment": (8, [4], "append", "segmentation", True, 0, (20,), False),
    "append_segment_apart": (8, [4], "append", "segmentation", False, 0, (20,), False),
    "append_pieces": (8, [4], "append", "step-expansion", False, 0, (5, 7, 10), False),
    "append_training": (8, [4], "append", "step-expansion", False, 0, (24,), True),
    "sink": (8, [4], "interleave", "full-coverage", True, 1, (20,), False),
    "ratios": (8, [4, 0, 2], "append", "step-expansion", False, 0, (28,), False),
}
MODELS = ("interleave", "interleave_pieces", "interleave_training", "append_step_apart", "append_training", "sink")


def config(torch, name: str, **more) -> types.SimpleNamespace:
    window, ratio, place, coverage, previous, sink, _, _ = LAYOUTS[name]
    return types.SimpleNamespace(
        **more,
        beacon_window=window,
        beacon_stride=window,
        beacon_ratio=ratio,
        beacon_ratio_mix="sequence",
        beacon_pos=place,
        beacon_attn=coverage,
        beacon_attend_prev=previous,
        beacon_sink_size=sink,
        beacon_parallel_window=1,
        beacon_param=["q", "k", "v"],
        beacon_embed_init="eos",
        max_position_embeddings=256,
        torch_dtype=torch.float64,
        _attn_implementation="eager",
    )


def memory_class(checkouts: Path, torch):
    file = checkouts / "FlagEmbedding/research/Long_LLM/activation_beacon/src/modeling_beacon.py"
    given = {"torch": in_float64(torch), "np": np, "cycle": itertools.cycle, "logger": logging.getLogger("beacon")}
    return definitions(file, "slice_tensor", "cat_tensor", "Memory", **given).Memory


def layout(checkouts: Path, torch, name: str) -> dict[str, np.ndarray]:
    """Every window of one case, its keys the numbers of tokens."""
    pieces, training = LAYOUTS[name][-2:]
    memory = memory_class(checkouts, torch)(config(torch, name, vocab_size=MARK, num_hidden_layers=1)).train(training)
    windows, begin, beacons = [], 0, MARK
    for piece in pieces:
        tokens = torch.arange(begin, begin + piece)[None]
        memory.prepare(tokens, None, tokens if training else None)
        begin += piece
        while not memory.finish:
            ids, mask, places, past, labels = memory.step()
            key, _, size, marks = past[0]
            rows = ids[0].clone()
            rows[ids[0] == MARK] = torch.arange(beacons, beacons + int((ids[0] == MARK).sum()))
            beacons += int((ids[0] == MARK).sum())
            before = torch.zeros(0) if key is None else key[0, 0, :, 0]
            held = rows.double()[None, None, :, None]
            memory.update_memory([(held, held, size, marks)])
            kept = [
                one[0][0][0, 0, :, 0] for one in (memory.sink_activations, memory.beacon_activations) if one[0][0] is not None
            ]
            kept += [] if memory.raw_activations[0][0] is None else [memory.raw_activations[0][0][0, 0, :, 0]]
            seen = torch.ones(len(rows), len(before) + len(rows)).tril(len(before)) if mask is None else mask[0, 0] == 0
            one = {"rows": rows, "columns": torch.cat([before, rows]), "positions": places[0], "mask": seen.bool()}
            one |= {"kept": torch.cat(kept)} | ({} if labels is None else {"labels": labels[0]})
            windows.append({key: value.numpy().astype(np.int16) for key, value in one.items()})
    return {f"layout/{name}/{key}": padded([window[key] for window in windows]) for key in windows[0]}


def padded(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays of several sizes as one, -1 behind each."""
    sizes = np.max([part.shape for part in parts], 0)
    return np.stack(
        [np.pad(x, [(0, most - n) for n, most in zip(x.shape, sizes, strict=True)], constant_values=-1) for x in parts]
    )


class Output(dict):
    """What the code takes for transformers' output records."""

    __getattr__ = dict.get

    def __getitem__(self, key):
        return next(iter(self.values())) if key == 0 else super().__getitem__(key)


def causal_lm(checkouts: Path, torch):
    """The authors' Llama in float64, its base the weights of llama.npz."""
    from torch import nn

    class Base(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

        def post_init(self):
            pass

    def plain(*_, **__):
        return lambda part: part

    src = checkouts / "FlagEmbedding/research/Long_LLM/activation_beacon/src"
    given = {"torch": in_float64(torch), "nn": nn, "math": math, "logger": logging.getLogger("beacon")}
    names = "optional_grad_ctx", "compute_loss", "get_rope", "RotaryEmbedding", "rotate_half"
    utils = definitions(src / "modeling_utils.py", *names, nullcontext=contextlib.nullcontext, **given)
    attention = {}
    given |= {"optional_grad_ctx": utils.optional_grad_ctx, "compute_loss": utils.compute_loss, "get_rope": utils.get_rope}
    given |= {"ACT2FN": {"silu": nn.functional.silu}, "LLAMA_ATTENTION_CLASSES": attention, "LlamaPreTrainedModel": Base}
    given |= {"ModelOutput": Output, "BaseModelOutputWithPast": Output, "LLAMA_INPUTS_DOCSTRING": "", "_CONFIG_FOR_DOC": ""}
    given |= {"LLAMA_START_DOCSTRING": ""}
    given |= {"add_start_docstrings": plain, "replace_return_docstrings": plain, "CausalLMOutputWithPast": Output}
    names = "LlamaRMSNorm", "LlamaMLP", "repeat_kv", "LlamaAttention", "LlamaDecoderLayer", "LlamaModel", "LlamaForCausalLM"
    code = definitions(src / "llama/modeling_llama.py", *names, add_start_docstrings_to_model_forward=plain, **given)
    attention["eager"] = code.LlamaAttention
    return code.LlamaForCausalLM


def model(checkouts: Path, torch, name: str) -> tuple[dict, dict]:
    """Logits of one case and the beacons' own weights, the same in every case."""
    from families import SIZES

    pieces, training = LAYOUTS[name][-2:]
    sizes = {key: value for key, value in SIZES.items() if key not in ("max_position_embeddings", "head_dim")}
    more = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "attention_bias": False, "pad_token_id": None}
    more |= {"output_attentions": False, "output_hidden_states": False, "use_return_dict": True, "rope_scaling": None}
    settings = config(torch, name, **sizes, **more)
    made = causal_lm(checkouts, torch)(settings)
    made.memory = memory_class(checkouts, torch)(settings)
    made.train(training)
    with np.load(Path(__file__).parent / "golden" / "llama.npz") as held:
        base = {
            key.removeprefix("weights/"): torch.from_numpy(held[key]).double() for key in held if key.startswith("weights/")
        }
    own, unknown = made.load_state_dict(base, strict=False)
    assert not unknown and all("beacon" in key for key in own), (own, unknown)
    torch.manual_seed(1)
    with torch.no_grad():
        for key in sorted(own):
            made.get_parameter(key).copy_(torch.randn_like(made.get_parameter(key)).mul(0.3).float())
    whole, logits, count, losses = made._native_forward, [], [], []

    def forward(**options):
        out = whole(**options)
        raw = options["input_ids"][0] != settings.vocab_size
        logits.append(out["logits"][0, raw].detach())
        count.append(int(raw.sum()))
        return out

    made._native_forward = forward
    tokens = torch.randint(0, settings.vocab_size, (1, sum(pieces)))
    for piece in tokens.split(pieces, 1):
        out = made(input_ids=piece, labels=piece if training else None)
        losses.append(out.get("loss"))
    found = {"tokens": tokens.int(), "logits": torch.cat(logits), "sizes": torch.tensor(count, dtype=torch.int32)}
    found |= {"loss": losses[-1]} if training else {}
    for layer, (key, value) in enumerate(made.memory.beacon_activations):
        found |= {f"key/{layer}": key, f"value/{layer}": value}
    found = {f"model/{name}/{key}": value.detach().numpy() for key, value in found.items()}
    return found, {f"model/weights/{key}": made.get_parameter(key).detach().numpy() for key in own}


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    found = {}
    full = torch.Tensor.new_full
    by_number = mock.patch.object(
        torch.Tensor, "new_full", lambda x, size, *a, **k: full(x, (size,) if isinstance(size, int) else size, *a, **k)
    )
    with told_float64(torch), by_number:
        for name in LAYOUTS:
            found |= layout(checkouts, torch, name)
        for name in MODELS:
            logits, weights = model(checkouts, torch, name)
            found |= logits | weights
    return {key: value.astype(np.float32) if value.dtype == np.float64 else value for key, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "activation_beacon.npz", **arrays(Path(sys.argv[1])))
