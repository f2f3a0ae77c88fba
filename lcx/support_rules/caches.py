"""Rules of whole configs: a cache stands where tokens are attention's alone, and finds what it counts on."""

import functools
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from lcx.attention.mask import Causal
from lcx.cache.cache import At
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.paged import PagedCache
from lcx.cache.policies.chelsea import Chelsea
from lcx.cache.policies.evict import Evict
from lcx.cache.ring import RingCache
from lcx.cache.selectors.squeezed import Squeezed
from lcx.inference.rereading import ROOM
from lcx.mixers.attention import Attention
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.length_rule import LengthRule, length_policy
from lcx.spec import SpecError, below
from lcx.support_rules.walk import attentions, sizes
from lcx.training.experiment import Experiment

OWN = re.compile(r"model\.pattern\[\d+\]\.mixer")  # a layer's mixer, not one within another


def _cached(experiment: Experiment) -> Iterator[tuple[str, Attention, KVCache]]:
    for path, mixer in attentions(experiment):
        if isinstance(mixer.cache, KVCache):
            yield path, mixer, mixer.cache


def caches_are_of_plain_attention(experiment: Experiment) -> Iterator[str]:
    for path, mixer in attentions(experiment):
        if isinstance(mixer.cache, DenseCache):
            continue
        if not OWN.fullmatch(path) and not isinstance(mixer.cache, RingCache):
            yield f"{path}.cache: expected a DenseCache within another mixer, which reads what attention holds"
        elif experiment.model.memory is not None:
            yield f"{path}.cache: expected a DenseCache beside model.memory, which says itself what is kept of far tokens"


def caches_meet_their_queries(experiment: Experiment) -> Iterator[str]:
    for path, mixer in attentions(experiment):
        plan = mixer.distances
        if plan is not None and plan.reads_queries and not isinstance(mixer.cache, DenseCache):
            yield f"{path}.cache: expected a DenseCache beside {path}.distances, which writes to keys what queries ask"
    for path, mixer, cache in _cached(experiment):
        policy, plan = cache.policy, mixer.distances
        if plan is not None and policy is not None and (policy.queries or policy.marks or policy.weighs):
            expected = "expected one that reads no queries and weighs no tokens"
            yield f"{path}.cache.policy: {expected} beside {path}.distances, under which a pair has no single logit"
        if plan is not None and policy is not None and policy.turned:
            expected = "expected one that reads no rotated keys"
            yield f"{path}.cache.policy: {expected} beside {path}.distances, which turns a key anew for each query"
        if policy is not None and policy.weighs and mixer.softcap is not None:
            expected = "expected one that weighs no tokens, such as Chelsea(mass='one')"
            yield f"{path}.cache.policy: {expected}, beside a softcap: no method says which comes first"


def prompts_are_read_twice(experiment: Experiment) -> Iterator[str]:
    held = [one for one in _cached(experiment) if one[2].policy is not None and one[2].policy.rereads]
    for path, mixer in attentions(experiment) if held else ():
        if isinstance(mixer.cache, DenseCache | PagedCache):
            yield f"{path}.cache: expected {ROOM}"
    for path, mixer, cache in held:
        policy, model = f"{path}.cache.policy", experiment.model
        if cache.policy != held[0][2].policy:
            yield f"{policy}: expected that of {held[0][0]}.cache, as prompts are read again once for all layers"
        if said := cache.policy.misread(experiment.data.tokenizer.encode):
            yield f"{policy}.{said}"
        behind = f"beside {policy}, which has prompts read again behind themselves"
        if mixer.mask != Causal():
            yield f"{path}.mask: expected Causal() {behind}, from where all of them is seen"
        if length_policy(model) is not None:
            yield f"{path}: expected a rope, a query scale and a position table that no length changes {behind}"
        rule, most = model.rope_of(mixer), experiment.data.length + cache.policy.asking + cache.policy.chunk
        try:
            _ = rule is None or rule.frequencies(mixer.head_dim, most)
        except SpecError as error:
            yield f"{policy}: positions up to {most}, behind the prompts: {error}"
        if model.position_table is not None and model.position_table.reach is not None:
            yield f"model.position_table: expected None {behind}, where it has no rows"
        if mixer.sinks != "none" or mixer.persistent:
            yield f"{path}.sinks, persistent: expected none beside {policy}: no method says what they take of a second reading"


def rings_hold_what_is_seen(experiment: Experiment) -> Iterator[str]:
    for path, mixer in attentions(experiment):
        if not isinstance(mixer.cache, RingCache):
            continue
        size, reach = mixer.cache.size, mixer.mask.reach
        if reach is None:
            expected = "expected one with a bound, such as Window(size=4096), or another cache than a RingCache"
            yield f"{path}.mask: {expected}, which holds the newest tokens"
        elif size is not None and size < reach:
            yield f"{path}.cache.size = {size}: expected at least {reach}, the tokens that {path}.mask reaches, or None"


