"""What every program shares: a config from the command line, one clear line for what is wrong with it, an exit status.

    --config=config:ablations.rope_extension.quickstart   a function under `configs`, with arguments: name(width=64)
    --config=config_file:runs/a/config.json               a config that a run wrote
    --config=set:model.rope.factor=8.0                    any field, by its path: a literal, a word, or another part:
    --config='set:model.rope=YaRN(factor=4.0, original_length=128)'
    --config=fiddler:ablations.rope_extension.longer(2)   a function under `configs` that edits the config

They apply from left to right and the parts are built once, at the end; `set:` and `fiddler:` alone apply to the config of
--run_dir, a run or a checkpoint folder. Exit status: 0 success, 1 training diverged, told in one line, 2 a config or command
line that cannot work, told in one line before anything is compiled, 141 standard output was closed by its reader; any other
failure keeps its traceback, with status 1.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import logging
import os
import pkgutil
import re
import signal
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fiddle
from absl import flags
from fiddle import absl_flags

import configs
from lcx.config import ONLY_PARTS, accepted_at, assign, build, expand, load_file, of_spec, suggestion
from lcx.config_text import NoSuchPart, parse
from lcx.data.recall import TaskDoesNotFit
from lcx.data.sources import SourceError
from lcx.inference.overflow import CacheOverflow
from lcx.inference.requests import NotFinite, WindowOverflow
from lcx.interop.chat import ChatError
from lcx.parallel.topology import quiet_without_tpu
from lcx.spec import Spec, SpecError, describe, matches
from lcx.training.metrics import TrainingDiverged
from lcx.training.run_folder import read_config

REFUSALS = (  # faults of the command line, the config or the data it names
    SpecError,
    SourceError,
    TaskDoesNotFit,
    WindowOverflow,
    ChatError,
    flags.Error,
)
NO_BASE = "--config={} comes first: expected config:<name> or config_file:<path> before it"
FAILURES = (
    TrainingDiverged,
    NotFinite,
    CacheOverflow,
)  # what may happen to a run that was right to start, and needs no traceback
Kind = TypeVar("Kind", bound=Spec)
Define = Callable[[flags.FlagValues], None]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line. run_dir: as given, else the folder of the config file, else runs/<config name>."""

    flags: flags.FlagValues

    def spec(self, kind: type[Kind] | tuple[type[Kind], ...], *, read: Callable[[Path], Spec] = read_config) -> Kind:
        """The config, built: from --config, or from `read(run_dir)` where that has no base, edited. Raises SpecError."""
        directives = self.flags["config"]
        if directives.folder is not None:
            spec = build(directives.value)
        elif self.flags.run_dir:
            spec = read(self.run_dir)
            spec = build(directives.edited(of_spec(spec))) if directives.waiting else spec
        elif directives.waiting:
            raise SpecError(f"{NO_BASE.format(directives.waiting[0])}, or --run_dir of an earlier run")
        else:
            raise SpecError("--config is missing: expected --config=config:<name>, or --run_dir of an earlier run")
        if not isinstance(spec, kind):
            taken = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise SpecError(f"the config is of type {type(spec).__name__}: this program takes {taken}")
        return spec

    @property
    def run_dir(self) -> Path:
        if self.flags.run_dir:
            return Path(self.flags.run_dir)
        return self.flags["config"].folder or Path("runs")

    @property
    def dry_run(self) -> bool:
        return self.flags.dry_run


Main = Callable[[Arguments], int | None]


def launch(main: Main) -> None:
    """Runs a program to its exit status. `define(flag values)` of its module adds flags; the module's docstring is its help."""
    _with_huge_pages()
    quiet_without_tpu()
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("lcx").setLevel(logging.INFO)
    sys.exit(run(main, sys.argv[1:]))


