"""A config.json as a family reads it."""

from typing import Any

from lcx.interop.entries import check
from lcx.spec import SpecError

_IDLE = {  # keys that say nothing of what a model gives for tokens
    "_name_or_path", "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "pretraining_tp", "attention_dropout",
    "hidden_dropout", "resid_pdrop", "embd_pdrop", "classifier_dropout", "_attn_implementation", "cache_implementation",
    "attn_implementation", "is_decoder", "use_bfloat16", "unsloth_fixed", "unsloth_version",
}  # fmt: skip


class Config:
    """The entries of a config.json. `unread` are those that nothing has asked for."""

    def __init__(self, entries: dict[str, Any]):
        self.entries, self.asked = entries, set(_IDLE)
        if entries.get("quantization_config") is not None:
            raise SpecError("config.json: quantization_config: expected none, weights as they are")

    def get(self, key: str, default: Any) -> Any:
        """The entry, or the default where there is none or it is null. Raises SpecError for one of another kind."""
        self.asked.add(key)
        found = self.entries.get(key)
        check(key, found)
        return default if found is None else found

    def need(self, key: str) -> Any:
        if (found := self.get(key, None)) is None:
            raise SpecError(f"config.json: {key} is missing")
        return found

    def expect(self, key: str, *accepted: Any) -> None:
        """Raises SpecError if the entry is there and is none of these."""
        if (found := self.get(key, accepted[0])) not in accepted:
            raise SpecError(f"config.json: {key} = {found!r}: expected {' or '.join(map(repr, accepted))}")

    @property
    def unread(self) -> list[str]:
        return sorted(set(self.entries) - self.asked)
