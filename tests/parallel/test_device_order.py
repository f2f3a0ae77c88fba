"""Rings over the axes of a mesh are cycles of neighbouring chips, where a slice is a grid."""

import itertools
import types

import pytest

from lcx.parallel.device_order import grid_cycle, in_cycles


def beside(a, b):
    return sum(abs(i - j) for i, j in zip(a, b, strict=True)) == 1


@pytest.mark.parametrize("width, height", [(2, 2), (4, 2), (2, 8), (4, 4), (16, 16), (3, 4), (4, 3), (2, 1)])
def test_a_cycle_visits_each_place_once_by_neighbours(width, height):
    cycle = grid_cycle(width, height)
    assert sorted(cycle) == [(x, y) for x in range(width) for y in range(height)]
    assert all(beside(a, b) for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True))


@pytest.mark.parametrize("width, height", [(1, 5), (3, 3), (3, 1)])
def test_what_cannot_close_is_a_line(width, height):
    cycle = grid_cycle(width, height)
    assert len(set(cycle)) == width * height and all(beside(a, b) for a, b in itertools.pairwise(cycle))


@pytest.mark.parametrize("inner", [16, 64, 8, 256])
def test_devices_of_a_grid_lie_in_cycles(inner):
    devices = [types.SimpleNamespace(coords=(x, y, 0)) for y in range(16) for x in range(16)]
    found = [device.coords for device in in_cycles(devices, inner)]
    assert sorted(found) == sorted(device.coords for device in devices)
    for start in range(0, 256, inner):
        run = found[start : start + inner]
        assert all(beside(a, b) for a, b in zip(run, run[1:] + run[:1], strict=True))


def test_other_devices_keep_their_order():
    cube = [types.SimpleNamespace(coords=(x, y, z)) for z in range(2) for y in range(2) for x in range(2)]
    pairs = [types.SimpleNamespace(coords=(x // 2, 0, 0)) for x in range(4)]
    for devices in (cube, pairs, [types.SimpleNamespace()] * 2, [types.SimpleNamespace(coords=(0, 0, 0))]):
        assert in_cycles(devices, 2) == devices


@pytest.mark.parametrize("shape, cycles", [((1, 8, 8), True), ((64, 1, 1), False), ((1, 32, 2), False), ((4, 16, 1), False)])
def test_a_process_keeps_one_run_of_rows(shape, cycles):
    """v5e:8x8, four chips a process: data, fsdp, context."""
    host = lambda x, y: y // 2 * 4 + x // 2
    places = sorted(((x, y) for x in range(8) for y in range(8)), key=lambda place: (host(*place), place))
    devices = [types.SimpleNamespace(coords=(x, y, 0), process_index=host(x, y)) for x, y in places]
    _, fsdp, context = shape
    found = in_cycles(devices, next(n for n in reversed(shape) if n > 1), groups=(context, fsdp * context))
    assert (found != devices) == cycles
    for process in range(16):
        rows = sorted({place // context for place, device in enumerate(found) if device.process_index == process})
        assert rows == list(range(rows[0], rows[0] + len(rows)))
