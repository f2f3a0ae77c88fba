"""Writes golden memories, logits and rows of the in-context autoencoder's authors' code around a tiny Llama.

    python tests/oracles/icae.py CHECKOUTS    # needs the `oracles` extra; writes tests/oracles/golden/icae.npz

    ICAE    getao/icae 469a46886a92dd5e76b2d12a8bac0fb7ed7d4cdd, code/icae_v2/modeling_icae_multi_span.py and training_utils.py

`ICAE.forward`, `_compress` and the tokenisation functions run as they are; the models are transformers' Llama with the weights
of llama.npz, the encoder's q and v projections with a low-rank addition (its LoRA, merged: W + up @ down). m memory vectors, V
tokens:

    ids      V padding; V + 1 .. V + m memory tokens; behind them AE, LM, FT; id V + 1 + n has row n of `embed`
    spans    ceil(T / (m rate)) of ceil(T / spans) tokens each, the last is shorter
    encode   each span alone: [span ‖ m memory embeddings], positions 0.., causal; its m last rows, behind the final norm
    decode   [memories of the spans in order ‖ AE] context and end-of-text -> autoencoding, [memories] or [memories ‖ LM] and
             what follows -> continuation, [begin, `[INST]`, memories ‖ FT ‖ prompt, `[/INST]`] answer and end -> instruction;
             by the model without the LoRA, ordinary embeddings, positions 0.. from the first memory on
    labels   none on memories, prompts and, continuing, on the first `leave` tokens; they are shifted once

    weights/{embed [m+3,24], {q,v}/<layer>/{up,down}}, m = 2, rate 3
    ae/{tokens [1,13], row, labels, memories [6,24], logits, loss}    one of the rows below, through both models
    rows/<case>/{row, labels}, rows/lengths, rows/spans               case: ae, lm, lm_marked, ft; ids as above

Rows of a batch are one in this code: memories of several are joined in one list.
Written with torch 2.13.0 and transformers 5.24.
"""

import math
import sys
import types
from pathlib import Path

import numpy as np
from authors import definitions
from families import SIZES, golden_llama

SLOTS, RATE, RANK, DIM, VOCAB, LEAVE = 2, 3, 2, SIZES["hidden_size"], SIZES["vocab_size"], 2
CONTEXT, REST, PROMPT, ANSWER = range(3, 16), range(16, 25), (30, 31), (32, 33, 34)


def encoder(torch):
    """The Llama with an addition to q and v, as peft's models are asked, and the addition."""
    model, found = golden_llama(), {}
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            for name in "qv":
                weight = getattr(layer.self_attn, f"{name}_proj").weight
                up, down = torch.randn(weight.shape[0], RANK).float(), torch.randn(RANK, weight.shape[1]).float()
                weight += 0.1 * (up.double() @ down.double())
                found |= {f"{name}/{n}/up": 0.1 * up, f"{name}/{n}/down": down}
    model.get_base_model = lambda: model
    return model, found


def autoencoder(checkouts: Path, torch):
    file = checkouts / "icae" / "code" / "icae_v2" / "modeling_icae_multi_span.py"
    names = "ICAE.compute_num_segments", "ICAE.forward", "ICAE._compress"
    code = definitions(file, *names, torch=torch, math=math)
    model, weights = encoder(torch)
    embed = torch.nn.Embedding(SLOTS + 3, DIM).double()
    with torch.no_grad():
        embed.weight.copy_(torch.randn_like(embed.weight).float())
    size = VOCAB + 1  # with padding
    made = types.SimpleNamespace(
        icae=model,
        decoder=golden_llama(),
        training=True,
        dim=DIM,
        vocab_size=size,
        mem_size=SLOTS,
        mean_compression_rate=RATE,
        vocab_size_with_mem=size + SLOTS,
        ae_token_id=size + SLOTS,
        lm_token_id=size + SLOTS + 1,
        ft_token_id=size + SLOTS + 2,
        eos_id=2,
        memory_token_embed=embed,
        append_sequence=torch.arange(size, size + SLOTS)[None],
        loss_fct=torch.nn.CrossEntropyLoss(ignore_index=-100),
    )
    embedding = model.model.embed_tokens
    rows = torch.nn.Embedding(
        size + SLOTS + 3, DIM, _weight=torch.cat([embedding.weight.data, torch.zeros(SLOTS + 4, DIM)]).double()
    )
    model.model.embed_tokens = rows  # as resized: its rows of further tokens are replaced before they are read
    made.compute_num_segments = lambda length: code.compute_num_segments(made, length)
    return made, code, {"embed": embed.weight} | weights


def rows(checkouts: Path, made) -> dict[str, dict]:
    """What the two objectives and fine-tuning make of a text."""
    file = checkouts / "icae" / "code" / "icae_v2" / "training_utils.py"
    names = "text_extraction", "pretrain_tokenize_function", "instruct_ft_tokenize_function"
    drawn = types.SimpleNamespace(random=lambda: 0.5, randint=lambda low, _: low)
    code = definitions(file, *names, random=drawn)
    made.tokenizer = lambda texts, **_: {"input_ids": [list(text) for text in texts]}
    memory = made.append_sequence[0].tolist()
    found = {}
    for name, ratio, marked in (("ae", 0.0, False), ("lm", 1.0, False), ("lm_marked", 1.0, True)):
        made.training_args = types.SimpleNamespace(
            model_max_length=len(CONTEXT), min_tokens_for_lm=4, leave_tokens_for_lm=LEAVE, add_special_token_for_lm=marked
        )
        text = (*CONTEXT, *(REST if ratio else ()))
        found[name] = code.pretrain_tokenize_function({"text": [text]}, made, memory, lm_ratio=ratio)
    example = {"input": [CONTEXT], "prompt": [PROMPT], "answer": [ANSWER]}
    found["ft"] = code.instruct_ft_tokenize_function(example, made, memory)
    return {name: {"row": one["prompt_answer_ids"][0], "labels": one["labels"][0]} for name, one in found.items()}


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    torch.manual_seed(0)
    made, code, weights = autoencoder(checkouts, torch)
    found = {f"weights/{key}": value for key, value in weights.items()}
    every = rows(checkouts, made)
    for name, one in every.items():
        found |= {f"rows/{name}/{key}": torch.tensor(value) for key, value in one.items()}
    tokens = torch.tensor([CONTEXT])
    row, labels = (torch.tensor([every["ae"][key]]) for key in ("row", "labels"))
    out = code.forward(made, tokens, row, labels)
    with torch.no_grad():
        memories = code._compress(made, tokens)
    found |= {"ae/tokens": tokens, "ae/row": row, "ae/labels": labels, "ae/memories": memories}
    found |= {"ae/logits": out["logits"], "ae/loss": out["loss"]}
    lengths = torch.arange(1, 20)
    spans = [math.ceil(int(n) / made.compute_num_segments(int(n))) for n in lengths]
    found |= {"rows/lengths": lengths, "rows/spans": torch.tensor(spans)}
    found = {key: value.detach().numpy() for key, value in found.items()}
    return {key: value.astype(np.float32 if value.dtype.kind == "f" else np.int32) for key, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "icae.npz", **arrays(Path(sys.argv[1])))
