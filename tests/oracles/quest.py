"""Writes what attention of Quest's authors gives for a token behind others, of random queries, keys and values.

    python tests/oracles/quest.py CHECKOUTS    # writes tests/oracles/golden/quest.npz

    Quest    mit-han-lab/Quest 01c1623bf9395009520874e989e29f683203b357, evaluation/quest_attention.py

`forward` runs as it is, of a layer that selects, with projections that hand over what they are given and a rope that turns
nothing. Pages are of 4. The token itself opens a page of its own, which its key, made like its query, has chosen, and so has a
key of the page before it.

    q [4,8], k [2,61,8], v [2,61,8]    of heads; the last key and value are the token's own
    out/<budget> [4,8]    with budgets of 16 and 32 tokens, the page of its own among them
"""

import sys
import types
from pathlib import Path

import numpy as np
from authors import definitions, in_float64, told_float64

N, H, K, D, PAGE = 60, 4, 4, 8, 4
BUDGETS = (16, 32)


def main(checkouts: Path) -> None:
    import math

    import torch

    file = checkouts / "Quest" / "evaluation" / "quest_attention.py"
    given = {"torch": in_float64(torch), "math": math, "nn": in_float64(torch).nn, "DynamicCache": type("DynamicCache", (), {})}
    given |= {"Optional": None, "Tuple": None, "repeat_kv": lambda x, n: x.repeat_interleave(n, dim=1)}
    given["apply_rotary_pos_emb"] = lambda q, k, *rest: (q, k)
    authors = definitions(file, "local_heavy_hitter_mask", "forward", **given)
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(H, D)), rng.normal(size=(K, N + 1, D)), rng.normal(size=(K, N + 1, D))
    k[:, [-1, -4]] = 4 * q[:, None]
    made = {"q": q, "k": k, "v": v}
    tensor = lambda x: torch.tensor(x)[None]
    for budget in BUDGETS:
        layer = types.SimpleNamespace(
            layer_id=2,
            num_heads=H,
            num_key_value_heads=K,
            num_key_value_groups=H // K,
            head_dim=D,
            hidden_size=H * D,
            chunk_size=PAGE,
            token_budget=budget,
            rotary_emb=lambda *rest: (torch.zeros(1), torch.zeros(1)),
            q_proj=lambda x: tensor(q.reshape(-1)).double(),
            k_proj=lambda x: tensor(k[:, -1].reshape(-1)),
            v_proj=lambda x: tensor(v[:, -1].reshape(-1)),
            o_proj=lambda x: x,
        )
        before = tensor(k[:, :-1]), tensor(v[:, :-1])
        with told_float64(torch):
            out, *_ = authors.forward(layer, torch.zeros(1, 1, H * D), None, torch.tensor([[N]]), before)
        made[f"out/{budget}"] = out.numpy().reshape(H, D)
    np.savez_compressed(Path(__file__).parent / "golden" / "quest.npz", **made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
