"""Model families of `transformers`, one file each; `family_of` finds the one of a config, `family_for` that of a decoder."""

from lcx.interop.families.config import Config
from lcx.interop.families.family import Family, same_model
from lcx.interop.families.gemma import Gemma2, Gemma3
from lcx.interop.families.gpt_neox import GPTNeoX
from lcx.interop.families.llama import Llama, Mistral
from lcx.interop.families.phi3 import Phi3
from lcx.interop.families.qwen import Qwen2, Qwen3
from lcx.interop.families.smollm3 import SmolLM3
from lcx.models.decoder import Decoder
from lcx.spec import SpecError

FAMILIES: tuple[Family, ...] = (Llama(), Mistral(), Qwen2(), Qwen3(), SmolLM3(), Phi3(), Gemma2(), Gemma3(), GPTNeoX())


def family_of(config: Config) -> Family:
    """Raises SpecError for a model that is of none of them."""
    named = config.get("model_type", None)
    for family in FAMILIES:
        if family.model_type == named:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise SpecError(
        f"config.json: model_type = {named!r}, architectures = {config.get('architectures', None)}: expected one of {known}"
    )


def family_for(spec: Decoder, window: int, first: Family | None = None) -> tuple[Family, dict]:
    """(the family that can say `spec`, what its config.json says of it), `first` if it can.

    Raises SpecError that names what no family has: the difference that the first of them finds.
    """
    refused = []
    for family in ([] if first is None else [first], *[[f] for f in FAMILIES if f is not first]):
        for one in family:
            try:
                entries = one.config(spec, window)
                differing = same_model(one.decoder(Config(entries)), spec)
            except SpecError as error:
                differing = str(error)
            if differing is None:
                return one, entries
            refused.append(f"{one.model_type}: {differing}")
    raise SpecError(f"model: no family of transformers is like it; {refused[0]}")
