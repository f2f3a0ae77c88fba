"""TPU chips and the vector memory of their cores."""

import math

from pallas_kernels.target import device_kind

LANES, SUBLANES = 128, 8
MIB = 1 << 20
VMEM = {"v4": 16 * MIB, "v5e": 128 * MIB, "v5p": 64 * MIB, "v6e": 128 * MIB, "tpu7x": 64 * MIB}  # of a core
SHARE = 7 / 8  # of it is for a kernel
KINDS = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v5p": "v5p", "v6 lite": "v6e", "v6e": "v6e", "7x": "tpu7x"}


def this_chip() -> str | None:
    """The chip of the mesh in use or of this machine, None if it is no TPU."""
    return KINDS.get(device_kind().removeprefix("TPU").strip())


def kernel_room(chip: str | None) -> int:
    """Bytes of a core's vector memory that a kernel may take; None is any chip."""
    return int(SHARE * (VMEM[chip] if chip else min(VMEM.values())))


def padded_bytes(shape: tuple[int, ...], itemsize: int = 4) -> int:
    """Of an array whose last two axes are padded to whole registers."""
    *lead, rows, lanes = (1, 1, *shape)
    return math.prod(lead) * -(-rows // SUBLANES) * SUBLANES * -(-lanes // LANES) * LANES * itemsize
