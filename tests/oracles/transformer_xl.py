"""Writes golden outputs of Transformer-XL's authors' attention over a memory, and of two layers over three segments.

    python tests/oracles/transformer_xl.py CHECKOUTS    # needs the `oracles` extra; writes golden/transformer_xl.npz

    transformer-xl    kimiyoung/transformer-xl 44781ed21dbaec88b280f74d9ae2877f52b492a5, pytorch/mem_transformer.py

The code runs in float64; arrays are [T,B,D] as it has them. D = 8, H = 2 heads of d = 4. A query i of a segment at distance n
from a key j (n = 0 itself, keys [memory ‖ segment], oldest first):

    score    ((q_i + u).k_j + (q_i + v).(R_n Wr)) / sqrt(d), u = `r_w_bias`, v = `r_r_bias` [H,d] of all layers, R_n =
             [sin(n f) ‖ cos(n f)], f = 10000 ** (-2 m / D); causal; n is replaced by min(n, clamp) if that is > 0
    layer    h' = LN(x + attend(x; [memory ‖ x])), or x + attend(LN(x); LN([memory ‖ x])) with `pre`, LN of one set of weights
             (eps 1e-5); qkv = rows q, k, v of one matrix, no biases; then LN(h' + W2 relu(W1 h' + b1) + b2)
    memory   of a layer: the inputs of that layer at the last `mem_len` positions before the segment, of the streams as they
             were; no gradient; a first segment has none, and a shorter one than mem_len grows by segments
    same     with `same_length`, only keys at n < mem_len are seen; held is the mask that the code makes

    attention/<case>/{x [5,2,8], memory [6,2,8], out [5,2,8], cotangent, dx}      case: post, pre; u, v and weights below
    layers/<case>/{segments [3,4,2,8], out [3,4,2,8], memory [3,3,6,2,8]}         case: plain, clamp (3), same; post-LN;
             memory after each segment, of each layer and, which nothing reads, of the output; rows without an entry are 0 in
             front
    layers/<case>/mask/<n> [T,K]                                                  1 for a key that is not seen
    weights/{attention,layers}/<name>, u, v [2,4]

Dropout is 0. `_update_mems` takes the lengths of memory and segment in the other order than it is given them, which nothing
shows as long as `ext_len` is 0, as here.
Written with torch 2.13.0.
"""

import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
from authors import definitions

DIM, HEADS, HEAD_DIM, INNER, ROWS, MEMORY, SEGMENT = 8, 2, 4, 12, 2, 6, 4


def drawn(torch, module) -> None:
    with torch.no_grad():
        for name, weight in module.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            weight.copy_(torch.randn_like(weight).mul(0.4).add(norm).float())


def noise(torch, *shape):
    return torch.randn(*shape).float().double()


def attention(torch, code, bias) -> dict:
    found = {}
    x, memory, cotangent = noise(torch, 5, ROWS, DIM), noise(torch, MEMORY, ROWS, DIM), noise(torch, 5, ROWS, DIM)
    mask = torch.ones(5, 5 + MEMORY).triu(1 + MEMORY).bool()[:, :, None]
    for case in ("post", "pre"):
        torch.manual_seed(1)
        layer = code.RelPartialLearnableMultiHeadAttn(HEADS, DIM, HEAD_DIM, 0.0, pre_lnorm=case == "pre")
        drawn(torch, layer)
        given = x.clone().requires_grad_()
        places = code.PositionalEmbedding(DIM)(torch.arange(4 + MEMORY, -1, -1.0))
        out = layer(given, places, *bias, attn_mask=mask, mems=memory)
        (dx,) = torch.autograd.grad((out * cotangent).sum(), given)
        one = {"x": x, "memory": memory, "out": out, "cotangent": cotangent, "dx": dx}
        found |= {f"attention/{case}/{key}": value for key, value in one.items()}
    return found | {f"weights/attention/{key}": value for key, value in layer.named_parameters()}


def layers(torch, code, bias) -> dict:
    torch.manual_seed(2)
    stack = [code.RelPartialLearnableDecoderLayer(HEADS, DIM, HEAD_DIM, INNER, 0.0, pre_lnorm=False) for _ in range(2)]
    drawn(torch, torch.nn.ModuleList(stack))
    segments = noise(torch, 3, SEGMENT, ROWS, DIM)
    found = {f"weights/layers/{key}": value for key, value in torch.nn.ModuleList(stack).named_parameters()}
    for case in ("plain", "clamp", "same"):
        model = types.SimpleNamespace(
            word_emb=lambda tokens: segments[tokens[0, 0]],
            pos_emb=code.PositionalEmbedding(DIM),
            drop=lambda x: x,
            layers=[],
            attn_type=0,
            same_length=case == "same",
            clamp_len=3 if case == "clamp" else -1,
            mem_len=MEMORY,
            ext_len=0,
            r_w_bias=bias[0],
            r_r_bias=bias[1],
        )
        model._update_mems = lambda *args, model=model: code._update_mems(model, *args)
        masks = []
        for layer in stack:
            model.layers.append(
                lambda *a, layer=layer, masks=masks, **k: (masks.append(k["dec_attn_mask"][..., 0]), layer(*a, **k))[1]
            )
        memory, outs, memories = [torch.empty(0)] * 3, [], []
        for n in range(3):
            out, memory = code._forward(model, torch.full((SEGMENT, ROWS), n), mems=memory)
            outs.append(out)
            memories.append(torch.stack([torch.cat([torch.zeros(MEMORY - len(one), ROWS, DIM), one]) for one in memory]))
        one = {"segments": segments, "out": torch.stack(outs), "memory": torch.stack(memories)}
        one |= {f"mask/{n}": mask for n, mask in enumerate(masks[::2])}
        found |= {f"layers/{case}/{key}": value for key, value in one.items()}
    return found


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    torch.set_default_dtype(torch.float64)
    names = "PositionalEmbedding", "PositionwiseFF", "RelMultiHeadAttn", "RelPartialLearnableMultiHeadAttn"
    names += "RelPartialLearnableDecoderLayer", "MemTransformerLM._forward", "MemTransformerLM._update_mems"
    file = checkouts / "transformer-xl" / "pytorch" / "mem_transformer.py"
    code = definitions(file, *names, torch=torch, nn=torch.nn, F=torch.nn.functional)
    torch.manual_seed(0)
    bias = noise(torch, 2, HEADS, HEAD_DIM)
    with (
        mock.patch.object(torch.Tensor, "byte", torch.Tensor.bool),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        found = attention(torch, code, bias) | layers(torch, code, bias) | {"u": bias[0], "v": bias[1]}
    found = {key: value.detach().numpy() for key, value in found.items()}
    return {key: value if value.dtype == bool else value.astype(np.float32) for key, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "transformer_xl.npz", **arrays(Path(sys.argv[1])))
