"""Writes golden attention of authors' distance plans, whose pass over all tokens and steps token by token agree.

    python tests/oracles/distance_plans.py CHECKOUTS    # needs the `oracles` extra; writes golden/distance_plans.npz

The attention of each patch runs on torch CPU with projections that hand over given queries, keys and values, tables of plain
RoPE, and a stand-in for flash-attn; where the code rounds to float32 or bfloat16, it is told float64.

    LongLM      datamllab/LongLM cdbbb061dc76438c46d7e1ddc500f8e4bf255574, self_extend_patch/Llama.py
    rerope      bojone/rerope acfe78840357a94d0bb504cb8865eeaa752df1a6, rerope_patch.py, leaky_rerope_patch.py
    ChunkLlama  HKUNLP/ChunkLlama 2add4d7c99d24dcc1ab03414cc602abb2e28cf2c, chunkllama_attn_replace.py
    DPE         LuLuLuyi/DPE 46b85decdedcb6e86b9c75f1082968d54fc92efc, dpe_for_llama.py
    LongEmbed   dwzhu-pku/LongEmbed 033dc4a18e2da7b87d0e388c5b975cabe19c2fdc, src/self_extend_patch.py (both ways, one pass)

Settings are such that what the codes do besides is out of play: windows are multiples of groups (SelfExtend and DPE divide by
them once as integers and once not), ChunkLlama's table is longer than the row (no temperature), DPE scales all dimensions,
LongEmbed's row has 512 tokens (fewer are not extended, more raise the logits).
Written with torch 2.13.0.
"""

import math
import sys
import types
from pathlib import Path

import numpy as np
from authors import definitions, in_float64

HEADS, KV_HEADS, DIM, LENGTH, BASE = 2, 1, 16, 40, 10_000.0
WINDOW, GROUP = 8, 4  # SelfExtend; the window is ReRoPE's and DPE's too
LEAK, TRAINED = 4, 16  # Leaky ReRoPE; queries of both grow beyond the trained window
CHUNK, CLIP = 8, 12
GROUPS = (2, 8, 1, 4)
BOTH_LENGTH, BOTH_DIM, BOTH_WINDOW = 512, 4, 64


def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False):
    """What flash-attn computes, [B,T,H,D], the last query aligned to the last key; lse is [B,H,T]."""
    import torch

    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    back = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    seen = (back >= 0) | (not causal)
    if window_size[0] >= 0:
        seen &= back <= window_size[0]
    logits = logits.masked_fill(~seen, -math.inf)
    out = torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v)
    return (out, logits.logsumexp(-1), None) if return_attn_probs else out


class Held:
    """Keys and values of all steps so far."""

    def __init__(self):
        self.k = self.v = None

    def get_usable_length(self, length, layer):
        return 0 if self.k is None else self.k.shape[2]

    def update(self, k, v, layer, cache_kwargs):
        import torch

        self.k, self.v = (k, v) if self.k is None else (torch.cat([self.k, k], 2), torch.cat([self.v, v], 2))
        return self.k, self.v


def angles(positions, scale=1.0, dim=DIM):
    import torch

    theta = BASE ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions.double()[..., None] / scale * theta
    return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([angle.sin(), angle.sin()], -1)


