"""Writes what scorers of kvpress keep of random tokens, what WindowKV's authors keep, and their layers' budgets.

    python tests/oracles/presses.py CHECKOUTS    # writes tests/oracles/golden/presses.npz

    kvpress     NVIDIA/kvpress 8bb29b9c3078452a86d692f29123fa6c793e2b05, kvpress/presses/*.py
    WindowKV    optim996/WindowKV 7513467999fe8fb9d895d94f2ba2f5d1439a0362, models/compress_utils.py

Their classes run as they are in float64, on one layer of stand-ins: a module that has sizes, an output matrix and a rope of
base 10,000 in halves, and whose hidden states are the queries themselves.

    q [1,60,4,8], k [1,60,2,8] before their rotation, v [1,60,2,8], output [4,8,12], directions [2,8,6] of the leverage scores
    kept/<name>    [2,n] places that each key head keeps, sorted; n = 24 of 60
    score/<name>   [2,60] where a score alone is compared
    masked/adakv   [2,60] whether a head keeps it, of a budget that heads share, scores of SnapKV
    merged/values  [2,24,8] values of the merging wrapper over key norms
    windows/<task> places kept of 60 by windows of 8 with a suffix of 6 and a budget of 24, for all heads
    budgets/pyramid    of 8 layers, a quarter of 1,024, beta 20
    budgets/windowkv   of 16 layers, mean 128, groups of 4, beta 14
"""

import dataclasses
import math
import sys
import types
import typing
from pathlib import Path

import numpy as np
from authors import definitions

N, H, K, D, M, KEPT, WINDOW = 60, 4, 2, 8, 12, 24, 6
RATIO = 0.6


