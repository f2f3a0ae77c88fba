"""Memory of the language-modelling head, chunked and naive, read off the compiled programs; nothing is allocated or run."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcx.batch import Batch, causal_info
from lcx.objectives.language_modeling import LanguageModeling
from lcx.parallel.rules import Rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadMemory:
    """Bytes of temporaries of value and gradient, and of the float32 logits of all tokens."""

    tokens: int
    vocab: int
    chunk: int
    logits: int
    naive: int
    chunked: int


class _Head(nnx.Module):
    """A model that is nothing but its head."""

    @dataclasses.dataclass(frozen=True)
    class Sharding:
        rules: Rules = Rules()
        compute: str = "float32"

    def __init__(self, hidden: Float[Array, "B T M"], matrix: Float[Array, "M V"]):
        self.spec, self.hidden, self.matrix = self.Sharding(), nnx.Param(hidden), nnx.Param(matrix)

    def __call__(self, batch, state=None, *, upto=None):
        return self.hidden[...], state, {}

    def logits(self, hidden):
        return hidden @ self.matrix[...]


def head_memory(*, tokens: int = 32_768, vocab: int = 131_072, width: int = 2048, chunk: int = 1024) -> HeadMemory:
    """Compiles value and gradient of the cross-entropy of one row, by hidden states and head, in both forms."""
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
    arrays = shape(1, tokens, width), shape(width, vocab), shape(1, tokens, dtype=jnp.int32), shape(1, tokens)

    def chunked(hidden, matrix, targets, weights):
        info = causal_info(jnp.ones_like(targets))
        batch = Batch(tokens=targets, targets=targets, loss_weights=weights, info=info)
        return LanguageModeling(chunk=chunk).loss(_Head(hidden, matrix), batch, jax.random.key(0))[0]

    def temporaries(loss):
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * tokens * vocab
    return HeadMemory(
        tokens=tokens, vocab=vocab, chunk=chunk, logits=logits, naive=temporaries(naive_loss), chunked=temporaries(chunked)
    )


def naive_loss(
    hidden: Float[Array, "B T M"], matrix: Float[Array, "M V"], targets: Array, weights: Float[Array, "B T"]
) -> Float[Array, ""]:
    """The textbook form, which holds the logits of every token."""
    logits = hidden @ matrix
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (weights * (jax.nn.logsumexp(logits, axis=-1) - chosen)).sum()


def main() -> None:
    found = head_memory()
    mib = lambda size: f"{size / 2**20:,.0f}"
    print("| tokens | vocabulary | chunk | all logits, MiB | naive temporaries, MiB | chunked temporaries, MiB | ratio |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    sizes = " | ".join(map(mib, (found.logits, found.naive, found.chunked)))
    print(f"| {found.tokens:,} | {found.vocab:,} | {found.chunk:,} | {sizes} | {found.naive / found.chunked:.1f} |")


if __name__ == "__main__":
    main()