def layer(**options) -> types.SimpleNamespace:
    """What the patches read of an attention layer. Hidden states are queries, keys and values side by side."""
    query, kv = HEADS * DIM, KV_HEADS * DIM
    parts = {"q_proj": (0, query), "k_proj": (query, query + kv), "v_proj": (query + kv, query + 2 * kv)}
    made = {name: lambda x, a=a, b=b: x[..., a:b].clone() for name, (a, b) in parts.items()}
    config = types.SimpleNamespace(pretraining_tp=1, attention_dropout=0.0)
    sizes = {"num_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_key_value_groups": HEADS // KV_HEADS, "head_dim": DIM}
    made |= sizes | {"hidden_size": query, "pretraining_tp": 1, "attention_dropout": 0.0, "training": False, "layer_idx": 0}
    return types.SimpleNamespace(**made, o_proj=lambda x: x, config=config, **options)


def plans(checkouts: Path) -> dict:
    """Of each plan `(forward, cache)`: forward(hidden_states, attention_mask, position_ids, past, **options)."""
    import torch
    from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

    wide = in_float64(torch)
    shared = {"torch": wide, "nn": torch.nn, "F": torch.nn.functional, "np": np, "math": math}
    shared |= {"repeat_kv": repeat_kv, "rotate_half": rotate_half, "flash_attn_func": flash}
    at_positions = lambda values, positions, seq_len=None: angles(positions)
    cached = lambda scale: lambda values, seq_len: tuple(x[None, None] for x in angles(torch.arange(seq_len), scale))

    def bind(forward, layer, **fixed):
        return lambda x, mask, positions, past, use_cache: forward(
            layer, x, attention_mask=mask, position_ids=positions, past_key_value=past, use_cache=use_cache, **fixed
        )

    names = ("apply_rotary_pos_emb", "self_extend_forward")
    extend = definitions(checkouts / "LongLM/self_extend_patch/Llama.py", *names, **shared).self_extend_forward
    found = {"self_extend": (bind(extend, layer(rotary_emb=at_positions), group_size_1=GROUP, group_size_2=WINDOW), Held)}

    globals_of = shared | {"training_length": TRAINED, "window": WINDOW, "scaling_factor": LEAK}
    for name in ("rerope", "leaky_rerope"):
        file = checkouts / f"rerope/{name}_patch.py"
        forward = vars(definitions(file, "apply_rotary_pos_emb", f"forward_with_{name}", **globals_of))[f"forward_with_{name}"]
        found[name] = bind(forward, layer(rotary_emb=cached(1), rotary_emb2=cached(LEAK))), None

    globals_of = shared | {"chunk_size": CLIP, "local_window": CLIP - CHUNK, "MAX_NEW_TOKENS": 8}
    names = (
        "get_mscale",
        "ChunkLlamaRotaryEmbedding",
        "apply_rotary_pos_emb",
        "merge_attn_outputs",
        "do_flash_attn",
        "forward",
    )
    chunks = definitions(checkouts / "ChunkLlama/chunkllama_attn_replace.py", *names, **globals_of)
    rotary = chunks.ChunkLlamaRotaryEmbedding(DIM, max_position_embeddings=LENGTH + 8, base=BASE)
    found["dual_chunk"] = bind(chunks.forward, layer(rotary_emb=rotary)), Held

    ranges = [n * (DIM // 2) // len(GROUPS) for n in range(len(GROUPS) + 1)]
    globals_of = shared | {"dpe_scale_factors": GROUPS, "dpe_local_window_size": WINDOW, "dpe_dim_groups_range": ranges}
    globals_of |= {"dpe_select_topk_dim": False}
    names = ("apply_rotary_pos_emb", "atten_merge_forward", "concat_tensors", "dpe_flash_forward")
    groups = definitions(checkouts / "DPE/dpe_for_llama.py", *names, **globals_of).dpe_flash_forward
    # its last line returns a name that it has set only where outputs of attention are not asked for
    found["dimension_groups"] = bind(groups, layer(rotary_emb=at_positions), output_attentions=False), Held
    return found


def both_ways(checkouts: Path) -> dict[str, np.ndarray]:
    """Of an encoder's attention with one head."""
    import torch

    names = ("apply_rotary_pos_emb", "apply_grouped_rotary_pos_emb", "apply_grouped_rotary_pos_emb_upper", "rotate_half")
    given = {"torch": in_float64(torch), "nn": torch.nn, "math": math}
    file = checkouts / "LongEmbed/src/self_extend_patch.py"
    forward = definitions(file, *names, "e5rope_self_extend_forward", **given).e5rope_self_extend_forward
    drawn = np.random.default_rng(1).normal(size=(3, 1, BOTH_LENGTH, 1, BOTH_DIM)).astype(np.float32)
    parts = {name: lambda x, n=n: x[n] for n, name in enumerate(("query", "key", "value"))}
    layer = types.SimpleNamespace(
        **parts,
        transpose_for_scores=lambda x: x.transpose(1, 2),
        rotary_emb=lambda values, seq_len: tuple(x[None, None] for x in angles(torch.arange(seq_len), dim=BOTH_DIM)),
        num_attention_heads=1,
        attention_head_size=BOTH_DIM,
        all_head_size=BOTH_DIM,
        is_decoder=False,
    )
    mask = torch.zeros(1, 1, 1, BOTH_LENGTH, dtype=torch.float64)
    options = {"position_ids": torch.arange(BOTH_LENGTH)[None], "group_size_1": GROUP, "group_size_2": BOTH_WINDOW}
    (out,) = forward(layer, torch.from_numpy(drawn).double(), mask, **options)
    named = {f"both_ways/{name}": x for name, x in zip("qkv", drawn, strict=True)}
    return named | {"both_ways": out[:, :, None].float().numpy()}


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, LENGTH, heads, DIM)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
    hidden = torch.cat([torch.from_numpy(x).double().flatten(2) for x in (q, k, v)], dim=-1)
    causal = torch.full((LENGTH, LENGTH), -math.inf, dtype=torch.float64).triu(1)[None, None]
    places = torch.arange(LENGTH)[None]
    found = {"q": q, "k": k, "v": v} | both_ways(checkouts)
    for name, (forward, cache) in plans(checkouts).items():
        out, *_ = forward(hidden, causal, places, None, False)
        past, steps = cache and cache(), []
        for n in range(LENGTH):
            step, _, held = forward(hidden[:, n : n + 1], None, places[:, n : n + 1], past, True)
            past = past or held
            past = held if cache is None else past
            steps.append(step)
        torch.testing.assert_close(torch.cat(steps, dim=1), out, rtol=0, atol=1e-12)
        found[name] = out.reshape(1, LENGTH, HEADS, DIM).float().numpy()
    return found


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "distance_plans.npz", **arrays(Path(sys.argv[1])))
