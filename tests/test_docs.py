"""What the documents show works as shown."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.recipes import quick_text
from experiments.program import set_field
from lcx.config import build, expand
from lcx.support import broken

DOCS = Path(__file__).parents[1] / "docs"

# Runs with the example files as lcx/positions/partial.py, configs/ablations/p_rope.py, lcx/cache/scorers/large_values.py and
# lcx/cache/policies/spaced.py, as if they had been added.
ADDED = """
import sys
import configs.ablations
import lcx.cache.policies
import lcx.cache.scorers
import lcx.positions
for package in (configs.ablations, lcx.positions):
    package.__path__.append(sys.argv[1])
for package in (lcx.cache.policies, lcx.cache.scorers):
    package.__path__.append(sys.argv[1] + "/" + package.__name__.rpartition(".")[2])
import numpy as np
import jax.numpy as jnp
from experiments import ablate, plan, train
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

import test_partial
test_partial.test_the_slowest_half_of_the_pairs_does_not_see_the_distance()
test_partial.test_an_impossible_share_is_refused()

quick = "--config=config:recipes.quick_text.quick"
assert run(train.main, [quick, "--config=set:model.rope=PartialRope(kept=1.5)"]) == 2
assert run(train.main, [quick, "--config=set:model.rope=PartialRope(kept=0.5)", "--dry_run"]) == 0
assert run(plan.main, ["--support"]) == 0
cache = "KVCache(policy=Evict(score=LargeValues({}), keep=0.2))"
edit = "--config=set:model.pattern[0].mixer.cache="
assert run(train.main, [quick, edit + cache.format(""), "--dry_run"]) == 0
assert run(train.main, [quick, edit + cache.format("floor=-1.0"), "--dry_run"]) == 2
assert run(train.main, [quick, edit + "KVCache(policy=Spaced(keep=0.2))", "--dry_run"]) == 0
assert run(train.main, [quick, edit + "KVCache(policy=Spaced(keep=19))", "--dry_run"]) == 2

import test_spaced
from tests.contracts import test_policy
test_spaced.test_alike_keys_lose_nothing()
(policy, _) = [one.values[0] for one in test_policy.EXAMPLES if one.id.startswith("Spaced")]
test_policy.test_what_stays_stands_in_front_in_its_order_within_the_budget(policy)
test_policy.test_what_is_not_there_takes_no_part(policy)
comparison = "--config=config:ablations.p_rope.quickstart"
assert run(ablate.main, [comparison, "--dry_run"]) == 0
ablation = configs.ablations.p_rope.quickstart()
ropes = {arm.name: [ablation.experiment(arm, v).model.rope for v in (None, *ablation.variants)] for arm in ablation.arms}
assert ropes["p-RoPE"] == [PartialRope(kept=0.5)] * 2 and PartialRope(kept=0.5) not in ropes["RoPE"]
"""

EXAMPLES = ("partial", "test_partial", "p_rope", "scorers/large_values", "policies/spaced", "test_spaced")
ADDS = ("lcx/positions/partial.py", "tests/positions/test_partial.py", "tests/cache/test_spaced.py")


def test_the_example_of_the_readme_runs():
    (source,) = re.findall(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    exec(source, found := {})
    assert found["out"].shape == (1, 8, 4, 64) and found["lse"].shape == (1, 8, 4)


@pytest.mark.slow
def test_the_command_of_the_readme_that_drops_most_tokens_finds_the_key():
    """As it is written there; with the newest tokens alone it does not."""
    (command,) = re.findall(r"^    noise=.*?KIVI.*?$", (DOCS.parent / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    command = command.replace("python -m", f"{sys.executable} -m")
    for score, answer in (("SnapKV", " 4821"), ("Recency", " a st")):
        made = subprocess.run(["bash", "-c", command.replace("SnapKV", score)], cwd=DOCS.parent, capture_output=True, text=True)
        assert len(made.stdout) == 1377 + 5 + 1 and made.stdout.endswith(f"Key abc is{answer}\n"), made.stderr


def test_the_example_method_does_what_it_says_and_is_known_everywhere(tmp_path):
    sources = re.findall(r"```python\n(.*?)```", (DOCS / "adding_a_method.md").read_text(), re.DOTALL)
    for folder in ("scorers", "policies"):
        (tmp_path / folder).mkdir()
    for name, source in zip(EXAMPLES, sources, strict=True):
        (tmp_path / f"{name}.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": f"{DOCS.parent}:{tmp_path}"}
    command = [sys.executable, "-c", ADDED, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "train: model.rope: PartialRope.kept = 1.5: expected a share in (0, 1]\n" in done.stderr
    assert "Spaced.keep = 19: expected a share, or at least 20, which always stay\n" in done.stderr
    assert re.search(r"rope of pattern\[0\], PartialRope +8 pairs", done.stdout)
    assert "| rope: PartialRope " in done.stdout


def test_files_that_the_documents_name_exist():
    for document in DOCS.glob("*.md"):
        for path in re.findall(r"`((?:lcx|configs|experiments|tests)/[\w/.]+)`", document.read_text()):
            assert (DOCS.parent / path).exists() or path in ADDS, f"{document.name}: {path}"


def set_texts():
    """Of docs/methods.md, what is written together: the (path, value) pairs of a table's cell, or of a line of text."""
    for line in (DOCS / "methods.md").read_text().splitlines():
        for alternative in line.split(" or "):
            if found := re.findall(r"set:([^=`]+)=([^`]+?)'?`", alternative):
                yield found


@pytest.mark.parametrize("changes", list(set_texts()), ids=lambda changes: changes[0][1])
def test_what_the_methods_say_to_write_is_accepted(changes):
    """With heads of 128 channels or of 8, and four layers."""
    refused = []
    for head_dim in (128, 8):
        tree = expand(quick_text.quick.as_buildable())
        for path, text in (("model.periods", "4"), ("model.pattern[0].mixer.head_dim", str(head_dim)), *changes):
            tree = set_field(tree, path, text)
        refused.append(next(broken(build(tree)), None))
    assert None in refused, refused


def test_every_method_of_a_config_says_what_to_write():
    rows = [line.split(" | ") for line in (DOCS / "methods.md").read_text().splitlines() if line.startswith("| ")]
    written = [row for row in rows if len(row) == 4 and not row[2].startswith("`--config=`")]
    assert len(written) > 30 and all(row[2].startswith("`set:") for row in written)
