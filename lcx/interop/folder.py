"""A checkpoint folder as Hugging Face's `transformers` writes it, opened: what `config.json` says and where each tensor lies.

    config.json                      the model's shape; generation_config.json beside it
    model.safetensors                all tensors; or several files and model.safetensors.index.json, which says what is where
    tokenizer.json, tokenizer_config.json, chat_template.jinja

Opening reads headers alone. A tensor is read through a memory map of its own, which is closed with it.
Nothing is ever unpickled.
"""

import contextlib
import dataclasses
import functools
import json
import math
import mmap
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lcx.spec import SpecError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
BESIDE = (  # what belongs to the tokenizer and to generation, copied as it is
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
FLOATS = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64}

WIDTHS = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclasses.dataclass(frozen=True)
class Held:
    """A tensor of a folder. dtype: safetensors' word for it. end: where it ends in the file, in bytes."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    end: int


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `target` when all is written, and is gone where something fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        made.chmod(0o755)
        yield made
        made.rename(target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def forget(view: np.ndarray) -> None:
    """Lets go of the memory that a view of a file took; what is read of it again comes from the file again."""
    if isinstance(view.base, mmap.mmap):
        view.base.madvise(mmap.MADV_DONTNEED)


def is_folder(path: Path | str) -> bool:
    """Whether a path is a folder whose config.json names a model of `transformers`."""
    try:
        found = json.loads((Path(path) / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and ("model_type" in found or "architectures" in found)


@dataclasses.dataclass(frozen=True)
class Folder:
    """An existing folder. Raises SpecError, naming the file or the tensor, where it is not whole."""

    path: Path

    def __post_init__(self):
        if not (self.path / CONFIG).is_file():
            raise SpecError(f"{self.path}: no {CONFIG}: expected a checkpoint folder")

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return self.json(CONFIG)

    def json(self, name: str) -> dict[str, Any]:
        """What a file of the folder says; nothing where there is none."""
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise SpecError(f"{file}: cannot be read: {error}") from None
        if not isinstance(found, dict):
            raise SpecError(f"{file}: {type(found).__name__}: expected an object")
        return found

    @functools.cached_property
    def tensors(self) -> dict[str, Held]:
        """Every tensor by its name, from the headers of all files; complete, or SpecError."""
        if not (self.path / INDEX).is_file():
            if not (self.path / SINGLE).is_file():
                raise SpecError(f"{self.path}: {self._instead()}: expected {SINGLE} or {INDEX}")
            return _header(self.path / SINGLE)
        if (self.path / SINGLE).is_file():
            raise SpecError(f"{self.path}: both {SINGLE} and {INDEX}: expected one, as readers differ in which they take")
        places = self.json(INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise SpecError(f"{self.path / INDEX}: no weight_map: expected the file of each tensor")
        found: dict[str, Held] = {}
        for name in sorted(set(places.values())):
            if not (self.path / name).is_file():
                first = min(tensor for tensor, file in places.items() if file == name)
                raise SpecError(f"{self.path / name}: there is no such file, which {INDEX} names for tensor {first}")
            for tensor, held in _header(self.path / name).items():
                if places.get(tensor) != name:
                    raise SpecError(f"{self.path / name}: tensor {tensor}, which {INDEX} has in {places.get(tensor)}")
                found[tensor] = held
        for tensor, file in places.items():
            if tensor not in found:
                raise SpecError(f"{self.path / file}: no tensor {tensor}, which {INDEX} has there")
        return found

    def read(self, name: str) -> np.ndarray:
        """A tensor as a view of its file, which stays mapped as long as the view is held. Of floats alone."""
        held = self.tensors[name]
        dtype = np.dtype(FLOATS[held.dtype])
        start = held.end - math.prod(held.shape) * dtype.itemsize
        try:
            return np.memmap(held.file, dtype, "r", start, held.shape) if math.prod(held.shape) else np.zeros(held.shape, dtype)
        except (OSError, ValueError) as error:
            raise SpecError(f"{held.file}: tensor {name} cannot be read: {error}") from None

    def check_numbers(self, names: Iterable[str]) -> None:
        """Raises SpecError for a tensor of what is no float."""
        for name in names:
            held = self.tensors[name]
            if held.dtype not in FLOATS:
                raise SpecError(f"{held.file}: tensor {name} of dtype {held.dtype}: expected one of {', '.join(FLOATS)}")

    def _instead(self) -> str:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.path.glob(pattern))
        return f"{pickled[0]}, which is pickled and not read" if pickled else "no tensors"


def _header(file: Path) -> dict[str, Held]:
    """What a file says that it holds. Raises SpecError where it is shorter than that."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8:
                raise SpecError(f"{file}: {size:,} bytes, of which {length:,} should be a header: the file is truncated")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ranges = {name: tuple(map(int, entry["data_offsets"])) for name, entry in entries.items()}
        found = {
            name: Held(file, tuple(entry["shape"]), entry["dtype"], 8 + length + ranges[name][1])
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{file}: no safetensors file ({type(error).__name__}: {error})") from None
    for name, held in sorted(found.items(), key=lambda pair: pair[1].end):
        if held.end > size:
            raise SpecError(f"{file}: {size:,} bytes: the file is truncated, tensor {name} ends at {held.end:,}")
    at = 0
    for name, (start, stop) in sorted(ranges.items(), key=lambda pair: pair[1]):
        width = WIDTHS.get(found[name].dtype)
        if start != at or (width is not None and stop - start != math.prod(found[name].shape) * width):
            place = f"tensor {name} of {found[name].shape} {found[name].dtype} at {start:,} to {stop:,}"
            raise SpecError(f"{file}: {place}: expected its bytes right behind those before it, at {at:,}")
        at = stop
    return found