def pages_are_of_one_device(experiment: Experiment) -> Iterator[str]:
    model, length = experiment.model, experiment.data.length
    for path, mixer in attentions(experiment):
        if not isinstance(mixer.cache, PagedCache):
            continue
        for axis in (*model.rules.batch, *model.rules.slots):
            if (size := sizes(experiment.mesh)[axis]) > 1:
                yield f"mesh.{axis} = {size}: expected 1 beside {path}.cache, a PagedCache, whose rows draw on one pool"
        if not mixer.cache.fits([length]):
            least = -(-length // mixer.cache.page)
            yield f"{path}.cache.pages = {mixer.cache.pages}: expected at least {least}, which a row of data.length takes"


def caches_turn_keys(experiment: Experiment) -> Iterator[str]:
    for path, mixer, cache in _cached(experiment):
        rule = experiment.model.rope_of(mixer)
        if cache.positions == "slots":
            static = isinstance(rule, FrequencyRule) and not isinstance(rule, LengthRule) and not rule.sections
            if not static or mixer.distances is not None or mixer.distance_bias is not None:
                expected = "expected 'own' but beside a rope of one axis that no length changes, and no other distances"
                yield f"{path}.cache.positions = 'slots': {expected}"
        if cache.selector is not None and (mixer.distances is not None or isinstance(rule, LengthRule)):
            expected = "expected None beside distances or a rope that turns keys anew as documents grow"
            yield f"{path}.cache.selector: {expected}, as it is told of keys that are turned for good"
        if cache.policy is not None and cache.policy.expects_turns and isinstance(rule, FrequencyRule):
            growth = rule.frequencies(mixer.head_dim, experiment.data.length).growth is not None
            if growth or rule.learned or mixer.distances is not None:
                yield f"{path}.cache.policy: expected another beside this rope, whose mean turn it does not know"


def clusters_are_of_what_is_seen(experiment: Experiment) -> Iterator[str]:
    for path, mixer, cache in _cached(experiment):
        if not isinstance(cache.selector, Squeezed):
            continue
        if mixer.mask != Causal() or mixer.distance_bias is not None:
            expected = "expected another beside a mask than Causal() or a distance_bias"
            yield f"{path}.cache.selector: {expected}, as it takes all tokens of a prefix to be seen alike"
        for axis in experiment.model.rules.slots:
            if (size := sizes(experiment.mesh)[axis]) > 1:
                yield f"mesh.{axis} = {size}: expected 1 beside {path}.cache.selector, which has all slots on one device"


def _at_its_part(sentence: str, cache: KVCache, path: str) -> str:
    """With the path of the part that it names by its class, or of the field of the cache."""
    if sentence.startswith("codec."):
        return f"{path}.{sentence}"
    for at, part in below(cache, path):
        if sentence.startswith(kind := f"{type(part).__name__}."):
            return f"{at}.{sentence.removeprefix(kind)}"
    return f"{path}: {sentence}"


def caches_fit_their_layers(experiment: Experiment) -> Iterator[str]:
    model = experiment.model
    for n, layer in enumerate(model.pattern):
        path, cache = f"model.pattern[{n}].mixer", getattr(layer.mixer, "cache", None)
        if not isinstance(cache, KVCache) or not isinstance(layer.mixer, Attention):
            continue
        mixer, layers = layer.mixer, range(n, model.depth, len(model.pattern))
        sizes = (mixer.kv_heads, mixer.head_dim, mixer.head_dim)
        try:
            for number in layers:
                cache.codec.tables(number, *sizes)
                if cache.policy is not None:
                    cache.policy.tables(number, mixer.kv_heads, mixer.head_dim)
            sizes = (1, experiment.data.length, *sizes, jnp.dtype(model.compute), 1, At(depth=model.depth, heads=mixer.heads))
            jax.eval_shape(functools.partial(cache.init, *sizes))
            shares = {1.0 if cache.policy is None else cache.policy.share(number, model.depth) for number in layers}
            leaders = {cache.leads(number) for number in layers}
        except (SpecError, ValueError) as error:
            yield _at_its_part(str(error), cache, f"{path}.cache")
            continue
        for at, part in (("policy", cache.policy), ("selector", cache.selector)):
            if part is not None and part.queries > (length := experiment.data.length):
                yield f"{path}.cache.{at} reads the newest {part.queries} queries: expected at most the {length} of a row"
        if isinstance(policy := cache.policy, Evict | Chelsea):
            stays, most = policy.sinks + policy.recent, min(policy.most(experiment.data.length, share) for share in shares)
            if stays > most:
                share = stays / (experiment.data.length * min(shares))  # of all tokens, that would hold them
                wider = "" if share > 1 else f", or keep of at least {math.ceil(share * 1e4) / 1e4:g}"
                if isinstance(policy.keep, int):
                    wider = f", or keep of at least {math.ceil(stays / min(shares))}"
                expected = f"expected at most {most} with sinks = {policy.sinks}, what keep = {policy.keep} is"
                yield f"{path}.cache.policy.recent = {policy.recent}: {expected} of {experiment.data.length} tokens{wider}"
        apart = len(shares) > 1 or leaders != {None}
        if apart and model.unroll != "all":
            yield f"model.unroll = {model.unroll!r}: expected 'all', as each layer's {path}.cache holds tokens of its own"
        if leaders != {None} and len(model.pattern) > 1:
            yield f"{path}.cache.policy: expected a model of one kind of layer, as groups of layers share a choice"
