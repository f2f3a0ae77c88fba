"""Layouts: which tokens of a row lie on which device of the sequence axes.

A layout is one permutation of the columns of a batch, applied when it is placed on the mesh, after targets were shifted. Tokens
carry what masks and rotations read, so everything but parts that read array neighbours (`sequential`) works on any layout.
Causal work is balanced by zigzag (Llama 3, 2024; ring-flash-attention) and striped layouts (Striped Attention, 2023), where a
contiguous one leaves half of a ring idle.
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Int

from lcx.batch import Batch
from lcx.spec import Spec, SpecError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout(Spec, abc.ABC):
    """Base of every layout. `keeps_order`: neighbours in a row stay neighbours, over the borders of devices too."""

    keeps_order: ClassVar[bool] = False

    @abc.abstractmethod
    def parts(self, shards: int) -> int:
        """What the length of a row must be a multiple of."""

    @abc.abstractmethod
    def _places(self, length: int, shards: int) -> Int[np.ndarray, "T"]:
        """The token at each column, device after device."""

    def permutation(self, length: int, shards: int) -> Int[np.ndarray, "T"]:
        """The token of a row that lies at each column; device r of `shards` holds the r-th equal run of columns.

        Raises SpecError if the length does not divide.
        """
        if length % self.parts(shards):
            needs = f"a multiple of {self.parts(shards)} for {type(self).__name__} over {shards} devices"
            raise SpecError(f"layout: rows of {length} tokens: expected {needs}")
        return self._places(length, shards)

    def lay(self, batch: Batch, shards: int) -> Batch:
        """The batch with its columns in this layout: every array whose second axis is the sequence."""
        length = batch.shape[1]
        places = self.permutation(length, shards)
        if np.array_equal(places, np.arange(length)):
            return batch
        return jax.tree.map(lambda x: x[:, places] if x.ndim > 1 and x.shape[1] == length else x, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contiguous(Layout):
    """Device r holds the r-th run of a row."""

    keeps_order = True

    def parts(self, shards):
        return shards

    def _places(self, length, shards):
        return np.arange(length)

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zigzag(Layout):
    """Device r of W holds runs r and 2W - 1 - r of 2W: an early one and a late one."""

    def parts(self, shards):
        return 2 * shards

    def _places(self, length, shards):
        runs = np.arange(length).reshape(2 * shards, -1)
        return np.stack([runs[:shards], runs[: shards - 1 : -1]], axis=1).ravel()

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Striped(Layout):
    """Runs of `granularity` tokens are dealt to the devices in turn."""

    granularity: int = 1

    def validate(self):
        self.check(self.granularity >= 1, "granularity", "at least 1 token")

    def parts(self, shards):
        return shards * self.granularity

    def _places(self, length, shards):
        return np.arange(length).reshape(-1, shards, self.granularity).swapaxes(0, 1).ravel()

    @classmethod
    def examples(cls):
        return (cls(), cls(granularity=4))
