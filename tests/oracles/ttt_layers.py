"""Writes golden outputs of the TTT authors' layers, TTT-Linear and TTT-MLP, whole and in their inner loop.

    python tests/oracles/ttt_layers.py CHECKOUTS    # needs the `oracles` extra; writes golden/ttt_layers.npz

    ttt-lm-pytorch  test-time-training/ttt-lm-pytorch cd831db10c8c9a0f6340f02da5613316a8a92b67, ttt.py

`TTTLinear` and `TTTMLP` run told float64, without caches (the dual form). 8 channels, 2 heads of d = 4, mini-batches of b = 4
tokens, rows of 11. Per head, with the weights as at the start of the mini-batch, i, j from 0 in it:

    rotary   pairs (2n, 2n + 1) of q and k by angle (position mod b) * theta ** (-2n / d); v is not rotated
    eta_ij   = base_lr / d * max(0, 1 / (i + 1) + c_i) * sigmoid(x_j . gate + gate_bias), c [b] of all heads; c_3 is negative
             enough here for a rate of 0; x is the layer's input
    inner    z = k W1 + b1, or gelu(k W1 + b1) W2 + b2 (tanh GELU); e = d/dz ||LN(z) - (v - k)||^2 / 2, LN of the head's weight
             and bias, eps 1e-6; the gradient at hidden units goes through W2 as at the start
    read     z_i = q_i W1 + b1 - sum_{j<=i} eta_ij (q_i . k_j + 1) e_j, in the MLP layer by layer, the second with the hidden
             units h_i that the updated first gives: h_i W2 + b2 - sum_{j<=i} eta_ij (h_i . h0_j + 1) e_j, h0 at the start;
             out_i = q_i + LN(z_i)
    carry    W <- W - sum_j eta_{b-1,j} (k_j)^T e_j, b1 <- b1 - sum_j eta_{b-1,j} e_j, and so on: the last row's rates
    rest     a part of a mini-batch at the end is read alike with its first rows of 1 / (i + 1) + c_i
    layer    heads joined, LayerNorm (eps 1e-6), times gelu(x @ g_proj.T) (tanh) if gated, o_proj

`shared` has one projection for q and k with depthwise causal convolutions of width 4 with biases behind it, one each, before
heads and rotary, and the gate. gelu's derivative is taken with 0.79788456 for sqrt(2 / pi) (3e-9 of it).

    <case>/x [2,11,8], out [2,11,8], cotangent, dx      case: linear, mlp, shared (linear inside); dx of sum(out * cotangent)
    <case>/weights/<name>                               the layer's own names, matrices of torch's Linear [out,in]
    <case>/{q,k,v} [2,2,8,4]                            rotated, of the two whole mini-batches
    <case>/eta [2,2,2,4,4]                              [row, head, mini-batch, i, j]
    <case>/inner [2,11,8]                               before the LayerNorm over all heads
    <case>/state/<name>                                 W1, b1, W2, b2 after two mini-batches, [2,2,...]

Written with torch 2.13.0.
"""

import sys
import types
from pathlib import Path

import numpy as np
from authors import definitions, in_float64, told_float64

WIDTH, HEADS, MINI, LENGTH, ROWS = 8, 2, 4, 11, 2
CASES = {"linear": ("TTTLinear", False, 1.0), "mlp": ("TTTMLP", False, 0.1), "shared": ("TTTLinear", True, 1.0)}


def layer(checkouts: Path, torch, kind: str, shared: bool, rate: float):
    """The authors' layer with every weight drawn anew."""
    from torch.utils._pytree import tree_map

    names = "rotate_half", "permute_qk", "undo_permute_qk", "apply_rotary_pos_emb", "RotaryEmbedding", "scan", "ln_fwd"
    names += "ln_fused_l2_bwd", "gelu_bwd", "TTTBase", "TTTLinear", "TTTMLP"
    given = {"torch": in_float64(torch), "nn": torch.nn, "F": torch.nn.functional, "tree_map": tree_map}
    made = definitions(checkouts / "ttt-lm-pytorch" / "ttt.py", *names, causal_conv1d_fn=None, **given)
    config = types.SimpleNamespace(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        mini_batch_size=MINI,
        share_qk=shared,
        use_gate=shared,
        conv_kernel=4,
        rope_theta=10_000.0,
        ttt_base_lr=rate,
        scan_checkpoint_group_size=0,
    )
    made = getattr(made, kind)(config, layer_idx=0)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            norm = name in ("ttt_norm_weight", "post_norm.weight")
            weight.copy_(torch.randn_like(weight).mul(0.3 if norm or weight.ndim < 2 else 0.5).add(norm).float())
        made.learnable_token_idx[3] = -0.4
    return made


def case(checkouts: Path, torch, name: str) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    made = layer(checkouts, torch, *CASES[name])
    seen, inner = [], made.ttt

    def ttt(inputs, *args, **options):
        out, state = inner(inputs, *args, **options)
        seen.append((inputs, out, state))
        return out, state

    made.ttt = ttt
    x = torch.randn(ROWS, LENGTH, WIDTH).float().double().requires_grad_()
    cotangent = torch.randn(ROWS, LENGTH, WIDTH).float().double()
    out = made(x, position_ids=torch.arange(LENGTH)[None].expand(ROWS, -1))
    (dx,) = torch.autograd.grad((out * cotangent).sum(), x)
    (inputs, _, state), _ = seen
    found = {"x": x, "out": out, "cotangent": cotangent, "dx": dx, "eta": inputs["eta"]}
    found |= {key[1].lower(): inputs[key].flatten(2, 3) for key in ("XQ", "XK", "XV")}
    found |= {f"state/{key.split('_')[0]}": value for key, value in state.items() if key.endswith("_states")}
    found |= {"inner": torch.cat([one[1] for one in seen], 1)}
    found |= {f"weights/{key}": value for key, value in made.named_parameters()}
    return {f"{name}/{key}": value.detach().numpy().astype(np.float32) for key, value in found.items()}


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    found = {}
    with told_float64(torch):
        for name in CASES:
            found |= case(checkouts, torch, name)
    return found


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "ttt_layers.npz", **arrays(Path(sys.argv[1])))
