"""Writes golden outputs and gradients of `GptOssAttention` of transformers: learned sinks, grouped heads, biases, a window.

    python tests/oracles/sinks.py        # needs the `oracles` extra; writes tests/oracles/golden/gpt_oss_attention.npz

Two layers, the first with a sliding window, the second without, each on the same random input, in float64 on torch CPU.
Written with transformers 5.24 and torch 2.13.0.
"""

from pathlib import Path

import numpy as np

WIDTH, HEADS, KV_HEADS, HEAD_DIM, WINDOW, THETA, LENGTH = 24, 4, 2, 6, 8, 150000.0, 21


def arrays() -> dict[str, np.ndarray]:
    """x [1,T,M], the cotangent of y, and of each layer its weights, y, and the gradients of x and of the sinks."""
    import torch
    import transformers as hf
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

    config = hf.GptOssConfig(
        hidden_size=WIDTH,
        head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        sliding_window=WINDOW,
        num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape).double()
    x, d_y = draw(1, LENGTH, WIDTH), draw(1, LENGTH, WIDTH)
    positions = torch.arange(LENGTH)[None]
    angles = gpt_oss.GptOssRotaryEmbedding(config).double()(x, positions)
    given = {"config": config, "inputs_embeds": x, "attention_mask": None, "cache": None, "position_ids": positions}
    found = {"x": x, "d_y": d_y}
    for layer, mask in enumerate((create_sliding_window_causal_mask, create_causal_mask)):
        attention = gpt_oss.GptOssAttention(config, layer).double()
        with torch.no_grad():
            for parameter in attention.parameters():
                parameter.copy_((torch.randn_like(parameter) * 0.5).float().double())
        own = x.clone().requires_grad_()
        y, _ = attention(own, angles, mask(**given))
        y.backward(d_y)
        found |= {f"{layer}/{name}": value for name, value in attention.state_dict().items()}
        found |= {f"{layer}/y": y, f"{layer}/d_x": own.grad, f"{layer}/d_sinks": attention.sinks.grad}
    return {name: value.detach().float().numpy() for name, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "gpt_oss_attention.npz", **arrays())
