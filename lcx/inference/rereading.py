"""The second reading of prompts, where a policy judges by it (`lcx.cache.policies.kvzip`), and what is left afterwards.

`prefill` ends in it. What it leaves is for any question:

    read = prefill(model, [context], 1, 256, 512)
    save("book", model, read)                                                      # lcx.inference.saved
    read = feed(model, *right_padded([question], 64, 1, model.spec.vocab), restore("book", model))
    answers, read = answer(model, read, max_new=32)

All other states of the model are those of the first reading.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lcx.batch import EXACT_POSITIONS, PADDING
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.kv_state import KVState
from lcx.cache.paged import PagedCache
from lcx.cache.policies.kvzip import KVzip
from lcx.cache.pruning import Pruning
from lcx.inference.reading import Consumed, passed
from lcx.inference.shapes import bucket, right_padded
from lcx.models.decoder import Decoder, DecoderModel
from lcx.record import replaced
from lcx.spec import below

ROOM = "a KVCache or a RingCache beside a policy that has prompts read twice, for which it has no room"


def rereading(spec: Decoder) -> KVzip | None:
    """The policy of a model that reads prompts twice. Raises ValueError if its layers have several, or one no room for that."""
    caches = [getattr(layer.mixer, "cache", None) for layer in spec.pattern]
    found = dict.fromkeys(cache.policy for cache in caches if _rereads(cache))
    if len(found) > 1:
        raise ValueError(f"policies {[*found]}: expected one for all layers, as prompts are read again once")
    full = [path for path, part in below(spec) if isinstance(part, DenseCache | PagedCache)]
    if found and full:
        raise ValueError(f"{full[0]}: expected {ROOM}")
    return next(iter(found), None)


def read_again(model: DecoderModel, read: Consumed, prompts: Sequence[Sequence[int]]) -> Consumed:
    """The first rows, which have read the prompts whole, with what caches choose of their tokens; the old `read` is consumed.

    Raises ValueError where they have read something else, or chosen before, or would read at places that are not exact."""
    policy = rereading(model.spec)
    if policy is None:
        return read
    lengths, seen = [*map(len, prompts)], np.asarray(read.seen).tolist()
    if seen != lengths + [0] * (len(seen) - len(lengths)) or not bool(_whole(model, read)):
        raise ValueError(f"prompts of {lengths} tokens behind rows of {seen}: expected what the rows hold, all of it, once")
    longest, most = max(lengths), policy.asking + policy.chunk
    if longest + most > EXACT_POSITIONS:
        raise ValueError(f"prompts of {longest} tokens: expected at most {EXACT_POSITIONS - most} to be read twice")
    for start in range(0, longest, policy.chunk):
        parts = [policy.repeat(prompt, start) for prompt in prompts]
        size = min(bucket(max(map(len, parts))), most)
        read = _repeated(model, *right_padded(parts, size, len(read.seen), model.spec.vocab), read, jnp.int32(start))
    return settled_slots(model, read)


@functools.partial(jax.jit, donate_argnames="read")
def _repeated(
    model: DecoderModel, tokens: Int[Array, "B T"], segments: Int[Array, "B T"], read: Consumed, start: Int[Array, ""]
) -> Consumed:
    """With what tokens from `start` on are looked at by a pass that repeats them."""
    told = lambda _, state: replaced(state, repeats=jnp.broadcast_to(start, state.seen.shape[:-1]))
    given = dataclasses.replace(read, state=_each(model.spec, told, read.state))
    found = iter(_held(model.spec, passed(model, tokens, segments, given)[1].state))
    take = lambda _, state: replaced(next(found), repeats=None)
    return dataclasses.replace(read, state=_each(model.spec, take, read.state))


@jax.jit
def _whole(model: DecoderModel, read: Consumed) -> Bool[Array, ""]:
    """Whether every cache that is read twice holds all that the rows have seen."""
    there = lambda info: (info.segments != PADDING).sum(axis=-1)
    counts = [there(s.held.info) + there(s.waiting.info)[..., None] for s in _held(model.spec, read.state)]
    return jnp.stack([(count == read.seen[:, None]).all() for count in counts]).all()


def settled_slots(model: DecoderModel, read: Consumed) -> Consumed:
    """The rows with the tokens that policies choose by what was looked at, in as few slots as hold them and an answer."""
    return read if rereading(model.spec) is None else _settled_slots(model, read)


@jax.jit
def _settled_slots(model: DecoderModel, read: Consumed) -> Consumed:
    policy, held = rereading(model.spec), [*_held(model.spec, read.state)]
    budgets = iter(_budgets(policy, held))

    def choose(cache: KVCache, state: KVState) -> KVState:
        slots = policy.slots_after(state.length, state.share)
        once = lambda state, budget: cache.placed(
            Pruning(cache, rules=model.spec.rules).once(state, budget, slots), model.spec.rules
        )
        return (jax.vmap(once) if state.seen.ndim == 2 else once)(state, next(budgets))

    return dataclasses.replace(read, state=_each(model.spec, choose, read.state))


def _budgets(policy: KVzip, held: Sequence[KVState]) -> list[Int[Array, "*L B K"]]:
    """Tokens that key heads keep, of each state as its layers are stacked."""
    layers, sizes = [], []
    for state in held:
        own = [state] if state.seen.ndim == 1 else [jax.tree.map(lambda x, n=n: x[n], state) for n in range(len(state.seen))]
        layers, sizes = layers + own, [*sizes, len(own)]
    worth = [policy.worth(s.held.marks, s.held.info, s.held.info.segments != PADDING) for s in layers]
    budgets = [policy.budget(s.seen, s.share) for s in layers]
    if policy.over == "head":
        found = [jnp.broadcast_to(b[:, None], w.shape[:2]) for w, b in zip(worth, budgets, strict=True)]
    elif policy.over == "layer":
        found = [policy.together([w], [b])[0] for w, b in zip(worth, budgets, strict=True)]
    else:
        found = policy.together(worth, budgets)
    rest = iter(found)
    groups = [[next(rest) for _ in range(size)] for size in sizes]
    return [jnp.stack(group) if state.seen.ndim == 2 else group[0] for group, state in zip(groups, held, strict=True)]


def _rereads(cache: Any) -> bool:
    return isinstance(cache, KVCache) and cache.policy is not None and cache.policy.rereads


def _each(spec: Decoder, act: Callable[[KVCache, KVState], KVState], state: dict[str, Any]) -> dict[str, Any]:
    """A model's state with `act` of each cache that is read twice and its state, of one layer or of those that are stacked."""
    caches = [getattr(layer.mixer, "cache", None) for layer in spec.pattern]
    one = lambda states: tuple(
        act(cache, part) if _rereads(cache) else part for cache, part in zip(caches, states, strict=True)
    )
    layers = state["layers"]
    return state | {"layers": [*map(one, layers)] if isinstance(layers, list) else one(layers)}


def _held(spec: Decoder, state: dict[str, Any]) -> list[KVState]:
    """The states of caches that are read twice, in the order of `_each`."""
    found: list[KVState] = []
    _each(spec, lambda _, part: found.append(part) or part, state)
    return found
