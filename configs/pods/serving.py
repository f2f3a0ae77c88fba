"""Llama shapes that answer long prompts on TPU slices. Reports: docs/pods.md.

    python -m experiments.plan --config=config:pods.serving.llama3_8b_128k --topology=v5e:2x4
    python -m experiments.plan --config='config:pods.serving.longest("llama3_8b", "int8", 917504, 16384)' --topology=v5p:1x1x1

Heads, hidden width and vocabulary are shared out; each device holds the keys and values of its key heads.
"""

from configs.models import llama
from lcx.cache.cache import Cache
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.scaled import Int8
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.inference.serving import Serving, answering
from lcx.parallel.mesh import MeshSpec
from lcx.spec import edits


def llama3_8b_128k() -> Serving:
    """Llama-3-8B, two prompts of up to 131,072 tokens at once, answers of up to 4,096, on `v5e:2x4`."""
    return Serving(model=llama.llama3_8b(), rows=2, prompt=1 << 17, answer=4096, chunk=1024, mesh=MeshSpec(tensor=8))


def llama3_70b_128k() -> Serving:
    """Llama-3-70B, two prompts of up to 131,072 tokens at once, answers of up to 4,096, on `v5p:2x2x2`."""
    return Serving(model=llama.llama3_70b(), rows=2, prompt=1 << 17, answer=4096, chunk=1024, mesh=MeshSpec(tensor=8))


def caches() -> dict[str, Cache]:
    """By name. KVQuant's tables are those of no model: what they hold does not change what is held."""
    kvquant = lambda **options: KVCache(codec=KVQuant(codebook="uniform", **options), keys="raw")
    return {
        "bfloat16": DenseCache(),
        "int8": KVCache(codec=Int8()),
        "int4 groups": KVCache(codec=IntGroups()),
        "kivi 2": KVCache(codec=KIVI()),
        "kvquant 3": kvquant(bits=3),
        "kvquant 2": kvquant(bits=2),
        "kvquant 2, no outliers": kvquant(bits=2, outliers=0.0),
    }


def longest(
    model: str = "llama3_8b", cache: str = "int8", prompt: int = 1 << 17, answer: int = 4096, tensor: int = 1, context: int = 1
) -> Serving:
    """One row as long as a slice holds, read 256 tokens at a time. model: a shape of `configs.models.llama`. cache: one of
    `caches`. tensor: devices that share out heads, context: slots."""
    changes = [("pattern[0].mixer.cache", caches()[cache])]
    if context > 1:
        changes += [("rules.sequence", ("context",))]
    shape = answering(edits(getattr(llama, model)(), changes))
    return Serving(model=shape, rows=1, prompt=prompt, answer=answer, chunk=256, mesh=MeshSpec(tensor=tensor, context=context))