def main(checkouts: Path) -> None:
    import torch
    import torch.nn.functional as F

    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(7)
    q, k, v = rng.normal(size=(1, N, H, D)), rng.normal(size=(1, N, K, D)), rng.normal(size=(1, N, K, D))
    k = k * rng.lognormal(0, 0.3, size=(1, N, K, 1)) + 0.5
    output, directions = rng.normal(size=(H, D, M)), rng.normal(size=(K, D, 6)) / math.sqrt(6)
    made = {"q": q, "k": k, "v": v, "output": output, "directions": directions}

    def rope(x, places):
        angle = places[..., None].to(torch.float64) * 10000.0 ** (-torch.arange(D // 2) * 2 / D)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()

    def rotate_half(x):
        return torch.cat([-x[..., D // 2 :], x[..., : D // 2]], dim=-1)

    repeat_kv = lambda x, n: x.repeat_interleave(n, dim=1)
    apart = lambda module, hidden: hidden.reshape(*hidden.shape[:2], -1, D).transpose(1, 2)
    sizes = {"num_attention_heads": H, "num_key_value_heads": K, "head_dim": D, "hidden_size": M, "num_hidden_layers": 8}
    module = types.SimpleNamespace(
        config=types.SimpleNamespace(**sizes, _attn_implementation="sdpa"),
        head_dim=D,
        num_key_value_groups=H // K,
        rotary_emb=rope,
        o_proj=types.SimpleNamespace(weight=torch.from_numpy(output.reshape(H * D, M).T.copy())),
    )
    given = {"torch": torch, "nn": torch.nn, "F": F, "math": math, "dataclass": dataclasses.dataclass, "_EPS": 1e-6}
    given |= {"field": dataclasses.field, "repeat_kv": repeat_kv, "rotate_half": rotate_half, "BasePress": object}
    given |= {
        "get_prerope_query_states": apart,
        "get_prerope_key_states": lambda module, hidden: torch.from_numpy(k).transpose(1, 2),
    }
    given |= {name: getattr(typing, name) for name in ("Optional", "Literal")} | {"__name__": __name__}
    given["logger"] = types.SimpleNamespace(warning=print)
    presses = checkouts / "kvpress" / "kvpress" / "presses"

    def press(file: str, name: str):
        given[name] = getattr(definitions(presses / f"{file}.py", name, **given), name)
        return given[name]

    press("scorer_press", "ScorerPress")
    hidden = torch.from_numpy(q).reshape(1, N, H * D)
    table = rope(None, torch.arange(N)[None])
    turn = lambda x: x * table[0][:, None] + rotate_half(x) * table[1][:, None]
    keys, values = turn(torch.from_numpy(k).transpose(1, 2)), torch.from_numpy(v).transpose(1, 2)
    queries = turn(apart(module, hidden))
    scores = queries @ repeat_kv(keys, H // K).transpose(2, 3) / math.sqrt(D)
    attentions = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -math.inf).softmax(-1)
    kwargs = {"position_embeddings": table}

    def score(one, seen=None):
        return one.score(module, hidden, keys.clone(), values.clone(), seen, kwargs)

    def kept(name, scores):
        made[f"kept/{name}"] = np.sort(scores.topk(KEPT, dim=-1).indices[0].numpy(), axis=-1)

    ratio = {"compression_ratio": RATIO}
    kept("norm", score(press("knorm_press", "KnormPress")(**ratio)))
    kept("difference", score(press("keydiff_press", "KeyDiffPress")(**ratio)))
    kept("streaming", score(press("streaming_llm_press", "StreamingLLMPress")(**ratio, n_sink=4)))
    snap = press("snapkv_press", "SnapKVPress")(**ratio, window_size=WINDOW, kernel_size=5)
    kept("snapkv", score(snap))
    kept("tova", score(press("tova_press", "TOVAPress")(**ratio)))
    kept("observed", score(press("observed_attention_press", "ObservedAttentionPress")(**ratio), attentions))
    expected = press("expected_attention_press", "ExpectedAttentionPress")
    kept("expected", score(expected(**ratio, n_future_positions=32, n_sink=4)))
    made["score/lag"] = score(press("lagkv_press", "LagKVPress")(**ratio, lag_size=8, n_sink=4))[0].numpy()
    kept("cur", score(press("cur_press", "CURPress")(num_sinks=4, local_window_size=16, **ratio)))
    drawn = types.SimpleNamespace(**vars(torch) | {"randn": lambda *_, **__: torch.from_numpy(directions)[None] * math.sqrt(6)})
    given["torch"] = drawn
    given["torch"] = drawn
    leverage = press("leverage_press", "LeverageScorePress")
    made["score/leverage"] = leverage.compute_leverage_scores(torch.from_numpy(k).transpose(1, 2), 6)[0].numpy()
    given["torch"] = torch
    kept(
        "critical",
        score(press("criticalkv_press", "CriticalKVPress")(press=expected(**ratio, n_future_positions=32, use_vnorm=False))),
    )

    chunks = press("chunkkv_press", "ChunkKVPress")(press=given["KnormPress"](**ratio), chunk_length=20)
    places = torch.arange(N).to(torch.float64)[None, None, :, None].expand(1, K, N, D)
    gathered = lambda one: one.compress(module, hidden, keys, places, None, kwargs)[1][0, :, :, 0].to(torch.int64).numpy()
    made["kept/chunks"] = gathered(chunks)
    press("adakv_press", "AdaKVPress")(press=snap).compress(module, hidden, keys, values, None, kwargs)
    masked = np.ones((K, N), bool)
    masked[module.masked_key_indices[1].numpy(), module.masked_key_indices[2].numpy()] = False
    made["masked/adakv"] = masked
    merging = press("merging_press", "MergingPress")(press=given["KnormPress"](**ratio))
    _, blended = merging.compress(module, hidden, keys, values, None, kwargs)
    order = score(given["KnormPress"](**ratio)).topk(KEPT, dim=-1).indices[0].argsort(-1)
    made["merged/values"] = torch.gather(blended[0], 1, order[..., None].expand(-1, -1, D)).numpy()

    pyramid = press("pyramidkv_press", "PyramidKVPress")(compression_ratio=0.75, window_size=8, beta=20)
    made["budgets/pyramid"] = np.asarray(
        [pyramid.get_layer_budget(types.SimpleNamespace(config=module.config, layer_idx=n), 1024) for n in range(8)]
    )
    code = {"torch": torch, "F": F, "math": math}
    cluster = definitions(checkouts / "WindowKV" / "models" / "compress_utils.py", "WindowKVCluster", **code).WindowKVCluster
    for task, strategy in (("localization", "max"), ("aggregation", "average")):
        cluster.layers_budget = [24]
        one = cluster(1, 0, 8, 4 if strategy == "max" else 0, 1, WINDOW, 14, 24, "given", strategy)
        whole = torch.arange(N).to(torch.float64)[None, None, :, None].expand(1, H, N, D)
        found = one.update_kv(repeat_kv(keys, H // K), queries, whole, None, H // K)[1]
        made[f"windows/{task}"] = np.sort(found[0, 0, :, 0].to(torch.int64).numpy())
    cluster.layers_budget = None
    cluster(16, 0, 8, 4, 4, WINDOW, 14, 128, "arithmetic", "max")
    made["budgets/windowkv"] = np.asarray(cluster.layers_budget)
    np.savez_compressed(Path(__file__).parent / "golden" / "presses.npz", **made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
