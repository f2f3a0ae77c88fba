"""Writes golden logits and memories of the Recurrent Memory Transformer's authors' segment loop around a tiny Llama.

    python tests/oracles/rmt.py CHECKOUTS    # needs the `oracles` extra; writes tests/oracles/golden/rmt.npz

    RMT    booydar/recurrent-memory-transformer 9d0ebe1778687995697fe68e886bc1dcf0e45e1c, modeling_rmt/language_modeling.py

`RecurrentWrapper` and `MemoryCell`, those for decoders, run as they are; the model is transformers' Llama with the weights of
llama.npz. m memory vectors, segments of L tokens:

    input      [memory ‖ segment ‖ memory], the same vectors twice, as input embeddings; causal; positions 0.. from the first
               memory vector on, anew in each segment
    memory     starts as a learned [m,D]; then the last m rows of what goes into the output head (behind the final norm)
    logits     of the segment's rows; the loss is the mean over labels shifted once, over the whole row, so that the last row of
               a segment predicts the first token of the next
    segments   `left`: of L from the start, the last may be shorter; `right`: from the end, the first may be shorter

Gradients go through all memories whatever k2 is: what this code detaches, it does not hand on.

    memory [3,24], tokens [2,15]                                  m = 3
    <align>/logits [2,15,48], loss, memories [N,2,3,24]           align: left (segments of 6, 6, 3), right (3, 6, 6);
                                                                  memories behind each segment
    <align>/dmemory [3,24]                                        gradient of the loss

Written with torch 2.13.0 and transformers 5.24.
"""

import math
import sys
from pathlib import Path

import numpy as np
from authors import definitions
from families import golden_llama

SLOTS, SEGMENT, LENGTH, ROWS = 3, 6, 15, 2


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

    file = checkouts / "recurrent-memory-transformer" / "modeling_rmt" / "language_modeling.py"
    given = {"torch": torch, "math": math, "CrossEntropyLoss": torch.nn.CrossEntropyLoss}
    given |= {"CausalLMOutputWithCrossAttentions": CausalLMOutputWithCrossAttentions}
    code = definitions(file, "MemoryCell", "RecurrentWrapper", **given)
    torch.manual_seed(0)
    cell = code.MemoryCell(golden_llama(), SLOTS).double()
    with torch.no_grad():
        cell.memory.copy_(torch.randn_like(cell.memory).float())
    tokens = torch.randint(0, 48, (ROWS, LENGTH))
    found = {"memory": cell.memory, "tokens": tokens}
    whole, memories = cell.forward, []

    def forward(*args, **options):
        out, memory = whole(*args, **options)
        memories.append(memory)
        return out, memory

    cell.forward = forward
    for align in ("left", "right"):
        memories.clear()
        wrapper = code.RecurrentWrapper(cell, segment_size=SEGMENT, segment_alignment=align, k2=1, max_n_segments=3)
        out = wrapper(tokens, labels=tokens)
        (dmemory,) = torch.autograd.grad(out["loss"], cell.memory)
        one = {"logits": out["logits"], "loss": out["loss"], "memories": torch.stack(memories), "dmemory": dmemory}
        found |= {f"{align}/{key}": value for key, value in one.items()}
    found = {key: value.detach().numpy() for key, value in found.items()}
    return {key: value.astype(np.float32 if value.dtype == np.float64 else np.int32) for key, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "rmt.npz", **arrays(Path(sys.argv[1])))
