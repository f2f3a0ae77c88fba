"""Fine-tuning a model with a learned rope, which may be given other settings."""

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_runs import experiment

from lcx.cache.dense import DenseCache
from lcx.positions.clex import CLEX
from lcx.spec import edits
from lcx.training.loop import train
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Constant


def trained(rope, run_dir, **options):
    """The parameters after a training, by name."""
    config = edits(experiment(**options), [("model.rope", rope), ("model.pattern[0].mixer.cache", DenseCache(keys="raw"))])
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(train(config, run_dir).model)))


@pytest.mark.slow
def test_a_learned_rope_is_kept_when_its_settings_change(tmp_path):
    """Documents of up to 48 tokens, windows of 12 and then of 16; fine-tuning changes nothing else."""
    source, still = tmp_path / "source", AdamW(learning_rate=Constant(peak=1e-30), decay=0.0)
    wanted = trained(CLEX(original_length=12, largest=2, steps=2), source, steps=2)
    assert np.abs(wanted["rope"]["down"]).max() > 1e-3  # 0 as built
    other = CLEX(original_length=16, largest=4, steps=3, activation="silu")
    found = trained(other, tmp_path / "tuned", steps=1, optimizer=still, init_from=str(source))
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-20), found, wanted)
