"""Writes golden logits of tiny random checkpoints of `transformers` model families, float64 forward passes on torch CPU.

    python tests/oracles/families.py        # needs the `oracles` extra; writes tests/oracles/golden/<family>.npz

Each file holds the weights under transformers' own names, two rows of tokens and the logits; the second
row begins after 3 tokens of padding, which transformers is not shown.
Written with transformers 5.24 and torch 2.13.0.
"""

from pathlib import Path

import numpy as np

SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_dropout": 0.0,
}
PADDING, LENGTH = 3, 21


def models() -> dict:
    import transformers as hf

    gemma = {"query_pre_attn_scalar": 9, "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh"}
    return {
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=False)),
        "qwen2": hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, tie_word_embeddings=True)),
        "qwen3": hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, tie_word_embeddings=True)),
        "gemma2": hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**SIZES, **gemma, attn_logit_softcapping=3.0, final_logit_softcapping=4.0)
        ),
    }


def arrays(family: str) -> dict[str, np.ndarray]:
    """Weights, tokens and logits of one family, the same in every call."""
    import torch

    torch.manual_seed(0)
    model = models()[family].double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.3).float().double())
        tokens = torch.randint(0, SIZES["vocab_size"], (2, LENGTH))
        model.config._attn_implementation = "eager"
        logits = torch.zeros(2, LENGTH, SIZES["vocab_size"], dtype=torch.float64)
        logits[0] = model(input_ids=tokens[:1]).logits[0]
        logits[1, PADDING:] = model(input_ids=tokens[1:, PADDING:]).logits[0]
    weights = {f"weights/{name}": value.float().numpy() for name, value in model.state_dict().items()}
    return weights | {"tokens": tokens.numpy().astype(np.int32), "logits": logits.float().numpy()}


def golden_llama():
    """The model of golden/llama.npz, for scripts that put something around it."""
    import torch

    model = models()["llama"].double().eval()
    with np.load(Path(__file__).parent / "golden" / "llama.npz") as held:
        weights = {key: torch.from_numpy(held[key]) for key in held if key.startswith("weights/")}
    model.load_state_dict({key.removeprefix("weights/"): value for key, value in weights.items()})
    model.config._attn_implementation = "eager"
    return model


def main() -> None:
    folder = Path(__file__).parent / "golden"
    folder.mkdir(exist_ok=True)
    for family in ("llama", "qwen2", "qwen3", "gemma2"):
        np.savez_compressed(folder / f"{family}.npz", **arrays(family))


if __name__ == "__main__":
    main()
