"""What is measured of a model beforehand: a file of `experiments.calibrate`, or the one in the folder of a model.

A file says which parameters it was measured on (`model`, their words: `lcx.models.words`), as tables of another model of the
same shape would be read without a fault.
"""

import functools
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np

from lcx.spec import Spec, SpecError, below

SHIPPED = Path(__file__).parents[1] / "assets"
MODEL = "model"  # beside the arrays of a file


class Measured:
    """A part that has such a file. MEASURED: the field that names it, and what it is called in a model's folder.
    ARRAYS: what names of its arrays begin with."""

    MEASURED: ClassVar[tuple[str, str]]
    ARRAYS: ClassVar[str]


@functools.lru_cache(maxsize=16)
def _read(path: Path) -> tuple[dict[str, np.ndarray], int | None]:
    """(arrays, the words of the model)."""
    with np.load(path) as held:
        arrays = {key: held[key].astype(np.float32) for key in held.files if key != MODEL}
        return arrays, int(held[MODEL]) if MODEL in held.files else None


def _held(part: Measured) -> tuple[dict[str, np.ndarray], int | None]:
    field, file = part.MEASURED
    name = getattr(part, field)
    for path in (Path(name), Path(name) / file, SHIPPED / name / file):
        if path.is_file():
            try:
                return _read(path)
            except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile):
                part.fail(field, name, "a file that experiments.calibrate wrote, which this one is not, or no longer")
    if Path(name).is_dir():
        command = f"experiments.calibrate --run_dir={name} --method={type(part).__name__} --to={name}/{file}"
        part.fail(field, name, f"a folder with {file}, which python -m {command} makes")
    shipped = ", ".join(sorted(path.parent.name for path in SHIPPED.glob(f"*/{file}"))) or "none"
    part.fail(field, name, f"a file of experiments.calibrate, a model's folder with {file}, or a shipped model: {shipped}")


def arrays_of(part: Measured) -> dict[str, np.ndarray]:
    """The arrays of the file or the model that a part names. Raises SpecError that says what there is, and for a file
    that has no array of this part."""
    held = _held(part)[0]
    field, prefix = part.MEASURED[0], part.ARRAYS
    if not any(name.startswith(prefix) for name in held):
        expected = f"a file of experiments.calibrate --method={type(part).__name__}, which has arrays {prefix}..."
        part.fail(field, getattr(part, field), f"{expected}, not {', '.join(sorted(held)[:3]) or 'none'}")
    return held


def measured_parts(spec: Spec) -> list[tuple[str, Measured]]:
    """(path, part) of those parts of a model that have a file of this kind, not numbers or a file of the authors."""
    ours = lambda name: isinstance(name, str) and name != "" and Path(name).suffix not in (".json", ".tsv")
    found = [(path, part) for path, part in below(spec, "model") if isinstance(part, Measured)]
    return [(path, part) for path, part in found if ours(getattr(part, part.MEASURED[0]))]


def check_measured(path: str, part: Measured, words: int) -> None:
    """Raises SpecError, with the path of the part, unless its file was measured on the parameters of these words."""
    (field, file), held = part.MEASURED, _held(part)[1]
    if held == words:
        return
    fitting = [repr(shipped.parent.name) for shipped in sorted(SHIPPED.glob(f"*/{file}")) if _read(shipped)[1] == words]
    wanted = " or ".join([*fitting, "a file of experiments.calibrate --run_dir= of these parameters"])
    found = "does not say of which model it is" if held is None else "was measured on another model, or other weights of it"
    raise SpecError(f"{path}.{field} = {getattr(part, field)!r}: {found}: expected {wanted}")
