"""Writes golden frequencies and training positions of CLEX, its authors' code with given weights.

    python tests/oracles/clex.py CHECKOUTS    # needs the `oracles` extra and torchdiffeq; writes golden/clex.npz

    CLEX    DAMO-NLP-SG/CLEX 023709d923ea9492ba82a6e8341d8c02f77e34e8, CLEX/clex_layer.py

16 rotated channels, base 10,000, lambda 1, steps of 0.01 of the rule that its solver calls rk4. Arrays:

    up [8,16], down [16,8]         weights, as z @ up and @ down
    times [5]                      1, 1.5, 2, 3, 4
    <act>/released [5,8]           inv_freq at these times, act tanh or silu: float32 as released
    <act>/exact [5,8]              the same code told float64; the two differ by up to 5e-6
    <act>/zero [5,8]               told float64, with `down` zero: NTK of base * (2t - 1) ** (r / (r - 2)) within 1e-10
    positions [N,24], t, trained   training positions of rows of 24 tokens, the factor that was drawn, and the trained window

What the code does besides: it takes base 10,000 in the derivative whatever base it is given (`get_time_embedding`); where a row
is longer than the window, the last position, floor(n t / k) - 1 with k = n // trained, may be smaller than the one before it,
which is up to (n t - 2) / k.
Written with torch 2.13.0 and torchdiffeq 0.2.5.
"""

import math
import sys
from pathlib import Path

import numpy as np
from authors import definitions, in_float64, told_float64

ROTARY, LENGTH, TIMES = 16, 24, (1.0, 1.5, 2.0, 3.0, 4.0)


def rotary(checkouts: Path, torch, window: int, act: str = "tanh"):
    """The authors' module."""
    from torchdiffeq import odeint

    given = {"torch": torch, "nn": torch.nn, "math": math, "odeint": odeint}
    names = ("ODELinear", "CLEXScalingRotaryEmbedding")
    made = definitions(checkouts / "CLEX/CLEX/clex_layer.py", *names, **given).CLEXScalingRotaryEmbedding
    options = {"max_factor": 4, "param_factor": 1, "act": act, "time_dt": 0.01}
    return made(ROTARY, max_position_embeddings=window, rope_scaling=options)


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    rng = np.random.default_rng(0)
    pairs = ROTARY // 2
    up = rng.uniform(-0.25, 0.25, (pairs, ROTARY)).astype(np.float32)
    down = rng.normal(scale=0.03, size=(ROTARY, pairs)).astype(np.float32)
    found = {"up": up, "down": down, "times": np.asarray(TIMES)}

    def frequencies(torch_, act, down):
        module = rotary(checkouts, torch_, LENGTH, act)
        with torch.no_grad():
            module.proj_func.ode_up_proj.copy_(torch.from_numpy(up))
            module.proj_func.ode_down_proj.copy_(torch.from_numpy(down))
            every = module.get_continuous_freq(torch.tensor(TIMES), None, "cpu")
            for n, t in enumerate(TIMES[1:], 1):  # as in training, from 1 to t alone: the angles of position 1
                alone = module.get_continuous_freq(torch.tensor([1.0, t]), torch.ones(2), "cpu")[0, :pairs]
                torch.testing.assert_close(alone, every[n], rtol=1e-5, atol=0)
        return every.numpy()

    for act in ("tanh", "silu"):
        found[f"{act}/released"] = frequencies(torch, act, down)
        with told_float64(torch):
            found[f"{act}/exact"] = frequencies(in_float64(torch), act, down)
            found[f"{act}/zero"] = frequencies(in_float64(torch), act, 0 * down)
    return found | positions(checkouts, torch)


def positions(checkouts: Path, torch) -> dict[str, np.ndarray]:
    """Of the training pass, caught on their way to the solver; a factor of 1 does not go there."""
    found = []
    for window in (24, 12, 7, 40):
        module = rotary(checkouts, torch, window)
        module.get_continuous_freq = lambda grid, ids, device, window=window: (
            found.append((ids.numpy(), float(grid[1]), window)) or torch.zeros(LENGTH, ROTARY)
        )
        for seed in range(12):
            torch.manual_seed(seed)
            module(torch.zeros(1), LENGTH, do_train=True)
    ids, t, window = (np.stack(column) for column in zip(*found, strict=True))
    return {"positions": ids, "t": np.int32(t), "trained": np.int32(window)}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "clex.npz", **arrays(Path(sys.argv[1])))
