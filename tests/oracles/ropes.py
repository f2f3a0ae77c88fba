"""Writes golden frequencies of `transformers`' rope functions on a grid of configs: float32 inv_freq and attention factor.

    python tests/oracles/ropes.py        # needs the `oracles` extra; writes tests/oracles/golden/ropes.npz

`cases` is JSON text: of each case its rope parameters, head_dim, max_position_embeddings and seq_len. Arrays are flat, one
case after the other: inv_freq, how many pairs each case has, factors.
Written with transformers 5.24 and torch 2.13.0.
"""

import itertools
import json
from pathlib import Path

import numpy as np

HEADS = ((16, 10_000.0), (96, 500_000.0), (128, 10_000.0), (128, 1_000_000.0))  # head_dim, rope_theta


def cases() -> list[dict]:
    found = []

    def add(rope_type, head_dim, theta, length=256, seq_len=None, **given):
        rope = {"rope_type": rope_type, "rope_theta": theta, **given}
        found.append({"rope": rope, "head_dim": head_dim, "length": length, "seq_len": seq_len})

    for head, theta in HEADS:
        for partial, factor in itertools.product((1.0, 0.5, 0.25), (1.0, 2.5, 8.0)):
            add("linear", head, theta, factor=factor, partial_rotary_factor=partial)
        for partial, factor in itertools.product((1.0, 0.5, 0.3), (1.0, 8.0)):
            add("proportional", head, theta, factor=factor, partial_rotary_factor=partial)
        for factor, seq_len in itertools.product((1.0, 4.0), (None, 100, 256, 257, 1000, 4096)):
            add("dynamic", head, theta, seq_len=seq_len, factor=factor)
        add("dynamic", head, theta, seq_len=1000, factor=2.0, partial_rotary_factor=0.5)
        for factor, length in itertools.product((1.0, 4.0, 16.0, 40.0), (256, 4096, 32_768)):
            add("yarn", head, theta, length, factor=factor, original_max_position_embeddings=length)
        for given in (
            {"beta_fast": 16.0, "beta_slow": 2.0},
            {"beta_fast": 4.0, "beta_slow": 1.0, "truncate": False},
            {"truncate": False},
            {"truncate": False, "partial_rotary_factor": 0.5},
            {"mscale": 1.0, "mscale_all_dim": 0.707},
            {"mscale": 0.707, "mscale_all_dim": 1.0},
            {"mscale": 1.0, "mscale_all_dim": 1.0},
            {"attention_factor": 1.25},
            {"partial_rotary_factor": 0.5},
        ):
            add("yarn", head, theta, 4096, factor=32.0, original_max_position_embeddings=4096, **given)
        for factor, low, high, length in ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 2.0, 8.0, 256)):
            given = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": length}
            add("llama3", head, theta, length, factor=factor, **given)
        for partial, seq_len in itertools.product((1.0, 0.5), (None, 1, 256, 257, 1024)):
            pairs = int(head * partial) // 2
            rng = np.random.default_rng(pairs)
            short, long = (np.sort(rng.uniform(1, top, pairs)).round(3).tolist() for top in (1.5, 8.0))
            given = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 256}
            temperature = {} if partial == 1 else {"attention_factor": 1.125}
            given |= {"factor": 4.0, "partial_rotary_factor": partial, **temperature}
            add("longrope", head, theta, seq_len=seq_len, **given)
    return found


def arrays() -> dict[str, np.ndarray]:
    import transformers as hf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf.logging.set_verbosity_error()  # of fields that a rope reads but does not name
    inv_freq, factors = [], []
    for case in cases():
        config = hf.LlamaConfig(
            hidden_size=case["head_dim"],
            num_attention_heads=1,
            head_dim=case["head_dim"],
            max_position_embeddings=case["length"],
            rope_parameters=dict(case["rope"]),
        )
        found, factor = ROPE_INIT_FUNCTIONS[case["rope"]["rope_type"]](config, "cpu", seq_len=case["seq_len"])
        inv_freq.append(found.numpy())
        factors.append(factor)
    pairs = np.asarray([len(found) for found in inv_freq], np.int32)
    text = np.asarray(json.dumps(cases()))
    return {"cases": text, "pairs": pairs, "inv_freq": np.concatenate(inv_freq), "factors": np.asarray(factors, np.float64)}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "ropes.npz", **arrays())
