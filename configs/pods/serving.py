"""Llama shapes that answer long prompts on TPU slices. Reports: docs/pods.md.

    python -m experiments.plan --config=config:pods.serving.llama3_8b_128k --topology=v5e:2x4
    python -m experiments.plan --config=config:pods.serving.longest --topology=v5p:1x1x1
    python -m experiments.plan --config='config:pods.serving.longest("llama3_8b", "int8", 1048576, 4096, 8)' --topology=v6e:2x4

Heads, hidden width and vocabulary are shared out; each device holds the keys and values of its key heads.
"""

from configs.models import llama
from lcx.cache.cache import Cache
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.scaled import Int8
from lcx.cache.kv_cache import KVCache
from lcx.inference.serving import Serving, answering
from lcx.parallel.mesh import MeshSpec
from lcx.spec import SpecError, edit, edits

CACHE = "pattern[0].mixer.cache"


def llama3_8b_128k() -> Serving:
    """Llama-3-8B, two prompts of up to 131,072 tokens at once, answers of up to 4,096, on `v5e:2x4`."""
    model = edit(llama.llama3_8b(), CACHE, KVCache())
    return Serving(model=model, rows=2, prompt=1 << 17, answer=4096, chunk=1024, mesh=MeshSpec(tensor=8))


def llama3_70b_128k() -> Serving:
    """Llama-3-70B, two prompts of up to 131,072 tokens at once, answers of up to 4,096, on `v5p:2x2x2`."""
    model = edit(llama.llama3_70b(), CACHE, KVCache())
    return Serving(model=model, rows=2, prompt=1 << 17, answer=4096, chunk=1024, mesh=MeshSpec(tensor=8))


def _caches() -> dict[str, Cache]:
    """By name. KVQuant's tables are those of no model: what they hold does not change what is held."""
    kvquant = lambda **options: KVCache(codec=KVQuant(codebook="uniform", **options), keys="raw")
    return {
        "bfloat16": KVCache(),
        "int8": KVCache(codec=Int8()),
        "int4 groups": KVCache(codec=IntGroups()),
        "kivi 2": KVCache(codec=KIVI()),
        "kvquant 3": kvquant(bits=3),
        "kvquant 2": kvquant(bits=2),
        "kvquant 2, no outliers": kvquant(bits=2, outliers=0.0),
    }


def longest(
    model: str = "llama2_7b",
    cache: str = "kvquant 2",
    prompt: int = 983_040,
    answer: int = 24_576,
    tensor: int = 1,
    context: int = 1,
) -> Serving:
    """One row as long as a slice holds, read 256 tokens at a time: as it stands a million tokens on `v5p:1x1x1`. model: a shape
    of `configs.models.llama`. cache: bfloat16, int8, int4 groups, kivi 2, kvquant 3, kvquant 2, or kvquant 2, no outliers.
    tensor: devices that share out heads, context: slots."""
    if cache not in (known := _caches()):
        raise SpecError(f"longest: cache = {cache!r}: expected one of {', '.join(known)}")
    if model not in (shapes := {"llama2_7b": llama.llama2_7b, "llama3_8b": llama.llama3_8b, "llama3_70b": llama.llama3_70b}):
        raise SpecError(f"longest: model = {model!r}: expected one of {', '.join(shapes)}")
    changes = [(CACHE, known[cache])]
    if context > 1:
        changes += [("rules.sequence", ("context",))]
    shape = answering(edits(shapes[model](), changes))
    return Serving(model=shape, rows=1, prompt=prompt, answer=answer, chunk=256, mesh=MeshSpec(tensor=tensor, context=context))


def llama2_7b_10m() -> Serving:
    """Ten million tokens of Llama-2-7B on `v5p:2x2x2`: two bits a number, and what values range over."""
    return longest(cache="kvquant 2, no outliers", prompt=9_961_472, answer=49_152, tensor=8)
