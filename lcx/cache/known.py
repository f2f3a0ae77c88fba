"""What is measured of a model beforehand: a file of `experiments.calibrate`, or one that comes with a shipped model."""

import functools
import zipfile
from pathlib import Path

import numpy as np

from lcx.spec import Spec

SHIPPED = Path(__file__).parents[1] / "assets"


@functools.lru_cache(maxsize=16)
def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as held:
        return {key: held[key].astype(np.float32) for key in held.files}


def arrays_of(part: Spec, field: str, file: str) -> dict[str, np.ndarray]:
    """The arrays of the path or the shipped model that `part.field` names, whose file is called `file`. Raises SpecError that
    says what there is."""
    name = getattr(part, field)
    for path in (Path(name), SHIPPED / name / file):
        if path.is_file():
            try:
                return _arrays(path)
            except (OSError, EOFError, ValueError, zipfile.BadZipFile):
                part.fail(field, name, "a file that experiments.calibrate wrote, which this one is not, or no longer")
    shipped = ", ".join(sorted(path.parent.name for path in SHIPPED.glob(f"*/{file}"))) or "none"
    part.fail(field, name, f"a file of experiments.calibrate, or a shipped model: {shipped}")
