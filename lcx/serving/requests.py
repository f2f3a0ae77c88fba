"""What a request to the HTTP interface may say: every field checked by name, none ignored."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from lcx.inference.sampling import Sampling


class Refused(ValueError):
    """A request that cannot be served. status, code: of HTTP and of the interface; param: the field."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A request, checked. prompts: texts or ids; messages: of a chat, which then has no prompts. top: likeliest tokens to tell
    of beside each, None where no log-probabilities are asked for."""

    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] | None
    max_new: int | None
    sampling: Sampling
    seed: int
    n: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    top: int | None


class Fields:
    """The fields of a JSON object, taken one by one; what is left over is refused."""

    def __init__(self, given: Any):
        if not isinstance(given, dict):
            raise Refused("the body: expected a JSON object")
        self.left = {key: value for key, value in given.items() if value is not None}

    def take(self, name: str, default: Any, ok: Callable[[Any], bool], expected: str) -> Any:
        if name not in self.left:
            return default
        value = self.left.pop(name)
        if not ok(value):
            raise Refused(f"{name} = {repr(value)[:80]}: expected {expected}", name)
        return value

    def number(self, name: str, default: float | None, low: int, high: int) -> float | None:
        ok = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high
        found = self.take(name, default, ok, f"a number from {low} to {high}")
        return None if found is None else float(found)

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        ok = lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high
        return self.take(name, default, ok, f"an integer from {low} to {high}")

    def flag(self, name: str) -> bool:
        return self.take(name, False, lambda x: isinstance(x, bool), "true or false")

    def only(self, name: str, *accepted: Any) -> None:
        """A field of the interface that is served with these values alone."""
        self.take(name, None, lambda x: x in accepted, " or ".join(map(repr, accepted)) + ", as nothing else is served")

    def end(self) -> None:
        for name in self.left:
            raise Refused(f"{name}: no field that is served", name)


MOST = 1 << 31
_UNSERVED = {  # fields of the interface, and the values that ask for nothing
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
}
_NOTED = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # said for records, which this server does not keep


def completion(given: Any, models: tuple[str, ...]) -> Wanted:
    """A request for /v1/completions. Raises Refused."""
    fields = Fields(given)
    prompts = fields.take("prompt", None, _is_prompt, "a text, token ids, or a list of either")
    if prompts is None:
        raise Refused("prompt is missing", "prompt")
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    prompts = tuple(one if isinstance(one, str) else tuple(one) for one in prompts)
    top = fields.integer("logprobs", None, 0, 20)
    return _rest(fields, models, prompts=prompts, messages=(), tools=None, top=top, default=16)


def chat(given: Any, models: tuple[str, ...]) -> Wanted:
    """A request for /v1/chat/completions. Raises Refused."""
    fields = Fields(given)
    is_objects = lambda x: isinstance(x, list) and len(x) > 0 and all(isinstance(one, dict) for one in x)
    messages = fields.take("messages", None, is_objects, "a list of messages, at least one")
    if messages is None:
        raise Refused("messages are missing", "messages")
    tools = fields.take("tools", None, is_objects, "a list of objects, which the chat template writes out")
    asked, top = fields.flag("logprobs"), fields.integer("top_logprobs", None, 0, 20)
    if top is not None and not asked:
        raise Refused("top_logprobs: expected logprobs = true beside it", "top_logprobs")
    limit = fields.integer("max_completion_tokens", None, 1, MOST)
    if limit is not None and fields.left.setdefault("max_tokens", limit) != limit:
        raise Refused("max_tokens and max_completion_tokens differ: expected one of them", "max_completion_tokens")
    texts = tuple(_with_text(n, message) for n, message in enumerate(messages))
    tools = None if tools is None else tuple(tools)
    return _rest(fields, models, prompts=(), messages=texts, tools=tools, top=(top or 0) if asked else None, default=None)


def _rest(fields: Fields, models: tuple[str, ...], *, top: int | None, default: int | None, **asked: Any) -> Wanted:
    """The fields that both kinds of request have."""
    model = fields.take("model", models[0], lambda x: isinstance(x, str), "a name")
    if model not in models:
        raise Refused(f"model = {model!r}: expected {', '.join(models)}", "model", status=404, code="model_not_found")
    temperature = fields.number("temperature", 1.0, 0, 100)
    cuts = {"top_k": fields.integer("top_k", None, 1, MOST - 2), "min_p": fields.number("min_p", None, 0, 1)}
    is_share = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and 0 < x <= 1
    cuts["top_p"] = fields.take("top_p", None, is_share, "a number above 0, 1 at most")
    cuts = {name: cut for name, cut in cuts.items() if cut is not None and (name, cut) not in (("top_p", 1), ("min_p", 0))}
    sampling = Sampling(temperature=temperature, **(cuts if temperature else {}))
    is_stops = lambda x: isinstance(x, str) or (isinstance(x, list) and all(isinstance(one, str) for one in x))
    stop = fields.take("stop", [], is_stops, "a text or a list of texts")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise Refused("stop = '': expected some text", "stop")
    stream = fields.flag("stream")
    options = Fields(
        fields.take("stream_options", {}, lambda x: isinstance(x, dict) and stream, "an object, beside stream = true")
    )
    usage = options.flag("include_usage")
    options.end()
    for name, accepted in _UNSERVED.items():
        fields.only(name, *accepted)
    for name in _NOTED:
        fields.left.pop(name, None)
    wanted = Wanted(
        max_new=fields.integer("max_tokens", default, 1, MOST),
        sampling=sampling,
        seed=fields.integer("seed", secrets.randbits(32), 0, (1 << 32) - 1),
        n=fields.integer("n", 1, 1, 128),
        stop=stop,
        stream=stream,
        usage=usage,
        top=top,
        **asked,
    )
    fields.end()
    return wanted


def _is_prompt(value: Any) -> bool:
    ids = lambda x: isinstance(x, list) and len(x) > 0 and all(isinstance(n, int) and not isinstance(n, bool) for n in x)
    texts = lambda x: isinstance(x, list) and len(x) > 0 and all(isinstance(one, str) or ids(one) for one in x)
    return isinstance(value, str) or ids(value) or texts(value)


def _with_text(n: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is a text. Parts of text are put together; other parts are refused."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
        ):
            raise Refused(f"messages[{n}].content: expected parts of type text alone", "messages")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise Refused(f"messages[{n}]: expected a role and a content, both text", "messages")
    return {**message, "content": content}
