"""Writes golden checkpoint folders of tiny random `transformers` models, with the logits and greedy tokens that they give.

    python tests/oracles/hf_checkpoints.py        # needs the `oracles` extra; writes tests/oracles/golden/hf/<name>/

Beside the folder that `save_pretrained` writes lies answers.npz: tokens [2, LONG] and their float64 logits, each row alone; and
for the first SHORT and all LONG tokens of row 0 the NEW tokens that greedy decoding adds. Every window ends between the two.
CHAT also has a tokenizer of characters and a chat template; chat.json holds what `apply_chat_template` makes of messages.
Written with transformers 5.24.0 and torch 2.13.0.
"""

import json
import shutil
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "hf"
SHORT, LONG, NEW, WINDOW = 11, 41, 5, 24
CHAT = "llama3.1"
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role not in ("system", "user", "assistant") %}{{ raise_exception("no role " + message.role) }}{% endif %}
<{{ message.role[0] }}>{{ message.content | trim }}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}<a>{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "be kind "},
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": " bye"},
]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": WINDOW,
}
OTHER = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}  # heads of 4
GEMMA = {"query_pre_attn_scalar": 9, "sliding_window": 7}


def rope(kind: str, **entries) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **entries}}


def configs() -> dict:
    """The config of every golden model, by the name of its folder."""
    import transformers as hf

    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": WINDOW}
    lists = {"short_factor": [1.0, 1.1], "long_factor": [1.5, 3.0], "original_max_position_embeddings": WINDOW}
    both = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}
    both["sliding_attention"] = {"rope_type": "default", "rope_theta": 10000.0}
    trained = {"original_max_position_embeddings": WINDOW}
    return {
        "llama2": hf.LlamaConfig(**SIZES, **rope("default"), tie_word_embeddings=False),
        "llama3.1": hf.LlamaConfig(**SIZES | {"max_position_embeddings": 8 * WINDOW}, **rope("llama3", **llama3)),
        "llama-linear": hf.LlamaConfig(**SIZES, **rope("linear", factor=4.0), tie_word_embeddings=True),
        "llama-dynamic": hf.LlamaConfig(**SIZES, **rope("dynamic", factor=2.0)),
        "llama-biased": hf.LlamaConfig(**SIZES, **rope("default"), attention_bias=True, mlp_bias=True),
        "mistral": hf.MistralConfig(**SIZES, **rope("default"), sliding_window=9),
        "qwen2": hf.Qwen2Config(**OTHER, num_key_value_heads=1, **rope("yarn", factor=4.0, **trained)),
        "qwen2-windows": hf.Qwen2Config(
            **OTHER, num_key_value_heads=2, **rope("default"), use_sliding_window=True, sliding_window=6, max_window_layers=1
        ),
        "qwen3": hf.Qwen3Config(
            **SIZES | {"head_dim": 10}, **rope("yarn", factor=2.0, attention_factor=1.3, beta_fast=16.0, **trained)
        ),
        "gemma2": hf.Gemma2Config(**SIZES, **GEMMA, **rope("default"), attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
        "gemma3": hf.Gemma3TextConfig(
            **SIZES | {"num_hidden_layers": 3}, **GEMMA, rope_parameters=both, sliding_window_pattern=3
        ),
        "phi3": hf.Phi3Config(
            **OTHER | {"max_position_embeddings": 4 * WINDOW},
            num_key_value_heads=2,
            **rope("longrope", **lists),
            original_max_position_embeddings=WINDOW,
            pad_token_id=0,
        ),
        "smollm3": hf.SmolLM3Config(**SIZES | {"num_hidden_layers": 4}, **rope("default"), pad_token_id=0),
        "gpt-neox": hf.GPTNeoXConfig(**OTHER, **rope("default", partial_rotary_factor=0.5)),
        "gpt-neox-in-turn": hf.GPTNeoXConfig(
            **OTHER, **rope("linear", factor=2.0, partial_rotary_factor=0.5), use_parallel_residual=False
        ),
    }


def tokenizer():
    """One of characters, which puts <s> ahead of a prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<s>", "</s>", "<u>", "<a>"]
    vocabulary = {token: n for n, token in enumerate([*marks, "<unk>", " ", "\n", *"abcdefghijklmnopqrstuvwxyz.,!?"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(marks)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


def write_chat(folder: Path) -> None:
    """The tokenizer of a golden folder, and what its template makes of messages."""
    made = tokenizer()
    made.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    render = lambda messages, answer: made.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    answers = {
        "messages": MESSAGES,
        "asked": render(MESSAGES, True),
        "whole": render(MESSAGES[:3], False),
        "prompt": made("hi, you").input_ids,
        "plain": made("hi, you", add_special_tokens=False).input_ids,
    }
    (folder / "chat.json").write_text(json.dumps(answers, indent=1) + "\n")


def write(name: str, folder: Path) -> None:
    """One golden folder, the same in every call."""
    import torch
    from transformers import AutoModelForCausalLM

    config = configs()[name]
    for marks in ("bos_token_id", "eos_token_id"):
        setattr(config, marks, None)
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            drawn = torch.randn_like(parameter) * (0.1 if "norm" in path else 0.35)
            parameter.copy_(parameter + drawn if "norm" in path else drawn)
    model.save_pretrained(folder, max_shard_size="12KB" if name == "llama2" else "50GB")
    model = model.double()
    tokens = torch.randint(1, SIZES["vocab_size"], (2, LONG))
    answers = {"tokens": tokens.numpy().astype(np.int32)}
    with torch.no_grad():
        answers["short"] = torch.cat([model(input_ids=row[None, :SHORT]).logits for row in tokens]).numpy().astype(np.float32)
        answers["long"] = torch.cat([model(input_ids=row[None]).logits for row in tokens]).numpy().astype(np.float32)
        for length, key in ((SHORT, "short_greedy"), (LONG, "long_greedy")):
            ids = tokens[:1, :length]
            for _ in range(NEW):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            answers[key] = ids[0, length:].numpy().astype(np.int32)
    np.savez_compressed(folder / "answers.npz", **answers)
    (folder / "generation_config.json").unlink(missing_ok=True)


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name in configs():
        write(name, GOLDEN / name)
    write_chat(GOLDEN / CHAT)


if __name__ == "__main__":
    main()