def _with_huge_pages() -> None:
    """Starts the same command again with huge pages for glibc's heap, which only the environment can ask for.

    XLA's CPU backend returns its temporaries to the system every step; with pages of 4 kB a fifth of a toy step is page faults.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})


def run(main: Main, argv: list[str]) -> int:
    """`main` over the parsed command line; its exit status. Only `REFUSALS` and `FAILURES` become one line."""
    name, module = Path(inspect.getfile(main)).stem, inspect.getmodule(main)
    try:
        arguments = Arguments(_parse(name, argv, getattr(module, "define", None)))
        if arguments.flags.help:
            print(_help(module.__doc__ or "", arguments.flags))
            return 0
        status = main(arguments) or 0
        sys.stdout.flush()
        return status
    except (*REFUSALS, *FAILURES) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, REFUSALS) else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails too
        return 128 + signal.SIGPIPE


def _parse(name: str, argv: list[str], define: Define | None) -> flags.FlagValues:
    own = flags.FlagValues()
    words = "config:<name> or config_file:<path>, then any of set:<field>=<value> and fiddler:<name>, from left to right; "
    words += "without the first they edit the config of --run_dir"
    config = ConfigFlag(name="config", parser=flags.ArgumentParser(), serializer=None, help_string=words)
    flags.DEFINE_flag(config, flag_values=own)
    flags.DEFINE_string("run_dir", None, "folder of the run; default runs/<config name>", flag_values=own)
    flags.DEFINE_bool("dry_run", False, "print the resolved config and its figures, and stop", flag_values=own)
    flags.DEFINE_bool("help", False, "print this", flag_values=own)
    if define is not None:
        define(own)
    try:
        extra = own([name, *argv])[1:]
    except flags.IllegalFlagValueError as error:
        given = re.match(r"flag --(\w+)=(.*?): ", str(error), re.DOTALL)
        accepted = given and own[given[1]].parser.syntactic_help
        if not accepted:
            raise
        raise SpecError(f"--{given[1]}={given[2]}: expected {accepted}") from None
    if extra:
        raise SpecError(f"{extra[0]!r} is no flag: expected --name=value")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([name])  # libraries read their own flags, at their defaults
    return own


def _help(doc: str, own: flags.FlagValues) -> str:
    lines = [f"  --{name}: {own[name].help} (default {own[name].default})" for name in own]
    return "\n".join([doc.strip(), "", "Flags:", *lines, "", "Configs:", *(f"  {name}" for name in config_names())])


class ConfigFlag(absl_flags.FiddleFlag):
    """Fiddle's config flag over `configs`: defaults are written out, `set:` reaches them and takes parts."""

    def __init__(self, **options):
        super().__init__(default=None, default_module=configs, allow_imports=True, pyref_policy=ONLY_PARTS, **options)
        self.folder: Path | None = None
        self.waiting: list[str] = []  # edits without a base

    def parse(self, arguments):
        """Checks one directive and hands it to Fiddle, `set:` as the fiddler that does the same with parts."""
        command, _, expression = arguments.partition(":")
        if command in ("config", "config_file"):
            if self.folder is not None:
                raise SpecError(f"--config={arguments} is a second base config: expected one, then set: and fiddler:")
            if self.waiting:
                raise SpecError(NO_BASE.format(self.waiting[0]))
            self.folder = _config_folder(expression) if command == "config" else _file_folder(expression)
            directives = [arguments, "fiddler:lcx.config.expand"]
        elif self.folder is None and command not in ("set", "fiddler"):
            if arguments.partition("(")[0] in config_names():
                raise SpecError(f"--config={arguments}: did you mean --config=config:{arguments}?")
            raise SpecError(NO_BASE.format(arguments))
        elif command == "fiddler":
            _check_call(expression, skip=1)
            directives = [f"fiddler:experiments.program.edit_with({expression!r})", "fiddler:lcx.config.expand"]
        elif command == "set" and "=" in expression:
            path, _, text = expression.partition("=")
            directives = [f"fiddler:experiments.program.set_field({path!r}, {text!r})"]
        else:
            raise SpecError(f"--config={arguments}: expected config:, config_file:, set:<path>=<value> or fiddler:")
        if self.folder is None:
            self.waiting.append(arguments)
        else:
            super().parse(directives)

    def edited(self, tree: Any) -> Any:
        """The tree with the edits that had no base."""
        for command, _, expression in (arguments.partition(":") for arguments in self.waiting):
            if command == "fiddler":
                tree = expand(edit_with(tree, expression))
            else:
                path, _, text = expression.partition("=")
                tree = set_field(tree, path, text)
        return tree


