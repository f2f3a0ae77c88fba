"""A checkpoint folder of `transformers` fine-tuned on conversations, by its own chat template; answers alone are learned.

    python -m experiments.train --config="config:recipes.chat_hf.tuned('models/llama-3-8b', chats='chats.jsonl')" --run_dir=runs/a
    python -m experiments.generate --run_dir=runs/a --chat
    python -m experiments.convert --run_dir=runs/a --format=hf --to=models/llama-8b-tuned

`chats.jsonl` holds {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]} a line.
`docs/models.md` walks through it.
"""

from pathlib import Path

from lcx.data.chats import Chats
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.sources import ChatLines
from lcx.spec import edit
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.pretrained import pretrained
from lcx.training.schedules import Cosine


def tuned(folder: str, chats: str, steps: int = 200, length: int | None = None, batch_size: int = 8) -> Experiment:
    """length: of rows, several conversations each; None is the folder's window."""
    found = pretrained(Path(folder))
    return Experiment(
        model=edit(found.model, "remat", "full"),
        data=Pipeline(
            mixture=(Weighted(rows=Chats(source=ChatLines(path=chats))),),
            length=length or found.data.length,
            batch_size=batch_size,
            tokenizer=found.data.tokenizer,
        ),
        optimizer=AdamW(learning_rate=Cosine(peak=1e-5, warmup=10, final=0.1), decay=0.0),
        steps=steps,
        checkpoint=Checkpointing(every=100),
        init_from=folder,
    )
