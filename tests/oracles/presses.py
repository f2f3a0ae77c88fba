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
    score/non_causal/<chunk>  [2,60] chunks of 20, and of 25, the 10 last on their own: attention alone. Queries come times
                   8^-1/2, as the class leaves out the scale; kept/non_causal by the first
    score/compactor, kept/compactor  chunks of 16, 8 sinks and 4 newest apart, blend 0.6, the leverage scores' directions
    kept/filters   of the directions `filters` [2,8], which kvpress holds with the other sign
    lazy/shares    [59] attention of the last query, mean over heads, its own token left out
    kept/lazy      places of a lazy layer, 4 first and 12 - 1 newest
    masked/duo     [4,2,60] whether a head keeps it, of `gates` [4,2], half streaming, 4 first and 12 newest
    think/keys     [60,2,8] rotated keys, 3 channels of 8 left out by a window of 6; think/norm [2,24,8] of those kept by norm
    cam/values     [2,24,8] of a budget of 24 by key norm, windows of 5, attention of all queries, draws `uniform` [2,60];
                   kept/cam [24]
    gates/early    [2] gates made of mean queries and keys, 40 places
    budgets/pyramid    of 8 layers, a quarter of 1,024, beta 20
    budgets/windowkv   of 16 layers, mean 128, groups of 4, beta 14
