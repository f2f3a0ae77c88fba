"""What the documents show works as shown."""

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"

# Runs with the example file as lcx/positions/partial.py, as if it had been added.
ADDED = """
import sys
import lcx.positions
lcx.positions.__path__.append(sys.argv[1])
import numpy as np
import jax.numpy as jnp
from experiments import plan, train
from experiments.program import run
from lcx.batch import causal_info
from lcx.positions.partial import PartialRope
from lcx.positions.rotate import rotate

frequencies = PartialRope(kept=0.5).frequencies(16, 64)
x = np.random.default_rng(0).normal(size=(1, 1, 1, 16)).astype(np.float32)
positions = causal_info(jnp.ones((1, 1), int), start=jnp.full(1, 1_000_000)).positions
turned = np.asarray(rotate(x, positions, frequencies))
still = np.r_[4:8, 12:16]
assert (turned[..., still] == x[..., still]).all()
assert (np.delete(turned - x, still, axis=-1) != 0).all()

quick = "--config=config:recipes.quick_text.quick"
assert run(train.main, [quick, "--config=set:model.rope=PartialRope(kept=1.5)"]) == 2
assert run(train.main, [quick, "--config=set:model.rope=PartialRope(kept=0.5)", "--dry_run"]) == 0
assert run(plan.main, ["--support"]) == 0
"""


def test_the_example_method_does_what_it_says_and_is_known_everywhere(tmp_path):
    source = re.search(r"```python\n(.*?)```", (DOCS / "adding_a_method.md").read_text(), re.DOTALL)[1]
    (tmp_path / "partial.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    command = [sys.executable, "-c", ADDED, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "train: model.rope: PartialRope.kept = 1.5: expected a share in (0, 1]\n" in done.stderr
    assert re.search(r"rope of pattern\[0\], PartialRope +8 pairs", done.stdout)
    assert "| rope: PartialRope " in done.stdout


def test_files_that_the_documents_name_exist():
    for document in DOCS.glob("*.md"):
        for path in re.findall(r"`((?:lcx|configs|experiments|tests)/[\w/.]+)`", document.read_text()):
            assert (DOCS.parent / path).exists() or path == "lcx/positions/partial.py", f"{document.name}: {path}"
