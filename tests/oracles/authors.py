"""Parts of authors' code, run as they are: definitions taken out of a file of a checkout, without what else it imports.

Scripts that use it are told a folder of checkouts, `CHECKOUTS/<repository>`, none of which is part of this repository.
"""

import ast
import contextlib
import json
import types
from pathlib import Path
from unittest import mock


def definitions(file: Path, *names: str, **given) -> types.SimpleNamespace:
    """Functions, classes and methods (`Class.method`) of a file by their last name; `given` is what they read as globals.

    Of two that are named alike, as notebooks have them, it is the first."""
    body = ast.parse(_source(file)).body
    chosen = [_definition(body, name.split(".")) for name in names]
    scope = dict(given)
    future = ast.ImportFrom(module="__future__", names=[ast.alias(name="annotations")], level=0)
    exec(compile(ast.fix_missing_locations(ast.Module([future, *chosen], [])), str(file), "exec"), scope)
    return types.SimpleNamespace(**{name.split(".")[-1]: scope[name.split(".")[-1]] for name in names})


def _source(file: Path) -> str:
    text = file.read_text()
    if file.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


def _definition(body: list, path: list[str]) -> ast.AST:
    for node in body:
        if getattr(node, "name", None) == path[0]:
            return node if len(path) == 1 else _definition(node.body, path[1:])
    raise ValueError(f"no definition of {path[0]}")


def in_float64(torch) -> types.SimpleNamespace:
    """torch whose names of narrower types mean float64, so that code that rounds says what it computes."""
    return types.SimpleNamespace(**vars(torch) | dict.fromkeys(("float32", "bfloat16"), torch.float64))


@contextlib.contextmanager
def told_float64(torch):
    """Within it `x.float()` and new tensors are float64 as well."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(before)
