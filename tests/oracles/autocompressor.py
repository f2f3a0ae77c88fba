"""Writes golden logits and summaries of the AutoCompressors' authors' segment loop around a tiny Llama, and positions for OPT.

    python tests/oracles/autocompressor.py CHECKOUTS    # needs the `oracles` extra; writes golden/autocompressor.npz

    AutoCompressors    princeton-nlp/AutoCompressors 80352a4233c4a70504c75bf95c5f3e6d2533a863, auto_compressor.py

`AutoCompressorMixin` runs as it is on top of transformers' Llama with the weights of llama.npz, in place of the repository's
own Llama, whose attention is flash-attn's; it rotates by places in the row as that one does (0 at its first column). n summary
tokens:

    input      [softprompt ‖ segment ‖ summary tokens]; summary tokens are learned embeddings [n,D] of their own; causal;
               positions 0.. from the softprompt on, anew in each segment
    softprompt empty for the first segment; then what the last n rows give behind the final norm, put behind the softprompt
               (`accumulate`: oldest first) or in its place
    last       segment: no summary tokens unless a softprompt is asked for
    logits     of the segments' rows, joined; the loss is the mean over labels shifted once over the joined row
    substeps   a call is given the softprompt of the one before, which training detaches

OPT's position embeddings (`OPTLearnedPositionalEmbeddingWithPadding`): none (zeros) for softprompt and summary tokens, row i +
2 of the table for token i of the segment, counted anew in each segment over tokens that are no padding; padding has none.

    tokens [2,16], summary [2,24]                                n = 2; segments of 5, 7 and 4
    <case>/logits [2,16,48], softprompt [2,P,24], loss           case: accumulate (P = 6), replace (P = 2), last (P = 4, none
                                                                 asked)
    accumulate/dsummary [2,24]                                   gradient of its loss
    substep/logits [2,16,48], softprompt [2,12,24]               the same tokens again, behind accumulate/softprompt
    opt/mask [1,5], opt/rows [1,3 + 5 + 2]                       0 for none; a softprompt of 3, padding before 4 tokens

Written with torch 2.13.0 and transformers 5.24.
"""

import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from authors import definitions
from families import SIZES, golden_llama

SLOTS, SEGMENTS, ROWS = 2, [5, 7, 4], 2


def code(checkouts: Path, torch):
    from transformers.modeling_outputs import CausalLMOutputWithPast

    given = {name: getattr(typing, name) for name in ("Optional", "Union", "List", "Tuple", "Dict")}
    given |= {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "dataclass": dataclass}
    names = "SummaryConfig", "CausalACOutputWithPast", "AutoCompressorMixin", "OPTLearnedPositionalEmbeddingWithPadding"
    file = checkouts / "AutoCompressors" / "auto_compressor.py"
    return definitions(file, *names, CausalLMOutputWithPast=CausalLMOutputWithPast, PastKVType=None, **given)


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch
    import transformers as hf

    part = code(checkouts, torch)

    class Compressor(part.AutoCompressorMixin, hf.LlamaForCausalLM):
        def __init__(self, config):
            hf.LlamaForCausalLM.__init__(self, config)
            self.setup_autocompressor(config)

    config = hf.LlamaConfig(**SIZES, tie_word_embeddings=False, summary_length=SLOTS, attn_implementation="eager")
    config.use_cache = False
    torch.manual_seed(0)
    model = Compressor(config).double().eval()
    model.load_state_dict(golden_llama().state_dict(), strict=False)
    tokens = torch.randint(0, SIZES["vocab_size"], (ROWS, sum(SEGMENTS)))
    summary = model.embed_summary.weight
    with torch.no_grad():
        summary.copy_(torch.randn_like(summary).float())
    found = {"tokens": tokens, "summary": summary}
    held = None
    for name, accumulate, asked in (
        ("accumulate", True, True),
        ("replace", False, True),
        ("last", True, False),
        ("substep", True, True),
    ):
        config.accumulate_summary = accumulate
        before = held if name == "substep" else None
        out = model(
            tokens, labels=tokens, segment_lengths=SEGMENTS, softprompt=before, output_softprompt=asked, use_cache=False
        )
        found |= {f"{name}/{key}": out[key] for key in ("logits", "softprompt", "loss") if name != "substep" or key != "loss"}
        if name == "accumulate":
            held = out["softprompt"].detach()
            (found["accumulate/dsummary"],) = torch.autograd.grad(out["loss"], summary)
    found |= opt(torch, part)
    found = {key: value.detach().numpy() for key, value in found.items()}
    return {key: value.astype(np.float32 if value.dtype == np.float64 else np.int32) for key, value in found.items()}


def opt(torch, part) -> dict:
    """Rows of the table of positions, each of which holds its own number."""
    lengths = part.SummaryConfig(softprompt_length=3, summary_length=2)
    table = part.OPTLearnedPositionalEmbeddingWithPadding(16, 1, summary_config=lengths)
    with torch.no_grad():
        table.weight.copy_(torch.arange(18.0)[:, None])
        table.weight[1] = 0  # padding
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    ones = torch.ones(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.long)
    return {"opt/mask": mask, "opt/rows": table(torch.cat([ones[0], mask, ones[1]], 1))[..., 0].long()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "autocompressor.npz", **arrays(Path(sys.argv[1])))
