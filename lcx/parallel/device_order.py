"""The order in which a mesh takes the chips of a TPU slice that is a grid (v5e, v6e): rings are cycles of neighbours.

The TPU compiler hides a permute behind kernels only where chips send to neighbours: on v5e:8x8 and v5e:16x16 JAX's order does
not, nor do rows of the grid, whose last chip sends to the first. The innermost axis is a cycle through the squarest block of
chips that divides the grid, the axes around it are a cycle of blocks, place by place. Other devices keep their order.
"""

from collections.abc import Sequence
from typing import Any


def grid_cycle(width: int, height: int) -> list[tuple[int, int]]:
    """Every (x, y) once, each beside the one before, the last beside the first; a line or an odd grid does not close."""
    if height % 2 and width > 1:
        if width % 2:
            return [(x, y) for y in range(height) for x in (range(width) if y % 2 == 0 else reversed(range(width)))]
        return [(x, y) for y, x in grid_cycle(height, width)]
    if width == 1:
        return [(0, y) for y in range(height)]
    there = [(x, y) for y in range(height) for x in (range(1, width) if y % 2 == 0 else reversed(range(1, width)))]
    return [(0, 0), *there, *((0, y) for y in reversed(range(1, height)))]


def in_cycles(devices: Sequence[Any], inner: int, groups: Sequence[int] = ()) -> list[Any]:
    """The devices, every run of `inner` a cycle of neighbours; as they came where they are no grid or it does not divide.

    groups: sizes of runs that feed a row of the batch each. The devices keep their order too where a cycle would give some
    process rows that are not one run, which its data could not be read for.
    """
    found = _cycles(devices, inner)
    return found if all(_in_runs(found, size) for size in groups) else list(devices)


def _in_runs(devices: Sequence[Any], size: int) -> bool:
    """Whether the runs of `size` devices that a process has a part in follow each other, aligned, for every process."""
    held: dict[int, set[int]] = {}
    for place, device in enumerate(devices):
        held.setdefault(getattr(device, "process_index", 0), set()).add(place // size)
    whole = len(devices) // size
    return all(max(x) - min(x) + 1 == len(x) and whole % len(x) == 0 and min(x) % len(x) == 0 for x in held.values())


def _cycles(devices: Sequence[Any], inner: int) -> list[Any]:
    at = {tuple(getattr(device, "coords", None) or ()): device for device in devices}
    if len(at) != len(devices) or any(len(place) != 3 or place[2] for place in at):
        return list(devices)
    width, height = (max(place[axis] for place in at) + 1 for axis in range(2))
    divides = lambda a, b: a * b == inner and width % a == 0 and height % b == 0
    blocks = [(a, inner // a) for a in range(1, inner + 1) if inner % a == 0 and divides(a, inner // a)]
    if width * height != len(devices) or not blocks:
        return list(devices)
    wide, high = min(blocks, key=lambda block: abs(block[0] - block[1]))
    return [
        at[across * wide + x, up * high + y, 0]
        for across, up in grid_cycle(width // wide, height // high)
        for x, y in grid_cycle(wide, high)
    ]
