"""Sources of text: named documents with random access, in an order that does not depend on the machine.

`split` deals the documents by the hash of their name, so training and held-out text never share a document.
"""

import abc
import dataclasses
import functools
import glob
import hashlib
import json
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal, SupportsIndex

from lcx.spec import Spec

LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
HELDOUT_SHARE = 10  # one document in so many


class SourceError(ValueError):
    """A source cannot be read. The message names the file, and the line where there is one."""


class Documents:
    """Named documents; `documents[i]` reads the text of one."""

    def __init__(self, names: list[str], read: Callable[[str], str]):
        self.names = names
        self._read = read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: SupportsIndex) -> str:
        return self._read(self.names[i])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(Spec, abc.ABC):
    """Base of every source. split: `heldout` is about one document in 10, `train` the others."""

    split: Literal["all", "train", "heldout"] = "all"

    def documents(self) -> Documents:
        """The documents of the split. Raises SourceError if something is missing, unreadable or empty."""
        names, read = self.index()
        if not names:
            raise SourceError(f"{self}: there is no document")
        kept = [name for name in names if self.split == "all" or (self.split == "heldout") == is_heldout(name)]
        if not kept:
            raise SourceError(f"{self}: none of its {len(names)} documents falls into split {self.split!r}")
        return Documents(kept, read)

    def content(self) -> dict[str, int]:
        """`bytes` of all documents and a `crc32` over their names and texts. Raises SourceError if one cannot be read."""
        documents, size, check = self.documents(), 0, 0
        for i, name in enumerate(documents.names):
            text = documents[i].encode(errors="surrogatepass")
            size, check = size + len(text), zlib.crc32(text, zlib.crc32(f"{name}/{len(text)}/".encode(), check))
        return {"bytes": size, "crc32": check}

    @abc.abstractmethod
    def index(self) -> tuple[list[str], Callable[[str], str]]:
        """All names in a fixed order, and how to read one."""


def contents(spec: Any, path: str) -> dict[str, int]:
    """`content()` of every source in a spec, by its path, such as `mixture[0].rows.source.crc32`; each is read once."""
    read = functools.cache(lambda source: source.content())
    return {f"{place}.{name}": value for place, source in _sources(spec, path) for name, value in read(source).items()}


def _sources(value: Any, path: str) -> Iterator[tuple[str, Source]]:
    if isinstance(value, Source):
        yield path, value
    elif isinstance(value, Spec):
        for field in dataclasses.fields(value):
            yield from _sources(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, tuple):
        for i, element in enumerate(value):
            yield from _sources(element, f"{path}[{i}]")


def is_heldout(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(f"1/{name}".encode()).digest()[:8], "big") % HELDOUT_SHARE == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary(Source):
    """The running Python's own standard library: real text without a download.

    One document a top-level package or module: its Python files in path order. Left out are tests, installed packages
    and `encodings`, whose generated tables would be a seventh of all bytes.
    """

    def index(self):
        root = sysconfig.get_paths()["stdlib"]
        files: dict[str, list[str]] = {}
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - LEFT_OUT)
            for name in sorted(names):
                if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                    path = os.path.join(folder, name)
                    files.setdefault(os.path.relpath(path, root).split(os.sep)[0].removesuffix(".py"), []).append(path)
        return sorted(files), lambda name: "\n".join(map(_read_python, files[name]))

    @classmethod
    def examples(cls):
        return (cls(), cls(split="heldout"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFolder(Source):
    """Every UTF-8 file under `path` whose relative path matches `pattern` is a document."""

    path: str
    pattern: str = "**/*.txt"

    def index(self):
        if not os.path.isdir(self.path):
            raise SourceError(f"TextFolder.path = {self.path!r}: there is no such folder")
        names = sorted(glob.glob(self.pattern, root_dir=self.path, recursive=True))
        names = [name for name in names if os.path.isfile(os.path.join(self.path, name))]
        if not names:
            raise SourceError(f"TextFolder.pattern = {self.pattern!r}: no file matches it in {self.path!r}")
        for path in (os.path.join(self.path, name) for name in names):
            if os.path.getsize(path) == 0:
                raise SourceError(f"{path}: empty; a document needs text")
        return names, lambda name: _decode(_read(os.path.join(self.path, name)), os.path.join(self.path, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(Source):
    """Every line of the file `path` is a JSON object whose `field` is the text of a document; blank lines are none.

    All lines are checked at once; texts stay on the disk until they are read.
    """

    path: str
    field: str = "text"

    def index(self):
        if not os.path.isfile(self.path):
            found = "is a folder: expected a file" if os.path.isdir(self.path) else "there is no such file"
            raise SourceError(f"JsonLines.path = {self.path!r}: {found}")
        places: dict[str, tuple[int, int]] = {}
        start = 0
        with _open(self.path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._text(line, f"line {number}")
                    places[f"line {number}"] = (start, len(line))
                start += len(line)
        return list(places), lambda name: self._text(_read(self.path, *places[name]), name)

    def _text(self, line: bytes, name: str) -> str:
        place = f"{self.path}, {name}"
        try:
            value = json.loads(_decode(line, place))
        except json.JSONDecodeError as error:
            raise SourceError(f"{place}: not JSON: {error}") from None
        if not isinstance(value, dict) or self.field not in value:
            found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise SourceError(f"{place}: no field {self.field!r}; it has {found}")
        return self._value(value[self.field], place)

    def _value(self, value: Any, place: str) -> str:
        """A field's value as the text of a document."""
        if not isinstance(value, str):
            raise SourceError(f"{place}: field {self.field!r} is of type {type(value).__name__}: expected text")
        if not value:
            raise SourceError(f"{place}: field {self.field!r} is empty; a document needs text")
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatLines(JsonLines):
    """`JsonLines` whose `field` is a list of messages, objects with role and content; a document is that list as JSON."""

    field: str = "messages"

    def _value(self, value: Any, place: str) -> str:
        messages = isinstance(value, list) and len(value) > 0 and all(isinstance(message, dict) for message in value)
        if not messages:
            raise SourceError(f"{place}: field {self.field!r}: expected a list of messages, at least one")
        return json.dumps(value)


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from None


def _read(path: str, start: int = 0, size: int = -1) -> bytes:
    with _open(path) as file:
        file.seek(start)
        return file.read(size)


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{place}: not UTF-8 at byte {error.start}") from None


def _read_python(path: str) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
