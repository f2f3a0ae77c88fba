"""titans-pytorch's memory trained on what `configs/stress/neural_memory.py` trains this project's on.

    python -m configs.stress.titans_pytorch 1.0     the largest inner step; ends at the first loss that is not finite

The same width, heads, matrices, chunk, rows and optimizer; 300 steps. Of its code everything is as it comes, but for weights of
the memory that share storage, which torch's AdamW refuses: they are copied.
"""

import math
import sys

from lcx.data.bindings import Bindings
from lcx.data.tokenizers import ByteTokenizer
from lcx.mixers.bench import peer_memory

WIDTH, HEADS, DIM, DEPTH, CHUNK, LENGTH, STEPS, RATE = 64, 2, 32, 4, 64, 4096, 300, 4e-3


def main(step_size: float) -> None:
    import torch

    memory = peer_memory(WIDTH, HEADS, DIM, DEPTH, expand=2.0, pooled=CHUNK, chunk=CHUNK, step=step_size)
    torch.manual_seed(0)
    parts = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(264, WIDTH),
            "memory": memory,
            "norm": torch.nn.RMSNorm(WIDTH),
            "head": torch.nn.Linear(WIDTH, 264, bias=False),
        }
    )
    for parameter in parts.parameters():
        parameter.data = parameter.data.clone()
    optimizer = torch.optim.AdamW(parts.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    task, tokenizer = Bindings(keys=2, loss="all"), ByteTokenizer()
    for step in range(STEPS):
        row = torch.from_numpy(task.example(tokenizer, LENGTH + 1, step, seed=0, split="train").ids).long()
        x = parts["embedding"](row[None, :-1])
        logits = parts["head"](parts["norm"](x + parts["memory"](x)[0]))
        loss = torch.nn.functional.cross_entropy(logits[0], row[1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        found = float(loss.detach())
        if step % 10 == 0 or not math.isfinite(found):
            print(f"step {step + 1}/{STEPS} loss {found:.4f}", flush=True)
        if not math.isfinite(found):
            return


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(float(sys.argv[1]))
