"""Reading by segments as it is written: call after call of a plain decoder, for one document a row, all of one length."""

import jax
import jax.numpy as jnp

from lcx.batch import Batch, causal_info


@jax.jit
def plain(model, embeds):
    tokens = jnp.full(embeds.shape[:2], -1)
    return model(Batch(tokens=tokens, info=causal_info(jnp.ones_like(tokens)), embeds=embeds))[0]


def rmt(model, start, tokens, lengths):
    """(hidden states, memory)."""
    bank, found, at = jnp.broadcast_to(start, (len(tokens), *start.shape)), [], 0
    for length in lengths:
        embeds = model.embedding[...][tokens[:, at : at + length]]
        hidden = plain(model, jnp.concatenate([bank, embeds, bank], axis=1))
        found.append(hidden[:, len(start) : len(start) + length])
        bank, at = hidden[:, len(start) + length :], at + length
    return jnp.concatenate(found, axis=1), bank


def auto_compressor(model, summary, tokens, lengths, *, accumulate=True, most=None, asked=True):
    """(hidden states, softprompt). asked: whether the last segment has summary tokens as well."""
    bank, found, at = jnp.zeros((len(tokens), 0, summary.shape[1])), [], 0
    for n, length in enumerate(lengths):
        embeds = model.embedding[...][tokens[:, at : at + length]]
        behind = jnp.broadcast_to(summary, (len(tokens), *summary.shape))
        if n + 1 == len(lengths) and not asked:
            behind = behind[:, :0]
        hidden = plain(model, jnp.concatenate([bank, embeds, behind], axis=1))
        front = bank.shape[1]
        found.append(hidden[:, front : front + length])
        new, at = hidden[:, front + length :], at + length
        bank = jnp.concatenate([bank, new], axis=1) if accumulate else new
        bank = bank if most is None else bank[:, max(0, bank.shape[1] - most) :]
    return jnp.concatenate(found, axis=1), bank


def icae(model, encoder, memory, tokens, lengths, *, most):
    """(hidden states, bank). encoder: the model with what is added to it. memory: its arrays by name."""
    bank, found, at = [], [], 0
    embed = lambda ids: model.embedding[...][ids]
    all_rows = lambda x: jnp.broadcast_to(x, (len(tokens), *x.shape))
    for length in lengths:
        segment = embed(tokens[:, at : at + length])
        front = [jnp.concatenate(bank, axis=1)[:, -most:], all_rows(memory["continuing"])] if bank else []
        hidden = plain(model, jnp.concatenate([*front, segment], axis=1))
        found.append(hidden[:, hidden.shape[1] - length :])
        bank.append(plain(encoder, jnp.concatenate([segment, all_rows(memory["summary"])], axis=1))[:, length:])
        at += length
    return jnp.concatenate(found, axis=1), bank


def told_back(model, vectors, mark, tokens):
    """Hidden states from which each token is predicted."""
    given = [*vectors, jnp.broadcast_to(mark, (len(tokens), *mark.shape)), model.embedding[...][tokens[:, :-1]]]
    hidden = plain(model, jnp.concatenate(given, axis=1))
    return hidden[:, hidden.shape[1] - tokens.shape[1] :]


def hmt(model, memory, tokens, lengths, *, spec):
    """(hidden states, bank). memory: its arrays by name."""
    bank, found, at, rows = [], [], 0, len(tokens)
    embed = lambda ids: model.embedding[...][ids]
    all_rows = lambda x: jnp.broadcast_to(x, (rows, *x.shape))
    for length in lengths:
        segment, start = tokens[:, at : at + length], all_rows(memory["start"])
        if not bank:
            p = start
        elif spec.recall:
            half = round(spec.segment * spec.fraction)
            given = segment[:, :half] if spec.query == "ahead" else tokens[:, at - half : at]
            mark = all_rows(memory["summary"])
            s = plain(model, jnp.concatenate([mark, embed(given), mark], axis=1))[:, -1]
            held = jnp.stack(bank[-spec.bank :], axis=1)
            q, keys = s @ memory["recall_query"], held @ memory["recall_key"]
            weights = jax.nn.softmax(jnp.einsum("bd,bnd->bn", q, keys) / spec.size**0.5)
            p = jnp.einsum("bn,bnm->bm", weights, held)[:, None]
        else:
            p = bank[-1][:, None]
        kept = tokens[:, max(0, at - spec.sensory) : at]
        hidden = plain(model, jnp.concatenate([p, embed(kept), embed(segment), p], axis=1))
        front = 1 + kept.shape[1]
        found.append(hidden[:, front : front + length])
        bank.append(hidden[:, -1])
        at += length
    return jnp.concatenate(found, axis=1), bank
