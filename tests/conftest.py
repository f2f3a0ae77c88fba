"""Test settings: eight forced CPU devices, float32 matmuls, shapes checked at run time, slow and oracle tests on request.

Nearly all of a test's time is compiling, so LLVM is told not to optimise, which halves it; XLA's own passes run as ever.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0", os.environ.get("XLA_FLAGS", "")]
)

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_default_matmul_precision", "highest")
_shapes_checked = install_import_hook(["lcx", "pallas_kernels"], "beartype.beartype")
_shapes_checked.__enter__()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")
    parser.addoption("--oracles", action="store_true", help="run the tests that need the oracles extra")


def pytest_collection_modifyitems(config, items):
    for mark, option in (("slow", "--slow"), ("oracle", "--oracles")):
        if not config.getoption(option):
            skip = pytest.mark.skip(reason=f"needs {option}")
            for item in items:
                if mark in item.keywords:
                    item.add_marker(skip)
