"""Every part of the project, found by walking the package: no registry to forget."""

import functools
import importlib
import inspect
import pkgutil

import lcx
from lcx.spec import Spec


@functools.cache
def parts(kind: type[Spec] = Spec) -> tuple[type[Spec], ...]:
    """The concrete public spec classes of lcx that are a `kind`, by name."""
    for module in pkgutil.walk_packages(lcx.__path__, "lcx."):
        importlib.import_module(module.name)
    found = {cls for cls in _below(kind) if cls.__module__.startswith("lcx.")}
    public = [cls for cls in found if not cls.__name__.startswith("_") and not inspect.isabstract(cls)]
    return tuple(sorted(public, key=lambda cls: (cls.__name__, cls.__module__)))


def _below(kind: type) -> set[type]:
    return {kind}.union(*map(_below, kind.__subclasses__())) - {Spec}
