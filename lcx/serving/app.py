"""The HTTP interface, as OpenAI's clients speak it: /v1/models, /v1/completions, /v1/chat/completions, and /health (ASGI)."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lcx.data.tokenizers import Tokenizer
from lcx.inference.compilations import Compilations
from lcx.inference.engine import Ask, Piece
from lcx.inference.requests import NotFinite, WindowOverflow, check_finite
from lcx.inference.text import Unfolding
from lcx.interop.chat import ChatError, ChatTemplate
from lcx.serving.forms import ChatForm, CompletionForm, Form
from lcx.serving.requests import Refused, Wanted, chat, completion
from lcx.serving.worker import Answer, Busy, Failed, Worker


def build_app(worker: Worker, tokenizer: Tokenizer, template: ChatTemplate | None, name: str) -> Starlette:
    """name: of the model. template: None where it has none; chats are then refused."""
    service = _Service(worker, tokenizer, template, name)
    routes = [
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/models/{model:path}", service.model),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        worker.close()
        service.compiled.close()

    handlers = {Refused: _refused, HTTPException: _not_there}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


class _Service:
    def __init__(self, worker: Worker, tokenizer: Tokenizer, template: ChatTemplate | None, name: str):
        self.worker, self.tokenizer, self.template, self.name = worker, tokenizer, template, name
        self.began, self.compiled = int(time.time()), Compilations().listen()

    async def health(self, _: Request) -> Response:
        state = {"status": "ok", "unfinished": self.worker.unfinished, "programs_compiled": self.compiled.count}
        return JSONResponse(state)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        if (asked := request.path_params["model"]) != self.name:
            raise Refused(f"model = {asked!r}: expected {self.name}", "model", status=404, code="model_not_found")
        return JSONResponse(self._described())

    async def completions(self, request: Request) -> Response:
        wanted = completion(await _body(request), (self.name,))
        texts = [one if isinstance(one, tuple) else tuple(self.tokenizer.prompt(one).tolist()) for one in wanted.prompts]
        return await self._answer(request, wanted, texts, CompletionForm(self.name, self.tokenizer, wanted))

    async def chat(self, request: Request) -> Response:
        wanted = chat(await _body(request), (self.name,))
        if self.template is None:
            raise Refused("the model has no chat template: expected a request for /v1/completions")
        if wanted.tools is not None and not self.template.reads("tools"):
            raise Refused("tools: expected none, as the chat template of the model does not read them", "tools")
        try:
            text = self.template.render(wanted.messages, tools=wanted.tools)
        except ChatError as error:
            raise Refused(str(error), "messages") from None
        return await self._answer(
            request, wanted, [tuple(self.tokenizer.encode(text).tolist())], ChatForm(self.name, self.tokenizer, wanted)
        )

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.began, "owned_by": "lcx", "max_model_len": self.window}

    @property
    def window(self) -> int:
        return self.worker.engine.window

    async def _answer(self, request: Request, wanted: Wanted, prompts: Sequence[tuple[int, ...]], form: Form) -> Response:
        asks = [self._ask(wanted, prompt, wanted.seed + n) for prompt in prompts for n in range(wanted.n)]
        try:
            answers = self.worker.submit(asks)
        except WindowOverflow as error:
            raise Refused(str(error), form.prompt, code="context_length_exceeded") from None
        except ValueError as error:
            raise Refused(str(error), form.prompt) from None
        except Busy as error:
            raise Refused(str(error), status=429, code="rate_limit_exceeded") from None
        except Failed as error:
            raise Refused(f"the engine failed: {error}", status=500) from None
        told = [_Told(answer, self.tokenizer, wanted.stop) for answer in answers]
        used = sum(map(len, prompts))
        if wanted.stream:
            return StreamingResponse(_streamed(form, told, used, wanted.usage), media_type="text/event-stream")
        try:
            whole = await _unless_gone(request, asyncio.gather(*(one.all() for one in told)))
            choices = [form.whole(n, one) for n, one in enumerate(whole)]
        except Failed as error:
            raise Refused(f"the engine failed: {error}", status=500) from None
        finally:
            for one in told:
                one.answer.cancel()
        return JSONResponse(form.head(form.kind) | {"choices": choices, "usage": _usage(used, told)})

    def _ask(self, wanted: Wanted, prompt: tuple[int, ...], seed: int) -> Ask:
        new = wanted.max_new if wanted.max_new is not None else max(1, self.window - len(prompt))
        return Ask(prompt, new, wanted.sampling, seed % (1 << 32), self.tokenizer.stops, wanted.top or 0)


class _Told:
    """An answer as text. Its pieces are (text, tokens, finish), text that a stop string ends, tokens that are whole."""

    def __init__(self, answer: Answer, tokenizer: Tokenizer, stops: tuple[str, ...]):
        self.answer, self.text = answer, Unfolding(tokenizer, stops)
        self.count, self.finish = 0, None

    async def pieces(self) -> AsyncIterator[tuple[str, list[tuple], str | None]]:
        async for piece in self.answer:
            try:
                check_finite(piece.logprobs)
            except NotFinite as error:
                raise Failed(str(error)) from None
            before = self.text.needed
            text = self.text.add(piece.ids)
            taken = self.text.needed - before if self.text.stops else len(piece.ids)
            if self.text.stopped or piece.finish is not None:
                text += self.text.end()
                self.finish = "stop" if self.text.stopped else piece.finish
            self.count += taken
            yield text, _tokens(piece, taken), self.finish
            if self.finish is not None:
                self.answer.cancel()
                return

    async def all(self) -> tuple[str, list[tuple], str | None]:
        text, tokens = [], []
        async for piece, more, _ in self.pieces():
            text.append(piece)
            tokens += more
        return "".join(text), tokens, self.finish


async def _streamed(form: Form, told: Sequence[_Told], used: int, usage: bool) -> AsyncIterator[str]:
    """Server-sent events of all choices, one after the other."""
    event = lambda body: f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
    try:
        for n, one in enumerate(told):
            first = True
            async for piece in one.pieces():
                yield event(form.head(form.part_kind) | {"choices": [form.part(n, piece, first)]})
                first = False
        if usage:
            yield event(form.head(form.part_kind) | {"choices": [], "usage": _usage(used, told)})
        yield "data: [DONE]\n\n"
    except Failed as error:
        yield event({"error": {"message": f"the engine failed: {error}", "type": "server_error", "param": None, "code": None}})
    finally:
        for one in told:
            one.answer.cancel()


async def _unless_gone(request: Request, answers: asyncio.Future) -> list[tuple]:
    """The answers. Where the client leaves before, they are cancelled."""
    while not (await asyncio.wait([answers], timeout=1.0))[0]:
        if await request.is_disconnected():
            answers.cancel()
            raise Refused("the client is gone", status=499)
    return answers.result()


def _tokens(piece: Piece, taken: int) -> list[tuple]:
    tops = piece.tops or [[]] * len(piece.ids)
    return list(zip(piece.ids, piece.logprobs, tops, strict=True))[:taken]


def _usage(used: int, told: Sequence[_Told]) -> dict[str, int]:
    made = sum(one.count for one in told)
    return {"prompt_tokens": used, "completion_tokens": made, "total_tokens": used + made}


async def _body(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}") from None


async def _not_there(request: Request, error: HTTPException) -> Response:
    """A path that there is not, or not with this method, in the form of every other refusal."""
    methods = sorted((error.headers or {}).get("Allow", "").split(", "))
    expected = " or ".join(methods) if any(methods) else "/v1/models, /v1/completions, /v1/chat/completions or /health"
    asked = f"{request.method} {request.url.path}: {error.detail}"
    refused = Refused(f"{asked}: expected {expected}", status=error.status_code)
    response = await _refused(request, refused)
    response.headers.update(error.headers or {})
    return response


async def _refused(_: Request, error: Refused) -> Response:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    said = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    return JSONResponse({"error": said}, status_code=error.status)
