"""How answers are written: a completion's choices and a chat's, whole and in the parts of a stream."""

import time
import uuid
from typing import Any

from lcx.data.tokenizers import Tokenizer
from lcx.serving.requests import Wanted


class Form:
    """How a kind of request is answered: `whole` is a choice, `part` one of a stream."""

    kind: str
    part_kind: str
    prefix: str
    prompt: str

    def __init__(self, name: str, tokenizer: Tokenizer, wanted: Wanted):
        self.name, self.tokenizer, self.wanted = name, tokenizer, wanted
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def word(self, token: int) -> str:
        return self.tokenizer.decode([token])


class CompletionForm(Form):
    kind = part_kind = "text_completion"
    prefix, prompt = "cmpl", "prompt"

    def whole(self, n: int, told: tuple) -> dict[str, Any]:
        text, tokens, finish = told
        return {"index": n, "text": text, "finish_reason": finish, "logprobs": self._logprobs(tokens)}

    def part(self, n: int, told: tuple, first: bool) -> dict[str, Any]:
        return self.whole(n, told)

    def _logprobs(self, tokens: list[tuple]) -> dict[str, Any] | None:
        if self.wanted.top is None:
            return None
        words = [self.word(token) for token, _, _ in tokens]
        places = [sum(map(len, words[:i])) for i in range(len(words))]
        tops = [{self.word(i): x for i, x in top} for _, _, top in tokens] if self.wanted.top else None
        return {
            "tokens": words,
            "token_logprobs": [logprob for _, logprob, _ in tokens],
            "top_logprobs": tops,
            "text_offset": places,
        }


class ChatForm(Form):
    kind, part_kind = "chat.completion", "chat.completion.chunk"
    prefix, prompt = "chatcmpl", "messages"

    def whole(self, n: int, told: tuple) -> dict[str, Any]:
        text, tokens, finish = told
        message = {"role": "assistant", "content": text}
        return {"index": n, "message": message, "finish_reason": finish, "logprobs": self._logprobs(tokens)}

    def part(self, n: int, told: tuple, first: bool) -> dict[str, Any]:
        text, tokens, finish = told
        delta = ({"role": "assistant"} if first else {}) | {"content": text}
        return {"index": n, "delta": delta, "finish_reason": finish, "logprobs": self._logprobs(tokens)}

    def _logprobs(self, tokens: list[tuple]) -> dict[str, Any] | None:
        if self.wanted.top is None:
            return None
        one = lambda token, logprob: {
            "token": self.word(token),
            "logprob": logprob,
            "bytes": list(self.word(token).encode()),
        }
        content = [one(token, x) | {"top_logprobs": [one(*pair) for pair in top]} for token, x, top in tokens]
        return {"content": content, "refusal": None}