def set_field(tree: Any, path: str, text: str) -> Any:
    """What `--config=set:path=text` does."""
    try:
        return assign(tree, path, parse(text))
    except NoSuchPart as error:
        raise SpecError(f"--config=set:{path}={text}: {error} Expected {accepted_at(tree, path)}") from None
    except SpecError as error:
        raise SpecError(f"--config=set:{path}={text}: {error}") from None


def edit_with(tree: Any, expression: str) -> Any:
    """What `--config=fiddler:expression` does."""
    function, args, kwargs = _check_call(expression, skip=1)
    try:
        edited = function(tree, *args, **kwargs)
    except (AttributeError, LookupError, TypeError) as error:
        kind = fiddle.get_callable(tree).__name__
        raise SpecError(f"--config=fiddler:{expression}: does not fit this config of type {kind}: {error}") from error
    return tree if edited is None else edited


def config_names() -> list[str]:
    """Dotted names of every public function under `configs`."""
    names = []
    for module in pkgutil.walk_packages(configs.__path__, "configs."):
        members = vars(importlib.import_module(module.name))
        names += [f"{module.name}.{name}" for name, value in members.items() if _is_config(name, value, module.name)]
    return sorted(name.removeprefix("configs.") for name in names)


def _is_config(name: str, value: Any, module: str) -> bool:
    return not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module


def _config_folder(expression: str) -> Path:
    _check_call(expression, skip=0)
    return Path("runs") / expression.partition("(")[0]


def _file_folder(path: str) -> Path:
    if not Path(path).is_file():
        raise SpecError(f"--config=config_file:{path}: there is no such file")
    try:
        load_file(Path(path))
    except SpecError as error:
        raise SpecError(f"--config=config_file:{path}: {error}") from None
    return Path(path).parent


def _check_call(expression: str, skip: int) -> tuple[Callable, list[Any], dict[str, Any]]:
    """The function and arguments of `name` or `name(literals)`, after checking that it exists under `configs` and takes these
    arguments after its first `skip`."""
    match = re.fullmatch(r"([A-Za-z_][\w.]*)(\(.*\))?", expression)
    if match is None:
        raise SpecError(f"{expression!r} is no config: expected a name, or name(argument=value)")
    name, call = match[1], match[2] or "()"
    function = _resolve(name)
    try:
        node = ast.parse(f"f{call}", mode="eval").body
        args = [ast.literal_eval(arg) for arg in node.args]
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (SyntaxError, ValueError, AttributeError):
        raise SpecError(f"{expression!r}: expected literals in the parentheses") from None
    beneath = getattr(function, "func", function)  # auto_config
    if skip and beneath is not function:
        raise SpecError(f"{expression!r} is a config: expected a function that edits one, such as edits.windowed(64)")
    signature, hints = inspect.signature(beneath), typing.get_type_hints(beneath)
    try:
        bound = signature.bind(*[None] * skip, *args, **kwargs).arguments
    except TypeError as error:
        raise SpecError(f"{expression!r}: {error}; it takes {signature}") from None
    for argument, value in list(bound.items())[skip:]:
        if not matches(value, hints.get(argument, Any)):
            raise SpecError(f"{expression!r}: {argument} = {value!r}: expected {describe(hints[argument])}")
    return function, args, kwargs


def _resolve(name: str) -> Callable:
    """The function with this dotted name under `configs`, its modules imported on the way."""
    found: Any = configs
    for part in name.split("."):
        if hasattr(found, "__path__") and importlib.util.find_spec(f"{found.__name__}.{part}"):
            found = importlib.import_module(f"{found.__name__}.{part}")
        else:
            found = getattr(found, part, None)
    last = name.rpartition(".")[2]
    if not callable(found) or not _is_config(last, found, f"configs.{name}".rpartition(".")[0]):
        raise SpecError(f"configs has no function {name!r}.{suggestion(name, config_names()) or ' --help lists them.'}")
    return found