"""

import collections
import contextlib
import dataclasses
import math
import sys
import types
import typing
from pathlib import Path

import numpy as np
from authors import definitions, in_float64

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

    wide, keys_of = in_float64(torch), torch.from_numpy(k).transpose(1, 2)
    given |= {"torch": wide, "dataclass": dataclasses.dataclass}
    scaled = (hidden / math.sqrt(D)).contiguous()
    non_causal = press("non_causal_attention_press", "NonCausalAttnPress")
    found = non_causal(**ratio, chunk_size=20).score(module, scaled, keys, values, None, kwargs)
    made["score/non_causal/20"] = found[0].numpy()
    kept("non_causal", found)
    attend = lambda part, size: non_causal.non_causal_chunked_attn(
        queries[:, :, part] / math.sqrt(D), repeat_kv(keys, H // K)[:, :, part], size
    )
    looked = torch.cat([attend(slice(0, 50), 25), attend(slice(50, 60), 10)], dim=-1)
    made["score/non_causal/25"] = looked.view(K, H // K, N).mean(1).numpy()
    start = lambda states: states.storage_offset() // (H * D)
    given["get_prerope_key_states"] = lambda module, states: keys_of[:, :, start(states) : start(states) + states.shape[1]]
    given["torch"] = types.SimpleNamespace(**vars(wide) | {"randn": drawn.randn})
    press("leverage_press", "LeverageScorePress")
    compactor = press("compactor_press", "CompactorPress")(**ratio, chunk_size=16, sketch_dimension=6)
    found = compactor.score(module, scaled, keys, values, None, kwargs)
    made["score/compactor"] = found[0].numpy()
    kept("compactor", found)
    given["torch"] = wide

    more = np.random.default_rng(8)
    made["filters"], made["gates"] = more.normal(size=(K, D)), more.uniform(size=(4, K))
    made["uniform"] = more.uniform(size=(K, N))
    given |= {"np": np, "cache": lambda one: one, "cached": lambda *_, **__: lambda one: one}
    filters = press("qfilter_press", "QFilterPress")(**ratio)
    filters.q_filters, module.layer_idx = -torch.from_numpy(made["filters"])[None], 0
    kept("filters", score(filters))

    lazy = press("simlayerkv_press", "SimLayerKVPress")
    made["lazy/shares"] = snap.compute_window_attention(module, hidden, keys, 1, table).mean((0, 1, 2)).numpy()
    found = lazy(lazy_threshold=0.0, n_recent=12, n_initial=4).compress(module, hidden, keys, places, None, kwargs)
    made["kept/lazy"] = found[1][0, 0, :, 0].to(torch.int64).numpy()

    duo = press("duo_attention_press", "DuoAttentionPress")(head_compression_ratio=0.5)
    duo.load_attention_pattern = lambda model: (4, 12, made["gates"])
    duo.post_init_from_model(types.SimpleNamespace(device="cpu"))
    masked = np.ones((4, K, N), bool)
    for layer in range(4):
        module.layer_idx = layer
        duo.compress(module, hidden, keys, values, None, kwargs)
        masked[layer, module.masked_key_indices[1].numpy(), module.masked_key_indices[2].numpy()] = False
    made["masked/duo"], module.layer_idx = masked, 0

    texts = types.SimpleNamespace(to_pandas=lambda: texts, sample=lambda *_, **__: {"chapter": np.asarray(["a"])})
    read = types.SimpleNamespace(hidden_states=[hidden, None])
    tokens = type("Tokens", (dict,), {"to": lambda self, device: self})
    given |= {"load_dataset": lambda *_, **__: texts, "Gemma3Attention": type(None), "Qwen3Attention": type(None)}
    given["AutoTokenizer"] = types.SimpleNamespace(from_pretrained=lambda name: lambda text, **_: tokens())
    given["apply_rotary_pos_emb"] = lambda q, k, cos, sin: [x * cos[:, None] + rotate_half(x) * sin[:, None] for x in (q, k)]
    projected = {"q_proj": lambda h: h, "k_proj": lambda h: torch.from_numpy(k).reshape(1, N, K * D), "head_dim": D}
    layer = types.SimpleNamespace(self_attn=types.SimpleNamespace(**projected), input_layernorm=lambda h: h)

    class Model(types.SimpleNamespace):
        def __call__(self, **_):
            return read

    decoder = types.SimpleNamespace(layers=[layer], rotary_emb=rope)
    config = types.SimpleNamespace(**sizes | {"num_hidden_layers": 1}, name_or_path="none")
    early = press("duo_attention_press", "duo_attention_on_the_fly")
    made["gates/early"] = early(Model(config=config, device="cpu", model=decoder), num_samples=1, q_len=40)[0]

    think = press("think_press", "ThinKPress")(key_channel_compression_ratio=0.4, window_size=WINDOW)
    kwargs["hidden_states"] = hidden
    made["think/keys"] = think.compress(module, hidden, keys.clone(), values, None, kwargs)[0][0].transpose(0, 1).numpy()
    best = score(given["KnormPress"](**ratio)).topk(KEPT, dim=-1).indices.sort(-1).values[..., None].expand(-1, -1, -1, D)
    made["think/norm"] = think.compress(module, hidden, keys.gather(2, best), values, None, kwargs)[0][0].numpy()

    def bernoulli(chance):
        return (torch.from_numpy(made["uniform"])[None, :, gone] < chance).to(torch.float64)

    given["torch"] = types.SimpleNamespace(**vars(torch) | {"bernoulli": bernoulli})
    given |= {"defaultdict": collections.defaultdict, "contextmanager": contextlib.contextmanager, "AdaKVPress": type(None)}
    given["BasePress"] = type("BasePress", (), {"__post_init__": lambda self: None})
    press("decoding_press", "DecodingPress")
    cam = press("cam_press", "CAMPress")(base_press=given["KnormPress"](), target_size=KEPT, merge_budget=5)
    cam.layer_step_counts = {0: N - KEPT}
    stays = score(given["KnormPress"]()).mean(1).topk(KEPT, dim=-1).indices[0].sort().values
    gone = torch.from_numpy(np.setdiff1d(np.arange(N), stays.numpy()))
    received = attentions.view(1, K, H // K, N, N).sum((2, 3))
    cam._running_attn_sum = {0: received.clone()}
    made["kept/cam"] = stays.numpy()
    made["cam/values"] = cam.compress(module, hidden, keys, values.clone(), received, kwargs)[1][0].numpy()
    given["torch"] = torch

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
