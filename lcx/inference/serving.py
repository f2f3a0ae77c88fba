"""Serving: the root config of a model in use on a mesh, which reads prompts in chunks and answers them token by token."""

import dataclasses

from lcx.inference.shapes import bucket
from lcx.models.decoder import Decoder
from lcx.parallel.mesh import MeshSpec
from lcx.spec import Spec, edit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving(Spec):
    """rows: prompts answered at once, a power of two, as `generate` pads them. prompt, answer: most tokens of each. chunk:
    tokens of a row that a step of prefill reads. The mesh shares out rows, heads and parameters by the model's rules; a device
    holds all tokens of its rows, as the tokens of an answer come one at a time.
    """

    model: Decoder
    rows: int
    prompt: int
    answer: int
    chunk: int = 512
    mesh: MeshSpec = MeshSpec()

    def validate(self):
        for field in ("rows", "prompt", "answer", "chunk"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(self.rows.bit_count() == 1, "rows", "a power of two, to which prompts are padded")

    @property
    def length(self) -> int:
        """Tokens a row that `generate` makes room for."""
        return bucket(self.prompt) + bucket(self.answer)


def answering(model: Decoder) -> Decoder:
    """A model whose tokens come one at a time: the mesh axes that share out a row's tokens share out its cache's slots."""
    rules = dataclasses.replace(model.rules, sequence=(), slots=model.rules.slots or model.rules.sequence)
    return edit(model, "rules", rules)
