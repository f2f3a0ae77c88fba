"""Writes golden outputs of the peer of Titans' neural memory: reads, weights and momentum after them, gradients.

    python tests/oracles/titans.py CHECKOUTS    # needs the `oracles` extra, einops, einx, assoc-scan and tensordict

    titans-pytorch  lucidrains/titans-pytorch cc016ebca455a003749be4cab715acd88fea4d38, titans_pytorch/neural_memory.py

A peer, not the authors, who released none. `NeuralMemory` runs as it is in float64. It differs from the paper in what it calls
a chunk; with `batch` b (the paper's chunk), `chunk` c (divides b), u = RMSNorm(x), of its own weight for writes and for reads:

    f(k)    = k + (gamma + 1) * LN(MLP(k)), LN without weights (eps 1e-5), erf GELU between matrices used as k @ W;
              gamma [d] is a fast weight like the matrices, learned start values per head
    k, v, q = u @ Wk.T, u @ Wv.T of the write's u, u' @ Wq.T of the read's u'; no activation, norm or convolution on them
    theta_t = max_lr * sigmoid(step(u_t)); alpha_n, eta_n = sigmoid(decay(.)), sigmoid(momentum(.)) of the mean of u in chunk n
    loss    of chunk n: sum over its tokens of theta_t * mean_d (f_V(k_t) - v_t) ** 2, with V the weights that were
            current at the last multiple of b (start values before b): its gradient is g_n
    S_n = eta_n * S_{n-1} - g_n,  W_n = (1 - alpha_n) * W_{n-1} + S_n    (without momentum S_n = -g_n), S_0 = 0

W goes on from chunk to chunk although V stays; at a multiple of b, V becomes W. Momentum is carried over multiples of b. Tokens
behind the last whole chunk write nothing. Token p (from 0) reads f_W(q_p) with the W after floor((p + 1) / c) chunks, so that
the last token of a chunk reads its own write, with c = 1 every token. With several heads the reads are multiplied by
sigmoid(u' @ gate.T) per head, joined, and multiplied by `combine`. RMSNorms have eps 2.2e-16, torch's default for float64.

Arrays of each case (heads, depth, expansion, b, c, T, momentum below; 8 channels, two rows):

    <case>/x [2,T,8], out [2,T,8], surprise [2,H,T']   T' tokens of whole chunks; mean squared errors, not times theta
    <case>/cotangent [2,T,8], dx [2,T,8]               gradient of sum(out * cotangent), through the inner gradients
    <case>/weights/<name>                              the module's own names; memory_model_parameters.0 is gamma, 1.. the W
    <case>/state/<name>, <case>/momentum/<name>        after T tokens, [2*H, ...], rows outermost; `norm.gamma`,
                                                       `model.weights.i`
    <case>/split/out [2,T,8]                           read in two calls, cut at `cut`, a multiple of b, the state handed on

Options of the class that no array uses: per-parameter rates, attention pooling, momentum of higher order, spectral norms,
weight residuals, transition gates, norms of q and k, max_grad_norm. What the arrays avoid: batch None, where every gradient of
a sequence is taken at the start values, and cuts that are no multiple of c, behind which reads are counted from the cut.
Written with torch 2.13.0.
"""

import sys
import types
from pathlib import Path

import numpy as np

DIM, ROWS = 8, 2
CASES = {  # heads, depth, expansion, b, c, T, momentum, where the sequence is cut
    "linear": (2, 1, 1.0, 4, 1, 11, True, 4),
    "mlp": (2, 2, 2.0, 4, 1, 11, True, 8),
    "chunks": (2, 2, 2.0, 6, 3, 17, True, 6),
    "no_momentum": (1, 2, 1.0, 4, 2, 11, False, 8),
}


def module(checkouts: Path, torch, heads, depth, expansion, batch, chunk, momentum):
    """The peer's module with every weight drawn anew."""
    folder = checkouts / "titans-pytorch" / "titans_pytorch"
    package = sys.modules.setdefault("titans_pytorch", types.ModuleType("titans_pytorch"))
    package.__path__ = [str(folder)]  # the package's own first lines import much that is not needed
    from titans_pytorch.memory_models import MemoryMLP
    from titans_pytorch.neural_memory import NeuralMemory

    torch.manual_seed(0)
    inner = MemoryMLP(DIM // heads, depth=depth, expansion_factor=expansion)
    options = {"dim_head": DIM // heads, "heads": heads, "model": inner, "default_step_transform_max_lr": 0.3}
    made = NeuralMemory(DIM, chunk_size=chunk, batch_size=batch, momentum=momentum, **options)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            scale = 0.2 if "norm" in name or weight.ndim < 2 or name.endswith("parameters.0") else 0.5
            weight.data = torch.randn(weight.shape).mul(scale).add("norm.weight" in name).float().double()
    return made


def case(checkouts: Path, torch, name: str) -> dict[str, np.ndarray]:
    heads, depth, expansion, batch, chunk, length, momentum, cut = CASES[name]
    made = module(checkouts, torch, heads, depth, expansion, batch, chunk, momentum)
    x = torch.randn(ROWS, length, DIM).float().double().requires_grad_()
    cotangent = torch.randn(ROWS, length, DIM).float().double()
    out, state, (surprise, _) = made(x, return_surprises=True)
    (dx,) = torch.autograd.grad((out * cotangent).sum(), x)
    first, held = made(x[:, :cut])
    second, _ = made(x[:, cut:], state=held)
    after, momentum_after = state.states
    found = {"x": x, "out": out, "surprise": surprise, "cotangent": cotangent, "dx": dx}
    found |= {"split/out": torch.cat([first, second], 1)}
    inner = ("memory_model.norm", "memory_model.model")  # the peer's own copies, which it never reads
    found |= {f"weights/{key}": value for key, value in made.named_parameters() if not key.startswith(inner)}
    found |= {f"state/{key}": value for key, value in after.items()}
    if momentum:
        found |= {
            f"momentum/{key}": value[0] if value.ndim > after[key].ndim else value for key, value in momentum_after.items()
        }
    return {f"{name}/{key}": value.detach().numpy().astype(np.float32) for key, value in found.items()}


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    torch.set_default_dtype(torch.float64)
    found = {}
    for name in CASES:
        found |= case(checkouts, torch, name)
    return found


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "titans.npz", **arrays(Path(sys.argv[1])))
