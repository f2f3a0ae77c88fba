"""How the tensors of a checkpoint are parts of a decoder's parameters: a view of each tensor, exact both ways.

A tensor is reshaped, a part of it taken and its axes put in order; what comes out is a parameter, or one layer of a stack of
them. A matrix of a linear layer lies [out, in] there and [in, out] here, with heads apart.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

Path = tuple[str | int, ...]  # of a parameter
Index = tuple[slice | int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """path: of a parameter. period: the place in its stack of layers, None where it is not stacked. index: of the reshaped
    tensor; axes: the order in which what is left becomes the parameter."""

    path: Path
    period: int | None
    axes: tuple[int, ...]
    index: Index = ()

    def shape(self, split: tuple[int, ...]) -> tuple[int, ...]:
        """Of what it takes from a tensor that is split so."""
        left = np.broadcast_to(np.zeros(()), split)[self.index].shape
        return tuple(left[axis] for axis in self.axes)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """name, shape: as the checkpoint has them. split: the shape that parts are taken from."""

    name: str
    split: tuple[int, ...]
    parts: tuple[Part, ...]
    shape: tuple[int, ...]

    def __post_init__(self):
        assert math.prod(self.shape) == math.prod(self.split), self

    def taken(self, array: np.ndarray) -> Iterable[tuple[Part, np.ndarray]]:
        """Each part of it with its numbers."""
        whole = array.reshape(self.split)
        for part in self.parts:
            yield part, whole[part.index].transpose(part.axes)

    def joined(self, parts: Mapping[Path, np.ndarray]) -> np.ndarray:
        """The tensor of its parts, each by its path."""
        whole = np.empty(self.split, next(iter(parts.values())).dtype)
        for part in self.parts:
            whole[part.index] = parts[part.path].transpose(np.argsort(part.axes))
        return whole.reshape(self.shape)


def vector(name: str, size: int, path: Path, period: int | None = None) -> Tensor:
    """A parameter of one axis, or the layer of one, as it is."""
    return Tensor(name, (size,), (Part(path, period, (0,)),), (size,))


def table(name: str, rows: int, width: int, path: Path) -> Tensor:
    """A matrix as it is."""
    return Tensor(name, (rows, width), (Part(path, None, (0, 1)),), (rows, width))


def heads_bias(name: str, heads: int, size: int, path: Path, period: int | None) -> Tensor:
    """[heads x size] as [heads, size]."""
    return Tensor(name, (heads, size), (Part(path, period, (0, 1)),), (heads * size,))


def linear(name: str, inputs: int, outputs: int, path: Path, period: int | None = None) -> Tensor:
    """[out, in] as [in, out]."""
    return Tensor(name, (outputs, inputs), (Part(path, period, (1, 0)),), (outputs, inputs))


def to_heads(name: str, width: int, heads: int, size: int, path: Path, period: int | None) -> Tensor:
    """[heads x size, width] as [width, heads, size]."""
    return Tensor(name, (heads, size, width), (Part(path, period, (2, 0, 1)),), (heads * size, width))


def from_heads(name: str, width: int, heads: int, size: int, path: Path, period: int | None) -> Tensor:
    """[width, heads x size] as [heads, size, width]."""
    return Tensor(name, (width, heads, size), (Part(path, period, (1, 2, 0)),), (width, heads * size))
