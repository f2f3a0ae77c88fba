"""Gist tokens: how much of a glossary of eight letters a few gists can say.

    python -m experiments.ablate --config=config:ablations.gist.glossary
    python -m experiments.ablate --config='config:ablations.gist.glossary(only="1 gist")'     # one arm, minutes

Three layers of width 64 read eight pairs, gists, and questions that see the gists alone, or everything (`all seen`), or nothing
of either (`nothing seen`). Share of questions answered; chance is 0.10.

Expected (paper: instructions of 26 tokens in one gist lose little at 7B): nothing seen, 1 gist, 2, 4, 8, all seen, rising.
Measured, one seed: nothing seen 0.70 (letters are asked more than once, and earlier answers stand in the row), 1 gist 0.81,
2 gists 0.84, 4 gists 0.88, 8 gists 0.88, all seen 1.00.
"""

from configs.ablations.arms import chosen
from lcx.channels.glu import GLU
from lcx.data.glossary import Glossary
from lcx.data.pipeline import Pipeline, Weighted
from lcx.evaluation.ablation import Ablation, Arm, Variant
from lcx.evaluation.panels import Panel
from lcx.evaluation.tasks.retrieval import Retrieval
from lcx.memory.gist import Gist
from lcx.mixers.attention import Attention
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Cosine

WIDTH, LENGTH = 64, 64


def base(steps: int = 1000) -> Experiment:
    mixer = Attention(heads=2, kv_heads=2, head_dim=32)
    return Experiment(
        model=Decoder(
            vocab=264,
            width=WIDTH,
            pattern=(Layer(mixer=mixer, channel=GLU(hidden=2 * WIDTH)),),
            periods=3,
            unroll="all",
            embed_mixer=ShortConvolution(taps=2),
            memory=Gist(token=1),
        ),
        data=Pipeline(mixture=(Weighted(rows=Glossary()),), length=LENGTH, batch_size=64),
        optimizer=AdamW(learning_rate=Cosine(peak=4e-3, warmup=50, final=0.1), decay=0.01),
        steps=steps,
        checkpoint=Checkpointing(every=500),
        log_every=50,
    )


def glossary(steps: int = 1000, only: str | None = None) -> Ablation:
    """One arm a number of gists, and the controls; or only the named one."""
    gists = lambda n, control="gist": (
        ("data.mixture[0].rows", Glossary(gists=n)),
        ("model.memory", Gist(token=1, control=control)),
    )
    arms = {"nothing seen": gists(1, "negative")}
    arms |= {f"{n} gist{'s' if n > 1 else ''}": gists(n) for n in (1, 2, 4, 8)}
    arms["all seen"] = gists(1, "positive")
    arms = chosen(arms, only)
    tasks = {n: Retrieval(name=f"glossary_{n}", generator=Glossary(gists=n), examples_each=256) for n in (1, 2, 4, 8)}
    used = sorted({dict(edits)["data.mixture[0].rows"].gists for edits in arms.values()})
    return Ablation(
        base=base(steps),
        arms=tuple(Arm(name=name, edits=edits) for name, edits in arms.items()),
        variants=(Variant(method="trained", lengths=(LENGTH,)),),
        tasks=tuple(tasks[n] for n in used),
        panels=tuple(Panel(title=f"behind {n} gists, accuracy", task=f"glossary_{n}", metric="token_accuracy") for n in used),
    )
