"""Attention to held slots as they are coded, by a kernel that decodes where it computes.

For what the kernels take: a few queries, a softmax of one scale whose keys are as they are or rotated by positions. The rest is
for spans (`spans.py`), and so is a CPU; by name, the reference form decodes all slots.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx.attention.mask import tokens_of
from lcx.attention.merge import Part
from lcx.batch import TokenInfo
from lcx.cache.layered import rows_from
from lcx.positions.frequencies import Frequencies
from lcx.positions.rotate import tables_of
from pallas_kernels import angles
from pallas_kernels.quantized_attention import op
from pallas_kernels.quantized_attention.formats import Arrays, Format, Plan, Slots, Turning
from pallas_kernels.tile_attention.op import Fold, Tiled


def attend_codes(
    fold: Fold,
    q: Float[Array, "B T H _"],
    q_info: TokenInfo,
    keys: tuple[Format, Arrays] | None,
    values: tuple[Format, Arrays] | None,
    info: TokenInfo,
    *,
    used: Int[Array, "B"],
    extra: Float[Array, "B K S"] | None,
    frequencies: Frequencies | None,
    first: Int[Array, ""] | int = 0,
) -> Part | None:
    """(out [B, T, H, E], lse [B, T, H]) of queries and all slots, or None if no kernel takes the call.

    fold: the attention of which this is a part. info: [B, K or 1, S]; slots from `used` on are empty. extra: added to the
    logits of each. frequencies: of the rope that raw keys are rotated by, None if they are as queries meet them. first: the
    row of keys, values and info that is row 0 of the queries.
    """
    if not isinstance(fold, Tiled) or keys is None or values is None or fold.form == "xla":
        return None
    bias = None if fold.decay is None else fold.decay.bias(q)
    cosine = sine = turning = None
    if frequencies is not None:
        by_row = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows_from(info, first, len(q)))
        if frequencies.by_length or frequencies.growth is not None or info.positions.shape[-1] > 1:
            cosine, sine = tables_of("key", by_row.positions, frequencies, by_row.lengths)
        else:
            parts = jnp.stack([jnp.asarray(x, jnp.float32) for x in angles.parts(frequencies.inv_freq / (2 * np.pi))])
            positions = info.positions.reshape(-1, *info.positions.shape[2:])
            turning = Turning(positions[..., 0], parts, jnp.float32(frequencies.factor))
    plan = Plan(
        keys[0],
        values[0],
        fold.mask,
        fold.scale,
        fold.softcap,
        along="index" if bias is None else bias.along,
        pairing="half" if frequencies is None else frequencies.pairing,
    )
    slots = Slots(keys[1], values[1], tokens_of(info), used, extra, cosine, sine, turning, first)
    form = "reference" if fold.form == "reference" else "auto"
    return op.forward(plan, q, slots, tokens_of(q_info), None if bias is None else bias.slopes, form=form)
