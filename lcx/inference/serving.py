"""Serving: the root config of a model in use on a mesh, which reads prompts in chunks and answers them token by token."""

import dataclasses

from lcx.models.decoder import Decoder
from lcx.parallel.mesh import MeshSpec
from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving(Spec):
    """rows: prompts answered at once, padding included. length: most tokens of a row, prompt and answer. chunk: tokens of a
    row that a step of prefill reads. The mesh shares out rows, heads and parameters by the model's rules; a device holds all
    tokens of its rows, as one token at a time cannot be shared out.
    """

    model: Decoder
    rows: int
    length: int
    chunk: int = 512
    mesh: MeshSpec = MeshSpec()

    def validate(self):
        for field in ("rows", "length", "chunk"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(self.chunk < self.length, "chunk", f"less than length = {self.length}, which is prompt and answer")
