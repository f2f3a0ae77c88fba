"""Compilation is told apart from the work that it was for."""

import time

import jax
import jax.numpy as jnp

from lcx.evaluation.stopwatch import Stopwatch


def test_compilation_counts_apart_from_the_work():
    with Stopwatch() as watch:
        with watch.on("arm", "train"):
            time.sleep(0.05)
            jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((7, 3)))
        with watch.on("arm", "evaluate"):
            time.sleep(0.01)
    spent = watch.seconds["arm"]
    assert spent["train"] >= 0.05 and spent["compile"] > 0 and spent["evaluate"] >= 0.01
    compiled = spent["compile"]
    with watch.on("arm", "train"):
        jax.jit(lambda x: jnp.cos(x) @ x.T)(jnp.ones((7, 3)))
    assert spent["compile"] == compiled, "outside of its context nothing is heard"


def test_the_time_of_earlier_starts_is_kept(tmp_path):
    for _ in range(2):
        with Stopwatch(tmp_path / "time.json") as watch, watch.on("arm", "train"):
            time.sleep(0.02)
    again = Stopwatch(tmp_path / "time.json")
    assert again.seconds == watch.seconds and again.seconds["arm"]["train"] >= 0.04
    again.seconds["other"].update({"train": 1.0})


def test_lines_by_hand():
    watch = Stopwatch()
    watch.seconds["one"].update({"train": 2.0, "evaluate": 12.25, "compile": 3.0})
    assert watch.lines() == ["one: 17.2 s: evaluate 12.2 s, compile 3.0 s, train 2.0 s"]
