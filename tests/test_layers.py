"""Imports go only downward: pallas_kernels < lcx < configs < experiments < tpu_scripts, and inside lcx the order below."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ("pallas_kernels", "lcx", "configs", "experiments", "tpu_scripts")
LCX = (
    (
        "spec",
        "record",
        "batch",
        "parallel",
        "linear",
        "lora",
        "norms",
        "parts",
        "advice",
        "config",
        "config_text",
        "side_by_side",
    ),
    ("positions", "attention"),
    ("cache",),
    ("mixers", "channels", "memory"),
    ("models",),
    ("objectives", "data", "interop"),
    ("training", "inference"),
    (
        "support_rules",
        "support",
        "support_table",
        "plan",
        "serving_plan",
        "bench_serving",
        "bench_writing",
        "evaluation",
        "agents",
        "serving",
    ),
)
FILES = sorted(file for folder in HOUSE for file in (ROOT / folder).rglob("*.py"))


def test_every_file_of_the_house_is_seen():
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(HOUSE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_downward(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    upward = [name for name in imports(ast.parse(file.read_text()), parts) if floor(name.split(".")) > floor(parts)]
    assert upward == []


def test_an_upward_import_is_found():
    tree = ast.parse("def f():\n    from lcx.models import decoder\n    from ..training import loop\n    import lcx.cache")
    assert list(imports(tree, ("lcx", "mixers", "attention"))) == ["lcx.models.decoder", "lcx.training.loop", "lcx.cache"]
    assert floor(["lcx", "models", "decoder"]) > floor(["lcx", "mixers", "attention"]) > floor(["lcx", "cache"])


def test_a_new_folder_of_lcx_needs_a_place_in_the_order():
    with pytest.raises(AssertionError, match="lcx/gadgets"):
        floor(["lcx", "gadgets", "thing"])


def imports(tree, parts):
    """Dotted names of everything that a file imports, at any depth, relative imports made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = list(parts[: len(parts) - node.level]) if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def floor(parts):
    """How high a module stands in the house; -1 for libraries."""
    if parts[0] not in HOUSE:
        return -1
    house = 100 * HOUSE.index(parts[0])
    if parts[0] != "lcx" or len(parts) == 1 or parts[1] == "__init__":
        return house
    place = [i for i, names in enumerate(LCX) if parts[1] in names]
    assert place, f"lcx/{parts[1]} has no place in the order of tests/test_layers.py"
    return house + place[0]
