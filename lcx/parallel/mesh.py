"""The device mesh: how many ways each kind of parallelism splits the devices."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from lcx.parallel.device_order import in_cycles
from lcx.parallel.hosts import check_joined
from lcx.spec import Spec, SpecError

AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec(Spec):
    """data: replicas. fsdp: parameters and batch. context: the sequence. tensor: heads, hidden width and vocabulary."""

    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def validate(self):
        for axis in AXES:
            self.check(getattr(self, axis) >= 1, axis, "at least 1 device")

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.context * self.tensor

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (default: all). Raises SpecError unless the devices suffice; many hosts need all of them."""
        check_joined()
        given = list(jax.devices() if devices is None else devices)
        if self.size > len(given) or (jax.process_count() > 1 and self.size != len(given)):
            shape = " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)
            raise SpecError(f"mesh: {shape} = {self.size} devices, but there are {len(given)}")
        innermost = next((size for axis in reversed(AXES) if (size := getattr(self, axis)) > 1), 1)
        row = self.context * self.tensor  # devices that share a row, or do so where rows are spread over `data` alone
        ordered = in_cycles(given[: self.size], innermost, groups=(row, self.fsdp * row))
        grid = np.asarray(ordered).reshape([getattr(self, axis) for axis in AXES])
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    @classmethod
    def examples(cls):
        return (cls(), cls(data=2, context=2))
