"""Llama shapes that answer long prompts on TPU slices. Reports: docs/pods.md.

    python -m experiments.plan --config=config:pods.serving.llama3_8b_128k --topology=v5e:2x4

Heads, hidden width and vocabulary are shared out; each device holds the keys and values of its key heads.
"""

from configs.models import llama
from lcx.inference.serving import Serving
from lcx.parallel.mesh import MeshSpec


def llama3_8b_128k() -> Serving:
    """Llama-3-8B, two prompts of up to 131,072 tokens at once, answers of up to 4,096, on `v5e:2x4`."""
    return Serving(model=llama.llama3_8b(), rows=2, prompt=1 << 17, answer=4096, chunk=1024, mesh=MeshSpec(tensor=8))


def llama3_70b_128k() -> Serving:
    """Llama-3-70B, two prompts of up to 131,072 tokens at once, answers of up to 4,096, on `v5p:2x2x2`."""
    return Serving(model=llama.llama3_70b(), rows=2, prompt=1 << 17, answer=4096, chunk=1024, mesh=MeshSpec(tensor=8))
