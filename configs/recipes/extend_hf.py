"""A checkpoint folder of `transformers` for a longer window: another rope, a little training on long text, a folder again.

    F=models/llama-3-8b        # config.json, *.safetensors, tokenizer.json
    python -m experiments.evaluate --config="config:recipes.extend_hf.measured('$F')" --run_dir=runs/before
    python -m experiments.train --config="config:recipes.extend_hf.extended('$F', factor=4.0)" --run_dir=runs/extended
    python -m experiments.evaluate --config="config:recipes.extend_hf.measured('runs/extended')" --run_dir=runs/after
    python -m experiments.convert --run_dir=runs/extended --format=hf --to=models/llama-3-8b-long

A folder whose rope has a factor already (Llama 3.1, YaRN) gets a larger one. Every field can be set: another rule
(`--config='set:model.rope=NTK(factor=8.0, base=500000.0)'`), positions instead of long rows, a mesh, `trainable`, and your own
text, of which the shipped source has few windows of 32768 tokens (`--config='set:tasks[0].source=TextFolder(path="books")'`).
`docs/models.md` walks through it.
"""

from pathlib import Path

from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.sources import StandardLibrary
from lcx.evaluation.evaluation import Evaluation
from lcx.evaluation.tasks.perplexity import Perplexity
from lcx.positions.extended import extended as extended_rope
from lcx.spec import edits
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.pretrained import pretrained
from lcx.training.schedules import Cosine


def extended(folder: str, factor: float = 4.0, steps: int = 100, batch_size: int = 1) -> Experiment:
    """The folder's rope for `factor` times its window (YaRN where it is plain), trained on rows of that length."""
    found = pretrained(Path(folder))
    rope, length = extended_rope(found.model.rope, found.data.length, factor)
    return Experiment(
        model=edits(found.model, [("rope", rope), ("remat", "full")]),
        data=Pipeline(
            mixture=(Weighted(rows=PackedText(source=StandardLibrary(split="train"))),),
            length=length,
            batch_size=batch_size,
            tokenizer=found.data.tokenizer,
        ),
        optimizer=AdamW(learning_rate=Cosine(peak=2e-5, warmup=10, final=0.1), decay=0.0),
        steps=steps,
        checkpoint=Checkpointing(every=100),
        init_from=folder,
    )


def measured(model: str, lengths: tuple[int, ...] = (2048, 8192, 32768)) -> Evaluation:
    """Held-out source code at each length, 16 windows or as many as there are."""
    text = Perplexity(source=StandardLibrary(split="heldout"), windows=16, fewer="take")
    return Evaluation(model=model, tasks=(text,), lengths=lengths)
