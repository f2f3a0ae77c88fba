"""Test settings: eight forced CPU devices, float32 matmuls, shapes checked at run time, slow and oracle tests on request.

Nearly all of a test's time is compiling. LLVM is told not to optimise, which halves it, and XLA to lower fusions without MLIR,
which halves it again; XLA's own passes run as ever. What is compiled is kept for the run: other tests, the other worker and
programs that tests start read it. Tracing makes many objects that live long, so they are looked through for cycles more seldom.
"""

import atexit
import contextlib
import gc
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # its workers inherit the folder
    _compiled = tempfile.mkdtemp(prefix="lcx-tests-")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_default_matmul_precision", "highest")
_shapes_checked = install_import_hook(["lcx", "pallas_kernels"], "beartype.beartype")
_shapes_checked.__enter__()
gc.freeze()
gc.set_threshold(100_000, 20, 20)


MAPPED = 32_000  # regions of memory; a process may have 65,530, and dies beyond


@pytest.fixture(autouse=True, scope="module")
def _compiled_is_let_go():
    """What a file compiled is forgotten where much is held: every executable maps some regions of memory."""
    yield
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        if sum(1 for _ in maps) > MAPPED:
            jax.clear_caches()
            gc.collect()


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
