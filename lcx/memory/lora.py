"""LoRA of an encoder (ICAE): the additions of `lcx.lora` beside a decoder that stays as it is, summed into a copy of it."""

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.lora import LoRA
from lcx.memory.model_memory import added
from lcx.parallel.gathered import logical_axes


class LoRAModule(nnx.Module):
    """Additions to the attention layers of a decoder's slots, whose parameters are stacked over its periods."""

    def __init__(self, spec: LoRA, slots: nnx.List, rngs: nnx.Rngs):
        self.spec = spec
        pairs = lambda mixer: nnx.Dict({name: self._pair(mixer, name, rngs) for name in spec.projections})
        self.slots = nnx.List([pairs(slot.mixer) for slot in slots])

    def _pair(self, mixer: nnx.Module, name: str, rngs: nnx.Rngs) -> nnx.Dict:
        base, r = getattr(mixer, name), self.spec.rank
        (periods, *shape), (layers, *axes) = base.shape, logical_axes(base, base.ndim)
        inputs = 2 if name == "output" else 1
        drawn = jax.random.normal(rngs.params(), (periods, *shape[:inputs], r)) / jnp.sqrt(r)
        down = added(drawn, (layers, *axes[:inputs], None))
        return nnx.Dict(down=down, up=added(jnp.zeros((periods, r, *shape[inputs:])), (layers, None, *axes[inputs:])))

    def sums(self) -> dict[tuple[int, str], jax.Array]:
        """What is added to each projection, by slot and name."""
        share = self.spec.scale / self.spec.rank
        product = jax.vmap(lambda down, up: jnp.tensordot(down, up, axes=1, precision="highest"))
        pairs = ((n, name, pair) for n, slot in enumerate(self.slots) for name, pair in slot.items())
        return {(n, name): share * product(pair["down"][...], pair["up"][...]) for n, name, pair in pairs}


def adapted(model: nnx.Module, lora: LoRAModule) -> nnx.Module:
    """A copy of a decoder with the additions in its projections."""
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    for (n, name), more in lora.sums().items():
        path = ("slots", n, "mixer", name)
        flat[path] = flat[path].replace(flat[path][...] + more)
    return nnx.merge(graph, nnx.from_flat_state(flat))
