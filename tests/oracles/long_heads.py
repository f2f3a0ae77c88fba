"""Writes golden attention of LongHeads' authors: a row read in one pass, then token by token.

    python tests/oracles/long_heads.py CHECKOUTS    # needs the `oracles` extra and einops; writes golden/long_heads.npz

    LongHeads  LuLuLuyi/LongHeads 1c9f72e726401cbccf320d2c5c72244dd92a336f, modeling_longheads/modeling_llama.py

`LlamaAttention.forward` runs as it is on torch CPU with projections that hand over given queries, keys and values, a table of
plain RoPE and a stand-in for flash-attn. Kept are the tokens read one at a time, whose own key is among what they see; the pass
over a row leaves it out, taken for a mistake. The last token of a chunk is not kept: the code has no tail then, and sees
a chunk less, not the one before its own.
Written with torch 2.13.0.
"""

import math
import sys
import types
from pathlib import Path

import numpy as np
from authors import definitions

HEADS, DIM, LENGTH, READ, BASE = 2, 8, 340, 300, 10_000.0
CHUNK, SEEN = 32, 256


def main(checkouts: Path) -> None:
    import einops
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    file = checkouts / "LongHeads" / "modeling_longheads" / "modeling_llama.py"
    names = "rotate_half", "apply_rotary_pos_emb", "apply_rotary_pos_emb_for_relative_keys"
    names += "apply_rotary_pos_emb_for_relative_query", "_pad_to_chunk_size"
    names += "LlamaAttention.forward", "LlamaAttention._nonoverlap_window_1d_partition"
    given = {"torch": torch, "nn": nn, "F": F, "math": math, "rearrange": einops.rearrange}
    code = definitions(file, *names, **given, flash_attn_with_kvcache=flash, flash_attn_qkvpacked_func=packed)

    q, k, v = torch.randn(3, 1, LENGTH, HEADS, DIM)
    layer = types.SimpleNamespace(
        num_heads=HEADS,
        head_dim=DIM,
        hidden_size=HEADS * DIM,
        atten_length=SEEN,
        begin_selective_length=SEEN,
        window_size=CHUNK,
        attn_scale=DIM**-0.5,
        cpu_offload=False,
        batch_encoding=False,
        encoding_batch_size=1,
        rotary_emb=tables,
        q_proj=lambda x: x[..., : HEADS * DIM].clone(),
        k_proj=lambda x: x[..., HEADS * DIM : 2 * HEADS * DIM].clone(),
        v_proj=lambda x: x[..., 2 * HEADS * DIM :].clone(),
        o_proj=lambda x: x,
        attn=packed,
        causal_attn=lambda qkv: packed(qkv, causal=True),
    )
    layer._nonoverlap_window_1d_partition = lambda x: code._nonoverlap_window_1d_partition(layer, x)
    hidden = torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)
    held, found = None, []
    for begin, end in ((0, READ), *((i, i + 1) for i in range(READ, LENGTH))):
        places = torch.arange(begin, end)[None]
        past = {} if held is None else dict(zip(("past_key_value", "past_query", "past_global_key_value"), held, strict=True))
        mask = torch.ones(1, end - begin)
        out, _, held = code.forward(
            layer, hidden[:, begin:end], attention_mask=mask, position_ids=places, use_cache=True, **past
        )
        if begin >= READ:
            found.append(out.reshape(HEADS, DIM))
    places = [i for i in range(READ, LENGTH) if (i + 1) % CHUNK]
    out = torch.stack([found[i - READ] for i in places])
    arrays = {"q": q, "k": k, "v": v, "out": out}
    held = {name: x.numpy().astype(np.float32) for name, x in arrays.items()}
    np.savez_compressed(Path(__file__).parent / "golden" / "long_heads.npz", **held, places=np.array(places))


def tables(x, seq_len):
    import torch

    theta = BASE ** -(torch.arange(0, DIM, 2) / DIM)
    angle = torch.arange(seq_len)[:, None] * theta
    angle = torch.cat([angle, angle], dim=-1)[None, None]
    return angle.cos(), angle.sin()


def flash(q, k=None, v=None, k_cache=None, v_cache=None, cache_seqlens=None, softmax_scale=DIM**-0.5, causal=False):
    """What flash-attn computes of [B,T,H,D]: queries aligned to the last keys, of each row the first `cache_seqlens`."""
    import torch

    k, v = (k, v) if k_cache is None else (k_cache, v_cache)
    logits = torch.einsum("bthd,bshd->bhts", q, k) * softmax_scale
    if causal:
        back = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
        logits = logits.masked_fill(back < 0, -math.inf)
    if cache_seqlens is not None:
        seen = torch.arange(k.shape[1]) < cache_seqlens[:, None]
        logits = logits.masked_fill(~seen[:, None, None], -math.inf)
    return torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v)


def packed(qkv, **options):
    return flash(*qkv.unbind(2), **options)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
