"""Writes golden outputs of the peer of Memorizing Transformers' attention over near entries of a memory, segment by segment.

    python tests/oracles/memorizing.py CHECKOUTS    # needs the `oracles` extra and einops; writes golden/memorizing.npz

    memorizing-transformers-pytorch  lucidrains/memorizing-transformers-pytorch 272e39bafd2a507d21ac896bd7cf4b593ee9acb7,
                                     memorizing_transformers_pytorch/memorizing_transformers_pytorch.py

`KNNAttention` runs as it is in float64; the index, which is approximate there, is an exact one here. It is not the paper's
form:

    q, k      l2-normalised, one head of k and v for all heads of queries; v as projected; scale exp(s_h), s [H,1,1] learned
    local     keys [cache ‖ segment], causal; memory: the top k entries by q.k of each query and head, its k and v as stored
    mix       one softmax over both, no gate
    cache     the last C of [cache ‖ segment] (k normalised, v), detached; what falls out of it goes into the memory, after the
              segment has searched: a segment sees in the memory what left the cache before it came
    empty     where fewer than k entries are held, the missing ones are masked

    x [3,2,5,8], cotangent, out [3,2,5,8], dx      three segments of 5 tokens, two rows; dx of sum(out * cotangent) per segment
    cache [3,2,4,2,4], entries [3,2,N,2,4]         after each, k then v; entries oldest first, 0 where not yet filled
    near [3,2,2,5,3]                               numbers of the entries that the queries took, most similar first, -1 for none
    weights/<name>                                 H = 2 heads of 4, k = 3, C = 4; to_out has no bias

No array has its relative bias: with a cache, it counts queries from 0 and keys from the cache's first, so that distances are
short by the length of the cache. The paper's own form (two softmaxes of the same queries, mixed per head by sigmoid(b_h)) is
in memorizing_layer.npz.
Written with torch 2.13.0.
"""

import math
import sys
from pathlib import Path

import numpy as np
from authors import definitions

DIM, HEADS, HEAD_DIM, NEAR, CACHE, SEGMENT, ROWS, SEGMENTS = 8, 2, 4, 3, 4, 5, 2, 3


class Exact:
    """Entries of a memory, [B,N,2,D], and a search for the nearest that misses none."""

    def __init__(self, torch):
        self.torch, self.held, self.near = torch, torch.zeros(ROWS, 0, 2, HEAD_DIM), []

    def add(self, entries):
        self.held = self.torch.cat([self.held, entries], 1)

    def search(self, queries, count):
        torch = self.torch
        similar = torch.einsum("bhid,bnd->bhin", queries, self.held[:, :, 0]).detach()
        missing = torch.full((*similar.shape[:-1], count), -math.inf)
        best, near = torch.cat([similar, missing], -1).topk(count)
        seen = best > -math.inf
        self.near.append(torch.where(seen, near, -1))
        padded = torch.cat([self.held, torch.zeros(ROWS, 1, 2, HEAD_DIM)], 1)
        rows = torch.arange(ROWS)[:, None, None, None]
        return padded[rows, torch.where(seen, near, padded.shape[1] - 1)], seen


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import einops
    import torch
    from torch import nn

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    file = (
        checkouts / "memorizing-transformers-pytorch" / "memorizing_transformers_pytorch" / "memorizing_transformers_pytorch.py"
    )
    given = {"torch": torch, "nn": nn, "F": nn.functional, "einsum": torch.einsum, "math": math, "rearrange": einops.rearrange}
    code = definitions(file, "exists", "l2norm", "KNNAttention", **given)
    options = {"heads": HEADS, "dim_head": HEAD_DIM, "num_retrieved_memories": NEAR, "xl_max_memories": CACHE}
    layer = code.KNNAttention(dim=DIM, attn_scale_init=5, **options)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            weight.copy_(
                (weight + 0.3 * torch.randn_like(weight) if name == "scale" else torch.randn_like(weight) * 0.5).float()
            )
    memory, cache = Exact(torch), None
    x, cotangent = torch.randn(2, SEGMENTS, ROWS, SEGMENT, DIM).float().double()
    found = {name: [] for name in ("out", "dx", "cache", "entries")}
    for n in range(SEGMENTS):
        one = x[n].clone().requires_grad_()
        out, cache = layer(one, knn_memory=memory, xl_memory=cache)
        found["out"].append(out)
        found["dx"].append(torch.autograd.grad((out * cotangent[n]).sum(), one)[0])
        found["cache"].append(cache)
        found["entries"].append(memory.held)
    most = memory.held.shape[1]
    found["entries"] = [nn.functional.pad(held, (0, 0, 0, 0, 0, most - held.shape[1])) for held in found["entries"]]
    found = {key: torch.stack(value) for key, value in found.items()} | {"x": x, "cotangent": cotangent}
    found |= {f"weights/{key}": value for key, value in layer.named_parameters()}
    found = {key: value.detach().numpy().astype(np.float32) for key, value in found.items()}
    return found | {"near": torch.stack(memory.near).numpy().astype(np.int32)}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "memorizing.npz", **arrays(Path(sys.argv[1])))
