"""Writes what Squeezed Attention's authors make of random keys and queries: clusters' means, thresholds, tokens that are read.

    TRITON_INTERPRET=1 python tests/oracles/squeezed.py CHECKOUTS    # writes tests/oracles/golden/squeezed.npz

    SqueezedAttention    SqueezeAILab/SqueezedAttention 4a50c64eca2f20232a4e998d754d030ce3a7f6e6, squeezedattention/
                         clustering.py and kernels.py, transformers/src/transformers/models/llama/modeling_llama.py

`run_clustering` and `run_global_threshold` run as they are, told labels in place of those of cuML's k-means; the lookup of
centroids too, its kernel by Triton's interpreter. Two lookups, one above the other, follow each other as in `forward` of their
attention. Numbers are float32, and random normal; one cluster of keys and one of clusters are empty.

    k, q [L,H,N,D]    of a prefix, whose last OBSERVED keys are no cluster's
    labels [L,H,n], parents [L,H,C]    the clusters of the other keys, and clusters of these
    centroids [L,H,C,D], tops [L,H,C1,D]    means
    scores [L,H,n]    of tokens, the mean over the last queries
    thresholds [4], thresholds/tops [4]    of the shares SHARES
    asked [L,H,T,D], single [L,H,1,D]    queries behind the prefix
    read/<share>/<queries> [L,H,N]    tokens that they read; both/<share>/<queries> beside tops, whose share is the first
"""

import importlib.util
import math
import sys
import types
from pathlib import Path

import numpy as np
from authors import definitions

L, H, N, D, OBSERVED, C, TOPS, T = 2, 2, 40, 64, 8, 6, 3, 5
SHARES = (0.5, 0.7, 0.8, 0.9)


def main(checkouts: Path) -> None:
    import torch
    import triton

    folder = checkouts / "SqueezedAttention"
    rng = np.random.default_rng(3)
    made = {
        name: rng.normal(size=(L, H, n, D)).astype(np.float32) for name, n in (("k", N), ("q", N), ("asked", T), ("single", 1))
    }
    labels, parents = rng.integers(0, C - 1, (L, H, N - OBSERVED)), rng.integers(0, TOPS - 1, (L, H, C))
    made |= {"labels": labels, "parents": parents}
    told = iter([*labels.reshape(L * H, -1), *parents.reshape(L * H, -1)])
    recorded = []

    class KMeans:
        def __init__(self, **options): ...

        def fit(self, data):
            capsule = torch.utils.dlpack.to_dlpack(torch.tensor(next(told)))
            self.labels_ = types.SimpleNamespace(toDlpack=lambda: capsule)

    def quantile(x, share):
        recorded.append(x)
        return np.quantile(x, share)

    given = {"torch": torch, "F": torch.nn.functional, "math": math, "time": __import__("time"), "KMeans": KMeans}
    given |= {"np": types.SimpleNamespace(**vars(np) | {"quantile": quantile})}
    given |= {"to_dlpack": lambda x: x, "fromDlpack": lambda x: x}
    offline = definitions(folder / "squeezedattention" / "clustering.py", "run_clustering", "run_global_threshold", **given)
    layers = lambda x: {n: torch.tensor(x[n])[None] for n in range(L)}
    keys, queries = layers(made["k"]), layers(made["q"])
    centroids, of_keys = offline.run_clustering(keys, C, OBSERVED, device="cpu")
    tops, of_clusters = offline.run_clustering(centroids, TOPS, 0, device="cpu")
    above = {n: torch.gather(of_clusters[n], -1, of_keys[n]) for n in range(L)}
    over = lambda *given: offline.run_global_threshold(keys, queries, *given, OBSERVED, device="cpu")
    bounds = over(centroids, of_keys, C), over(tops, above, TOPS)
    numbers = lambda x: np.stack([x[n][0].numpy() for n in range(L)])
    made |= {"centroids": numbers(centroids), "tops": numbers(tops), "scores": recorded[0]}
    for name, bound in zip(("thresholds", "thresholds/tops"), bounds, strict=True):
        made[name] = np.asarray([bound[share] for share in SHARES])

    spec = importlib.util.spec_from_file_location("kernels", folder / "squeezedattention" / "kernels.py")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    cuda = types.SimpleNamespace(get_device_capability=lambda: (8, 0))
    file = folder / "transformers" / "src" / "transformers" / "models" / "llama" / "modeling_llama.py"
    given = {"torch": types.SimpleNamespace(**vars(torch) | {"cuda": cuda}), "triton": triton}
    given |= {"_fwd_centroid_simple_kernel_qk": kernels._fwd_centroid_simple_kernel_qk}
    given |= {"compute_k_idx_optimized": lambda mask: (None,) * 4}
    lookup = definitions(file, "_centroid_lookup_simple.forward", **given).forward

    def counts(labels, size, there):
        return torch.stack([((labels == c) * there).sum(dim=-1) for c in range(size)], dim=-1).int()

    def read(q, means, labels, size, bound, there=1):
        late = torch.full((1, H, OBSERVED), size)
        extended = torch.cat([labels, late], dim=-1)
        return lookup(None, q, means, extended, counts(labels, size, there), 1 / math.sqrt(D), bound)[-1]

    for name, queries in (("asked", made["asked"]), ("single", made["single"])):
        for share in SHARES:
            flat, both = [], []
            for n in range(L):
                q = torch.tensor(queries[n])[None]
                flat.append(read(q, centroids[n], of_keys[n], C, bounds[0][share])[0].numpy())
                first = read(q, tops[n], above[n], TOPS, bounds[1][SHARES[0]])
                there = first[..., : N - OBSERVED]
                both.append((first & read(q, centroids[n], of_keys[n], C, bounds[0][share], there))[0].numpy())
            made |= {f"read/{share}/{name}": np.stack(flat), f"both/{share}/{name}": np.stack(both)}
    np.savez_compressed(Path(__file__).parent / "golden" / "squeezed.npz", **made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
