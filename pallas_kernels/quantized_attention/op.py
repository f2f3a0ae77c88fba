"""Attention of a few queries to slots that are held as codes, by one of its forms; no gradient.

A form of a platform reads codes and decodes them where it computes. What it does not take is for the caller: spans of slots,
decoded one at a time and attended to as they are.
"""

from jaxtyping import Array, Float

from pallas_kernels.quantized_attention import gpu, reference, tpu
from pallas_kernels.quantized_attention.formats import Plan, Slots, invalid
from pallas_kernels.target import log_once, platform
from pallas_kernels.tile_attention.tokens import Tokens

KERNELS = {"tpu": tpu, "gpu": gpu}
FORMS = {"reference": reference, **KERNELS}


def chosen(plan: Plan, q: Float[Array, "B T H D"], slots: Slots) -> str | None:
    """The form of the platform, if it takes the call."""
    name = platform()
    if name not in KERNELS or invalid(plan, q, slots) is not None:
        return None
    reason = KERNELS[name].refused(plan, q, slots)
    log_once(
        f"attention to {plan.keys} and {plan.values}: " + (f"the {name} kernel" if reason is None else f"spans, as {reason}")
    )
    return name if reason is None else None


def forward(
    plan: Plan,
    q: Float[Array, "B T H D"],
    slots: Slots,
    q_tokens: Tokens,
    slopes: Float[Array, "B T H"] | None = None,
    *,
    form: str = "auto",
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]] | None:
    """(out, lse) in float32, 0 and -inf for rows that see nothing; slopes: of a bias, of every query.

    form: a name of `FORMS`, or `auto`, which gives None where no kernel of the platform takes the call. Raises ValueError if a
    named form does not take it.
    """
    if form == "auto":
        form = chosen(plan, q, slots)
        return None if form is None else KERNELS[form].forward(plan, q, slots, q_tokens, slopes)
    if form not in FORMS:
        raise ValueError(f"form = {form!r}: expected auto or one of {', '.join(FORMS)}")
    if (reason := invalid(plan, q, slots)) is not None:
        raise ValueError(reason)
    return FORMS[form].forward(plan, q, slots, q_tokens, slopes)
