"""Writes golden logits, recalled vectors and banks of the Hierarchical Memory Transformer's authors' code around a tiny Llama.

    python tests/oracles/hmt.py CHECKOUTS    # needs the `oracles` extra; writes tests/oracles/golden/hmt.npz

    HMT    OswaldHe/HMT-pytorch 177da4b7787557dd8475f9be62f09b5d19516cb7, modeling_rmt/language_modeling.py and
           modeling_rmt/long_mem_cross_attn.py

`RecurrentWrapper`, `MemoryCell` and `CrossAttentionMemory` run told float64, on the CPU; the model is transformers' Llama with
the weights of llama.npz. Segments of L tokens (a last one may be shorter), k sensory tokens, a bank of at most N vectors:

    query      s_n: the model reads [T ‖ first round(L / 2) tokens of the segment ‖ T], T `summary`, learned; s_n is its last
               row, behind the final norm. No sensory tokens here. round is Python's: halves to even
    recall     p_n = softmax((s_n Wq)(M Wk)^T / sqrt(hidden)) M over the bank M [B,n,D], the values the bank as it is;
               for the first segment, of which the bank is empty, p_1 is `start`, learned
    pass       [p_n ‖ last k tokens of segment n - 1 ‖ segment ‖ p_n]; the sensory tokens are embedded anew (not their hidden
               states), the first segment has none; causal, positions 0.. from p_n on: they shift by k from the second segment
               on
    bank       + the last row of the pass, behind the final norm; beyond N the oldest goes
    logits     of the segment's rows, none of sensory rows
    loss       mean over the last `mask` labels of the row, of logits one row before each

Without recall the last row of a pass is the p of the next, and no query is read.

    tokens [2,21], summary [1,24], start [1,24], weights/{wq,wk} [16,24]    Linear's [out,in]; L = 6, k = 2, N = 2, mask 10
    recall/logits [2,21,48], loss, query [4,2,24], read [3,2,24] (of segments 2..), written [4,2,24]
    recall/{dsummary,dstart,dwq,dwk}                                        gradients of the loss
    apart/logits [2,21,48], loss, written [4,2,24]                          without recall

Here the bank is what was written before, so that segment 4 reads what 2 and 3 wrote. Gradients go through banks and memories:
what this code detaches, it does not hand on. Its one other scale, 1 / hidden for models of 4096 and more in training, is not in
the arrays.
Written with torch 2.13.0 and transformers 5.24.
"""

import copy
import math
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from authors import definitions, in_float64, told_float64
from families import golden_llama

SEGMENT, SENSORY, BANK, HIDDEN, LENGTH, ROWS, MASK, DIM = 6, 2, 2, 16, 21, 2, 10, 24


def code(checkouts: Path, torch):
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

    class Nothing:
        def __init__(self, *_, **__):
            pass

        @staticmethod
        def load(_):
            return None

    folder = checkouts / "HMT-pytorch" / "modeling_rmt"
    given = {"torch": in_float64(torch), "math": math, "F": torch.nn.functional, "copy": copy}
    given |= {"CrossEntropyLoss": torch.nn.CrossEntropyLoss, "OPTConfig": Nothing, "PyTorchModelHubMixin": Nothing}
    given |= {
        "CausalLMOutputWithCrossAttentions": CausalLMOutputWithCrossAttentions,
        "get_logger": Nothing,
        "evaluate": Nothing,
    }
    given |= {"accuracy_score": lambda *_: 0, "precision_recall_fscore_support": lambda *_, **__: (0, 0, 0, 0)}
    cross = definitions(folder / "long_mem_cross_attn.py", "CrossAttentionMemory", **given).CrossAttentionMemory
    names = "MemoryMap", "MemoryCell", "SegmentIterator", "RecurrentWrapper"
    return definitions(folder / "language_modeling.py", *names, CrossAttentionMemory=cross, **given)


def drawn(torch, parameter, scale: float = 1.0) -> None:
    with torch.no_grad():
        parameter.copy_(torch.randn_like(parameter).mul(scale).float())


def case(torch, part, recall: bool) -> dict:
    torch.manual_seed(0)
    model = golden_llama()
    cell = part.MemoryCell(model, 1, SENSORY)
    drawn(torch, cell.memory)
    emb = model.get_input_embeddings() if recall else None
    wrapper = part.RecurrentWrapper(cell, emb, DIM, HIDDEN, BANK, mask_size=MASK, n_cell_out=99, k2=1, max_n_segments=4)
    queries, reads, written = [], [], []
    if recall:
        learned = {"summary": wrapper.mem, "wq": wrapper.cross_attn.wq.weight, "wk": wrapper.cross_attn.wk.weight}
        for name, one in learned.items():
            drawn(torch, one, 1.0 if name == "summary" else 0.3)
        attend = wrapper.cross_attn.forward

        def cross(memory, inputs, *args):
            found = attend(memory, inputs, *args)
            queries.append(inputs[:, 0])
            reads.extend([] if found[0] is None else [found[0][:, 0]])
            return found

        wrapper.cross_attn.forward = cross
    whole = cell.forward

    def forward(*args, **options):
        found = whole(*args, **options)
        written.extend([found[1][:, 0]] if "output_hidden_states" in options else [])  # passes, not queries
        return found

    cell.forward = forward
    torch.manual_seed(1)
    tokens = torch.randint(0, 48, (ROWS, LENGTH))
    out, _ = wrapper(tokens, labels=tokens, attention_mask=torch.ones_like(tokens), segment_size=SEGMENT)
    found = {"logits": out["logits"], "loss": out["loss"], "written": torch.stack(written)}
    if not recall:
        return {f"apart/{key}": value for key, value in found.items()}
    learned |= {"start": cell.memory}
    grads = torch.autograd.grad(out["loss"], list(learned.values()))
    found |= {"query": torch.stack(queries), "read": torch.stack(reads)}
    found |= {f"d{key}": grad for key, grad in zip(learned, grads, strict=True)}
    held = {f"weights/{key}" if key in ("wq", "wk") else key: value for key, value in learned.items()}
    return {f"recall/{key}": value for key, value in found.items()} | held | {"tokens": tokens}


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    same = mock.patch.multiple(torch.Tensor, cuda=lambda x: x, bfloat16=torch.Tensor.double, create=True)
    with told_float64(torch), same:
        part = code(checkouts, torch)
        found = case(torch, part, recall=True) | case(torch, part, recall=False)
    found = {key: value.detach().numpy() for key, value in found.items()}
    return {key: value.astype(np.float32 if value.dtype == np.float64 else np.int32) for key, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "hmt.npz", **arrays(Path(sys.argv[1])))
