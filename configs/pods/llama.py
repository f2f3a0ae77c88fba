"""Llama shapes at long context on TPU slices: whole training steps with AdamW that fit their chips. Reports: docs/pods.md.

    python -m experiments.plan --config=config:pods.llama.llama3_8b_1m --topology=v5e:16x16

One row of the whole length a group of devices; parameters, gradients and moments are spread over all of them; zigzag rows over
rings, the inner ring on the second mesh axis. What attention gave is kept, so that no ring runs twice; the head is gathered a
part of the vocabulary at a time, of whole lanes of 128 words. The text is the standard library's, for want of a corpus: set
data.
"""

from configs.models import llama
from lcx.attention.ring import Ring
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.sources import StandardLibrary
from lcx.models.decoder import Decoder
from lcx.objectives.language_modeling import LanguageModeling
from lcx.parallel.layout import Zigzag
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.positions.yarn import YaRN
from lcx.spec import edit, edits
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Cosine

SPREAD = Rules(batch=("data",), sequence=("fsdp", "context"), width=("fsdp", "context"), vocab=())


def _pod(model: Decoder, length: int, mesh: MeshSpec, parts: int = 6) -> Experiment:
    return Experiment(
        model=edits(model, [("rules", SPREAD), ("communication", Ring()), ("remat", "attention")]),
        data=Pipeline(
            mixture=(Weighted(rows=PackedText(source=StandardLibrary(split="train"))),), length=length, batch_size=mesh.data
        ),
        optimizer=AdamW(learning_rate=Cosine(peak=1e-5, warmup=100)),
        steps=1000,
        objective=LanguageModeling(parts=parts),
        mesh=mesh,
        layout=Zigzag(),
    )


def llama3_8b_128k() -> Experiment:
    """Llama-3-8B at 131,072 tokens on `v5e:8x8`."""
    return _pod(llama.llama3_8b(), 1 << 17, MeshSpec(fsdp=8, context=8))


def llama3_8b_1m() -> Experiment:
    """Llama-3-8B at 1,048,576 tokens on `v5e:16x16`."""
    return _pod(llama.llama3_8b(), 1 << 20, MeshSpec(fsdp=16, context=16))


def llama3_8b_128k_extended(folder: str | None = None) -> Experiment:
    """Llama-3-8B from 8,192 to 131,072 tokens by YaRN on `v5e:16x16`; from a checkpoint folder."""
    return _extended(16.0, MeshSpec(fsdp=16, context=16), folder)


def llama3_8b_1m_extended(folder: str | None = None) -> Experiment:
    """Llama-3-8B from 8,192 to 1,048,576 tokens by YaRN on `v5e:16x16`; from a checkpoint folder."""
    return _extended(128.0, MeshSpec(fsdp=16, context=16), folder)


def llama3_8b_4m() -> Experiment:
    """Llama-3-8B at 4,194,304 tokens on `v5p:4x8x8`."""
    return _pod(llama.llama3_8b(), 4 << 20, MeshSpec(fsdp=16, context=16))


def llama3_8b_10m() -> Experiment:
    """Llama-3-8B at 10,485,760 tokens on `v5p:8x8x8`."""
    return _pod(llama.llama3_8b(), 10 << 20, MeshSpec(fsdp=16, context=32))


def llama3_70b_128k() -> Experiment:
    """Llama-3-70B at 131,072 tokens on `v6e:16x16`."""
    return _pod(llama.llama3_70b(), 1 << 17, MeshSpec(fsdp=16, context=16))


def llama3_70b_1m() -> Experiment:
    """Llama-3-70B at 1,048,576 tokens on `v5p:8x8x8`."""
    return _pod(llama.llama3_70b(), 1 << 20, MeshSpec(fsdp=16, context=32))


def lwm_7b_1m() -> Experiment:
    """The last stage of LWM (2024): Llama-2-7B at 1,048,576 tokens, base 5e7, on `v4:8x8x8`."""
    return _pod(llama.llama2_7b(base=5e7), 1 << 20, MeshSpec(fsdp=16, context=32), parts=5)


def _extended(factor: float, mesh: MeshSpec, folder: str | None) -> Experiment:
    rope = YaRN(factor=factor, original_length=8192, base=500000.0)
    model = edit(llama.llama3_8b(), "rope", rope)
    return edit(_pod(model, round(8192 * factor), mesh), "init_from", folder)
