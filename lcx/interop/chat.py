"""Chat templates: messages as the text that a model was trained to answer, by the Jinja template of its folder.

    [{"role": "system" | "user" | "assistant" | ..., "content": "..."}, ...]

Templates run in Jinja's sandbox with what `transformers` gives them: `bos_token` and its like, `tools`,
`add_generation_prompt`, `raise_exception`, `strftime_now`, `tojson` without HTML escapes. The text holds its special tokens.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lcx.interop.folder import Folder
from lcx.spec import SpecError

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
Message = Mapping[str, Any]


class ChatError(ValueError):
    """Messages that a template refuses."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """source: of the template. tokens: the special tokens that it may name, `bos_token` and so on."""

    source: str
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render(self, messages: Sequence[Message], *, answer: bool = True, tools: Sequence[Any] | None = None) -> str:
        """The text of the messages; with `answer` up to where the model's next message begins.

        Raises ChatError for messages that are none, or that the template refuses.
        """
        _check(messages)
        given = {"messages": list(messages), "add_generation_prompt": answer, "tools": tools, **self.tokens}
        try:
            return _compiled(self.source).render(**given)
        except Exception as error:  # a template is a program, which may fail in any way
            raise ChatError(f"messages: the chat template refuses them: {error}") from None

    def reads(self, name: str) -> bool:
        """Whether the template looks at something that it is given by this name."""
        return any(found.name == name for found in _environment().parse(self.source).find_all(nodes.Name))

    def turns(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The text of the messages in pieces, each with whether it is what the model said and is to learn to say.

        Raises ChatError where a message changes the text of those before it: which part is the model's cannot be told then.
        """
        _check(messages)
        pieces, shown = [], ""
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if n == 0:
                raise ChatError("messages[0] is of the assistant: expected one that it answers before")
            for end, asked, said in ((n, True, False), (n + 1, False, True)):
                text = self.render(messages[:end], answer=asked)
                if not text.startswith(shown):
                    raise ChatError(f"messages[{n}]: the chat template writes what stands before it otherwise with it")
                pieces.append((text[len(shown) :], said))
                shown = text
        return pieces


def _check(messages: Sequence[Any]) -> None:
    """Raises ChatError for what are no messages."""
    if not messages:
        raise ChatError("messages are empty: expected at least one")
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ChatError(f"messages[{n}] = {str(message)[:80]!r}: expected an object with role and content")


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks what the model says, and writes it as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def chat_template(path: Path | str) -> ChatTemplate:
    """That of a checkpoint folder, or of the folder of a tokenizer.json. Raises SpecError if it has none."""
    folder = Path(path)
    said = Folder(folder).json(SETTINGS) if (folder / "config.json").is_file() else _settings(folder)
    source = (folder / FILE).read_text() if (folder / FILE).is_file() else said.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {one.get("name"): one.get("template") for one in source}.get("default")
    if not isinstance(source, str):
        raise SpecError(f"{folder}: no {FILE}, and no chat_template in {SETTINGS}: expected the folder of a chat model")
    word = lambda token: token.get("content") if isinstance(token, dict) else token
    tokens = {key: word(token) for key, token in said.items() if key.endswith("_token") and word(token) is not None}
    template = ChatTemplate(source, tokens)
    try:
        _compiled(source)
    except TemplateError as error:
        raise SpecError(f"{folder}: the chat template is no Jinja template: {error}") from None
    return template


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    return json.loads(file.read_text()) if file.is_file() else {}


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, **{"ensure_ascii": False, **options})
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _refuse(message: str) -> None:
    raise TemplateError(message)
