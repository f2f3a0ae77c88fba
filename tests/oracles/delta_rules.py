"""Writes golden outputs of flash-linear-attention's plain forms: delta rules, TTT-Linear, coefficients of Titans.

    python tests/oracles/delta_rules.py CHECKOUTS    # needs the `oracles` extra and einops; writes golden/delta_rules.npz

    flash-linear-attention  fla-org/flash-linear-attention bc3b101dcb713ddc5bd8924b66754eb68b5ccf89, fla/ops/<rule>/naive.py

The functions run told float64. Axes are [B,T,H,D] whatever the functions take, states [B,H,Dk,Dv], rows k, columns v.

    gated/{q,k,v,beta,log_decay,start}, out, state     h <- exp(g_t) h;  h <- h + k_t (beta_t (v_t - h^T k_t))^T;
                                                       o_t = h^T q_t / sqrt(Dk), of the h that holds the token's own write
    delta/{q,k,v,beta}, out, state                     the same with g = 0 from zeros; what is held is `delta_rule_recurrence`
    gated/dq.. dlog_decay, dstart, cotangent           gradients of sum(out * cotangent)

The chunked forms there agree with these to 1e-9, which the script checks.

    ttt/{q,k,v,eta,norm_weight,norm_bias,start,start_bias}, out, state, state_bias     mini-batches of 4
                  LN over D with weight w, bias b, eps 1e-6, r = v - k, per head, with W, c as at the start of the mini-batch
                  e_j = d/dz ||LN(z) - r_j||^2 / 2 at z_j = k_j W + c
                  z_i = s q_i W + c - eta_i sum_{j<=i} (s q_i.k_j + 1) e_j, s = Dk^-1/2;  o_i = z_i + LN(z_i)
                  W <- W - eta_last sum_j k_j^T e_j, c likewise: eta is the row's, the last row's for the state

Here the residual is the state's output z, not the query, unlike the layers of `ttt_layers`, and eta has no factor of the
column. The arrays have whole mini-batches: behind a part of one this code lets its padding write to the bias c. In the folder
is no TTT-MLP.

    titans/{theta,alpha,eta} [B,H,T], beta, f, G, beta_last, f_last, g_last, momentum_last, n_last
                  beta_i = prod_{r<=i} (1 - alpha_r);  m_i = prod_{r<=i} eta_r;  f_i = sum_{j<=i} beta_i m_j / beta_j
                  n_ji = theta_j prod_{j<r<=i} eta_r;  G_ij = sum_{j<=r<=i} beta_i n_jr / beta_r;  `_last`: of the last token

so that W_i = beta_i W_0 + f_i S_0 - sum_j G_ij grad_j and S_last = momentum_last S_0 - sum_j n_last_j grad_j. Nothing else of
that file is used: its gradient through LayerNorm divides only one of three terms by D std.
Written with torch 2.13.0.
"""

import sys
from pathlib import Path

import numpy as np
from authors import definitions, in_float64, told_float64

B, T, H, DK, DV, MINI = 2, 11, 2, 4, 6, 4


def drawn(torch, *shape):
    return torch.randn(*shape).float().double()


def gated(torch, code, rng_gate) -> dict:
    q, k = drawn(torch, 2, B, T, H, DK)
    k = torch.nn.functional.normalize(k, dim=-1).float().double()
    v, start, cotangent = drawn(torch, B, T, H, DV), drawn(torch, B, H, DK, DV), drawn(torch, B, T, H, DV)
    beta = (torch.rand(B, T, H) * 1.2).float().double()
    decay = (-torch.rand(B, T, H)).float().double() if rng_gate else torch.zeros(B, T, H)
    held = {"q": q, "k": k, "v": v, "beta": beta}
    if not rng_gate:
        swapped = [x.transpose(1, 2) for x in (q, k, v, beta)]
        out, state = code.delta_rule_recurrence(*swapped)
        whole = [x[:, :, :8] for x in swapped]
        chunked, _ = code.delta_rule_chunkwise(*whole[:3], whole[3], chunk_size=4)
        torch.testing.assert_close(chunked, out[:, :, :8], rtol=1e-9, atol=1e-9)
        return held | {"out": out.transpose(1, 2), "state": state}
    held |= {"log_decay": decay, "start": start}
    given = {name: value.clone().requires_grad_() for name, value in held.items()}
    read = [given[name] for name in ("q", "k", "v", "beta", "log_decay")]
    out, state = code.naive_recurrent_gated_delta_rule(*read, initial_state=given["start"], output_final_state=True)
    grads = torch.autograd.grad((out * cotangent).sum(), list(given.values()))
    chunked, last = code.naive_chunk_gated_delta_rule(q, k, v, decay, beta, 4, initial_state=start, output_final_state=True)
    torch.testing.assert_close(chunked, out.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, state.detach(), rtol=1e-9, atol=1e-9)
    found = {f"d{name}": grad for name, grad in zip(given, grads, strict=True)}
    return held | found | {"out": out, "state": state, "cotangent": cotangent}


def ttt(torch, code) -> dict:
    whole = 12
    q, k, v = drawn(torch, 3, B, whole, H, DK)
    held = {"q": q, "k": k, "v": v, "eta": torch.rand(B, whole, H, 1).float().double() * 0.5}
    held |= {"norm_weight": 1 + 0.3 * drawn(torch, H, DK), "norm_bias": 0.3 * drawn(torch, H, DK)}
    held = {name: value.float().double() for name, value in held.items()}
    start, bias = drawn(torch, B, H, DK, DK), drawn(torch, B, H, 1, DK)
    read = [held[name].clone() for name in ("q", "k", "v", "norm_weight", "norm_bias", "eta")]
    options = {"mini_batch_size": MINI, "initial_state": start, "initial_state_bias": bias, "output_final_state": True}
    out, state, state_bias = code.chunk_ttt_linear_ref(*read, **options)
    return held | {"start": start, "start_bias": bias, "out": out, "state": state, "state_bias": state_bias}


def titans(torch, code) -> dict:
    theta, alpha, eta = (torch.rand(3, B, H, T, 1) * 0.9 + 0.05).float().double()
    found = code.combine_params(theta, alpha, eta, T)
    names = "beta", "beta_last", "f", "f_last", "g_last", "G", "momentum_last", "n_last"
    held = {"theta": theta[..., 0], "alpha": alpha[..., 0], "eta": eta[..., 0]}
    return held | dict(zip(names, found, strict=True))


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import einops
    import torch

    ops = checkouts / "flash-linear-attention" / "fla" / "ops"
    torch.manual_seed(0)
    with told_float64(torch):
        given = {"torch": in_float64(torch), "F": torch.nn.functional, "rearrange": einops.rearrange}
        names = "naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"
        found = {"gated": gated(torch, definitions(ops / "gated_delta_rule/naive.py", *names, **given), True)}
        names = "delta_rule_recurrence", "delta_rule_chunkwise"
        found["delta"] = gated(torch, definitions(ops / "delta_rule/naive.py", *names, **given), False)
        found["ttt"] = ttt(torch, definitions(ops / "ttt/naive.py", "ttt_linear", "chunk_ttt_linear_ref", **given))
        names = "cal_n", "cal_f", "cal_G", "combine_params"
        found["titans"] = titans(torch, definitions(ops / "titans/naive.py", *names, **given))
    return {
        f"{rule}/{name}": value.detach().numpy().astype(np.float32)
        for rule, held in found.items()
        for name, value in held.items()
    }


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "delta_rules.npz", **arrays(Path(sys.argv[1])))
