"""Writes golden outputs of a literal float64 recurrence of Infini-attention, of which its authors released no code.

    python tests/oracles/infini_attention.py    # writes tests/oracles/golden/infini_attention.npz

Leave no context behind: efficient infinite context transformers with Infini-attention (2024), per head, s(x) = elu(x) + 1:

    read     before the segment is written: A_mem = s(q) M / max(s(q) z, 1e-6), which of an empty memory is 0
    local    softmax over the segment's keys up to the query's own, q.k / sqrt(D), of queries and keys rotated if so; the
             memory's are not rotated (here neither is)
    out      g A_mem + (1 - g) A_local, g = sigmoid(b), b [H]
    write    linear: M + sum_t s(k_t)^T v_t; delta: M + sum_t s(k_t)^T (v_t - s(k_t) M / max(s(k_t) z, 1e-6)), M and z as before
             the segment; z + sum_t s(k_t); a last segment may be shorter and is written alike

    q, k, v [2,2,11,4], gate [2], <rule>/{out [2,2,11,4], memory [2,2,4,4], norm [2,2,4]}    segments of 4; rule: linear, delta
"""

import math
from pathlib import Path

import numpy as np

ROWS, HEADS, LENGTH, DIM, SEGMENT, LEAST = 2, 2, 11, 4, 4, 1e-6


def shifted(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def recurrence(q, k, v, gate, delta: bool):
    """One head's outputs [T,D], memory [D,D] and norm [D]."""
    memory, norm, out = np.zeros((DIM, DIM)), np.zeros(DIM), []
    for begin in range(0, LENGTH, SEGMENT):
        places = range(begin, min(begin + SEGMENT, LENGTH))
        wrote, added = memory.copy(), norm.copy()
        for t in places:
            query, key = shifted(q[t]), shifted(k[t])
            weight = np.exp([q[t] @ k[j] / math.sqrt(DIM) for j in range(begin, t + 1)])
            local = weight @ v[begin : t + 1] / weight.sum()
            share = 1 / (1 + math.exp(-gate))
            out.append(share * (query @ memory) / max(query @ norm, LEAST) + (1 - share) * local)
            held = key @ memory / max(key @ norm, LEAST) if delta else 0
            wrote, added = wrote + np.outer(key, v[t] - held), added + key
        memory, norm = wrote, added
    return np.stack(out), memory, norm


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, ROWS, HEADS, LENGTH, DIM)).astype(np.float32).astype(float)
    gate = np.float32([0.5, -1.0]).astype(float)
    found = {"q": q, "k": k, "v": v, "gate": gate}
    for rule in ("linear", "delta"):
        every = [[recurrence(q[b, h], k[b, h], v[b, h], gate[h], rule == "delta") for h in range(HEADS)] for b in range(ROWS)]
        for n, name in enumerate(("out", "memory", "norm")):
            found[f"{rule}/{name}"] = np.stack([[head[n] for head in row] for row in every])
    return {key: value.astype(np.float32) for key, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "infini_attention.npz", **arrays())
