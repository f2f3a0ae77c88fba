"""A checkpoint folder of `transformers` fine-tuned on conversations, by its own chat template; answers alone are learned.

    F=models/llama-3-8b-instruct      # config.json, *.safetensors, tokenizer.json, chat_template.jinja
    python -m experiments.train --config="config:recipes.chat_hf.tuned('$F', chats='chats.jsonl')" --run_dir=runs/tuned
    python -m experiments.train --config="config:recipes.chat_hf.adapted('$F', chats='chats.jsonl')" --run_dir=runs/lora
    python -m experiments.generate --run_dir=runs/lora --chat
    python -m experiments.convert --run_dir=runs/lora --format=hf --to=models/merged     # or --format=peft, the adapter

`chats.jsonl` holds {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]} a line.
`docs/models.md` walks through it.
"""

from pathlib import Path

from lcx.data.chats import Chats
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.sources import ChatLines
from lcx.lora import OF_ATTENTION, LoRA
from lcx.spec import edit, edits
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


def adapted(
    folder: str, chats: str, rank: int = 16, steps: int = 200, length: int | None = None, batch_size: int = 8
) -> Experiment:
    """`tuned`, of LoRA alone: on every projection of attention and channels that the folder's layers have."""
    base = tuned(folder, chats, steps, length, batch_size)
    of_channels = set.intersection(*(set(layer.channel.matrices) for layer in base.model.pattern))
    projections = (*OF_ATTENTION, *(name for name in ("gate", "up", "down") if name in of_channels))
    lora = LoRA(rank=rank, projections=projections, scale=2.0 * rank, dropout=0.05)
    rate = ("optimizer.learning_rate.peak", 2e-4)
    return edits(base, [("model.lora", lora), ("trainable", ("*/lora/*",)), rate])
