"""Writes what kvpress' KVzip keeps of a text that a tiny checkpoint of `hf_checkpoints.py` reads twice.

    python tests/oracles/kvzip.py CHECKOUTS        # needs the `oracles` extra; writes tests/oracles/golden/kvzip.npz

    kvpress     NVIDIA/kvpress 8bb29b9c3078452a86d692f29123fa6c793e2b05, kvpress/presses/kvzip_press.py, kvpress/utils.py

Its class runs around the golden llama2 in float64, but for chunks of CHUNK tokens instead of 2,048, and sinks that get their
score of 1, over which it writes those of the first chunk. A stand-in for a tokenizer without a chat template gives the ids of
its prompts.

    ids [60], first [3], later [2], suffix [1]   the text and the ids of the prompts
    scores [2,2,60]          of layers, key heads and tokens, those of four sinks too
    kept/layer, kept/model   [2,2,60] whether a head keeps it, half of all, of budgets that layers or all share
"""

import logging
import math
import sys
import types
import typing
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from authors import definitions

GOLDEN = Path(__file__).parent / "golden"
N, CHUNK, FIRST, LATER, SUFFIX = 60, 25, [5, 9, 2], [7, 3], [11]


def main(checkouts: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.models.llama.modeling_llama import rotate_half

    torch.set_default_dtype(torch.float64)

    class Words:
        chat_template = None

        def encode(self, text, **_):
            ids = {"": [], "\n": SUFFIX}.get(text, LATER if "part of" in text else FIRST)
            return torch.tensor([ids], dtype=torch.int64)

    given = {"torch": torch, "nn": torch.nn, "math": math, "dataclass": dataclass, "contextmanager": contextmanager}
    given |= {"MethodType": types.MethodType, "rotate_half": rotate_half, "logger": logging.getLogger("kvpress")}
    given |= {"SUPPORTED_MODELS": (object,), "Gemma3PreTrainedModel": type(None), "QuantizedCache": type(None)}
    given |= {"AutoTokenizer": types.SimpleNamespace(from_pretrained=lambda name: Words()), "__name__": __name__}
    given |= {name: type(None) for name in ("Phi3Attention", "Qwen3Attention", "Gemma3Attention", "Qwen3MoeAttention")}
    given |= {"List": list, "Generator": typing.Generator}
    given["BasePress"] = type("BasePress", (), {"post_init_from_model": lambda self, model: None})
    code = checkouts / "kvpress" / "kvpress"
    for name in ("extract_keys_and_values", "get_prerope_query_states"):
        given[name] = getattr(definitions(code / "utils.py", name, **given), name)
    press = definitions(code / "presses" / "kvzip_press.py", "KVzipPress", **given).KVzipPress

    class Told(press):
        def prepare(self, model, tokenizer):
            return super().prepare(model, tokenizer, chunk_size=CHUNK)

        def forward_hook(self, module, args, kwargs, output):  # transformers has named it anew since
            return super().forward_hook(module, args, kwargs | {"past_key_values": kwargs["cache"]}, output)

        def compress_post(self, model):
            self.found = self.score_val.clone()
            self.score_val[..., : self.n_sink] = 1.0
            super().compress_post(model)

    model = AutoModelForCausalLM.from_pretrained(
        GOLDEN / "hf" / "llama2", attn_implementation="sdpa", dtype=torch.float64
    ).eval()
    ids = np.random.default_rng(11).integers(1, 40, N)
    made = {"ids": ids, "first": FIRST, "later": LATER, "suffix": SUFFIX}
    for name, layerwise in (("layer", True), ("model", False)):
        one = Told(compression_ratio=0.5, layerwise=layerwise)
        with torch.no_grad(), one(model):
            model.model(input_ids=torch.from_numpy(ids)[None], past_key_values=DynamicCache())
        made["scores"] = one.found[:, 0].numpy()
        kept = np.ones(made["scores"].shape, bool)
        for n, layer in enumerate(model.model.layers):
            _, heads, places = layer.self_attn.masked_key_indices
            kept[n, heads.numpy(), places.numpy()] = False
        made[f"kept/{name}"] = kept
    np.savez_compressed(GOLDEN / "kvzip.npz", **made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
