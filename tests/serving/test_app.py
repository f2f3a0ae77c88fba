"""The HTTP interface gives what the model says, in the forms of OpenAI's clients, and refuses by name what it does not."""

import asyncio
import json
import math
import sys
from pathlib import Path

import jax
import pytest

pytest.importorskip("starlette")
from starlette.testclient import TestClient

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))
from golden import GOLDEN, loaded

from lcx.inference.engine import Ask, Engine
from lcx.inference.generate import generate
from lcx.interop.chat import chat_template
from lcx.interop.folder import Folder
from lcx.parallel.mesh import MeshSpec
from lcx.serving.app import build_app
from lcx.serving.worker import Failed, Worker
from lcx.training.pretrained import tokenizer_of

FOLDER, NAME = GOLDEN / "llama3.1", "tiny"
TOKENIZER = tokenizer_of(Folder(FOLDER))
GREEDY = {"temperature": 0, "max_tokens": 8}
TEMPLATE = chat_template(FOLDER)
MESSAGES = [{"role": "user", "content": "hi there"}]


@pytest.fixture(scope="module")
def model():
    return loaded(FOLDER, MeshSpec().build(jax.devices()[:1]))[1]


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, window=96, rows=2, chunk=16, burst=3)


@pytest.fixture(scope="module")
def client(engine):
    with TestClient(build_app(Worker(engine, waiting=6), TOKENIZER, TEMPLATE, NAME)) as client:
        yield client


def said(model, text, new=8, chat=False):
    ids = TOKENIZER.encode(text) if chat else TOKENIZER.prompt(text)
    return generate(model, [ids.tolist()], max_new=new, stop=TOKENIZER.stops, chunk=16)[0]


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_is_what_the_model_says(client, model):
    wanted = said(model, "hi, you")
    found = client.post("/v1/completions", json={"prompt": "hi, you", "logprobs": 2, **GREEDY}).json()
    (choice,) = found["choices"]
    assert choice["text"] == TOKENIZER.decode(wanted.ids) and choice["finish_reason"] == wanted.finish
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted.logprobs, abs=1e-4)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [2] * len(wanted.ids)
    assert found["usage"] == {"prompt_tokens": 8, "completion_tokens": len(wanted.ids), "total_tokens": 8 + len(wanted.ids)}
    assert found["object"] == "text_completion" and found["model"] == NAME


def test_several_prompts_and_choices(client, model):
    """Texts and ids, each as often as asked for, with seeds of their own: the same again where they are given."""
    ask = {"prompt": ["hi", "you are"], "n": 2, "seed": 3, "max_tokens": 6}
    first, again = (client.post("/v1/completions", json=ask).json()["choices"] for _ in range(2))
    assert [choice["index"] for choice in first] == [0, 1, 2, 3]
    assert [choice["text"] for choice in first] == [choice["text"] for choice in again]
    ids = TOKENIZER.prompt("hi").tolist()
    by_ids = client.post("/v1/completions", json={"prompt": ids, **GREEDY}).json()["choices"][0]["text"]
    assert by_ids == TOKENIZER.decode(said(model, "hi").ids)


@pytest.mark.parametrize("stops", [False, True])
def test_a_stream_is_the_whole(client, stops):
    ask = {"prompt": "hi, you", "logprobs": 0, **GREEDY}
    if stops:
        text = client.post("/v1/completions", json=ask).json()["choices"][0]["text"]
        ask["stop"] = text[len(text) // 2 :][:2]
    whole = client.post("/v1/completions", json=ask).json()
    parts = events(client.post("/v1/completions", json={**ask, "stream": True, "stream_options": {"include_usage": True}}))
    assert "".join(part["choices"][0]["text"] for part in parts[:-1]) == whole["choices"][0]["text"]
    tokens = [word for part in parts[:-1] for word in part["choices"][0]["logprobs"]["tokens"]]
    assert tokens == whole["choices"][0]["logprobs"]["tokens"]
    assert [part["choices"][0]["finish_reason"] for part in parts[:-1]][-1] == whole["choices"][0]["finish_reason"]
    assert parts[-1]["usage"] == whole["usage"] and parts[-1]["choices"] == []


def test_a_chat_is_answered_by_the_template(client, model):
    wanted = said(model, TEMPLATE.render(MESSAGES), chat=True)
    ask = {"model": NAME, "messages": MESSAGES, "logprobs": True, "top_logprobs": 1, **GREEDY}
    (choice,) = client.post("/v1/chat/completions", json=ask).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": TOKENIZER.decode(wanted.ids)}
    assert [one["logprob"] for one in choice["logprobs"]["content"]] == pytest.approx(wanted.logprobs, abs=1e-4)
    parts = events(client.post("/v1/chat/completions", json={**ask, "stream": True}))
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == choice["message"]["content"]
    pieces = [{"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]}]
    again = client.post("/v1/chat/completions", json={**ask, "messages": pieces}).json()["choices"][0]
    assert again["message"] == choice["message"]


COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "line"),
    [
        (COMPLETIONS, {}, 400, "prompt", "prompt is missing"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 2}}, 400, "logit_bias", "as nothing else is served"),
        (COMPLETIONS, {"prompt": "a", "temprature": 1}, 400, "temprature", "no field that is served"),
        (
            COMPLETIONS,
            {"prompt": "a", "temperature": -1},
            400,
            "temperature",
            "temperature = -1: expected a number from 0 to 100",
        ),
        (COMPLETIONS, {"prompt": "a", "max_tokens": True}, 400, "max_tokens", "expected an integer"),
        (COMPLETIONS, {"prompt": "a", "top_p": 0}, 400, "top_p", "top_p = 0: expected a number above 0"),
        (COMPLETIONS, {"prompt": "a", "stop": ["", "b"]}, 400, "stop", "expected some text"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, 400, "stream_options", "beside stream = true"),
        (COMPLETIONS, {"prompt": "a", "model": "gpt"}, 404, "model", "expected tiny"),
        (COMPLETIONS, {"prompt": [99]}, 400, "prompt", "token id 99"),
        (COMPLETIONS, {"prompt": "a" * 96, "max_tokens": 1}, 400, "prompt", "expected at most window = 96"),
        (COMPLETIONS, {"prompt": ["a"] * 7}, 429, None, "expected 6 at most"),
        (CHATS, {"messages": []}, 400, "messages", "at least one"),
        (CHATS, {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages", "no role tool"),
        (CHATS, {"messages": MESSAGES, "tools": [{}]}, 400, "tools", "the chat template of the model does not read them"),
        ("/v1/embeddings", {}, 404, None, "POST /v1/embeddings: Not Found: expected /v1/models, /v1/completions"),
        ("/health", {}, 405, None, "POST /health: Method Not Allowed: expected GET or HEAD"),
        (CHATS, {"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs", "expected logprobs = true"),
        (CHATS, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "type text alone"),
    ],
)
def test_what_is_not_served_is_named(client, path, body, status, param, line):
    response = client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert line in error["message"]


def test_other_requests(client):
    assert client.get("/v1/models").json()["data"][0] | {"created": 0} == {
        "id": NAME,
        "object": "model",
        "created": 0,
        "owned_by": "lcx",
        "max_model_len": 96,
    }
    assert client.get("/v1/models/other").status_code == 404
    compiled = client.get("/health").json()["programs_compiled"]
    ask = {"max_tokens": 5, "temperature": 0.7}
    for text in ("you", "hi", "what is this"):
        client.post("/v1/completions", json={"prompt": text, **ask})
    assert client.get("/health").json() == {"status": "ok", "unfinished": 0, "programs_compiled": compiled}
    assert "no JSON" in client.post("/v1/completions", content=b"{").json()["error"]["message"]


def test_a_model_without_a_template_refuses_chats(engine):
    with TestClient(build_app(Worker(engine), TOKENIZER, None, NAME)) as client:
        assert "no chat template" in client.post(CHATS, json={"messages": MESSAGES}).json()["error"]["message"]


def test_an_answer_without_numbers_is_no_answer(engine, monkeypatch):
    """Of one request; the engine goes on."""
    step = engine.step
    broken = lambda: [piece._replace(logprobs=[math.nan] * len(piece.ids)) for piece in step()]
    with TestClient(build_app(Worker(engine), TOKENIZER, None, NAME)) as client:
        monkeypatch.setattr(engine, "step", broken)
        found = client.post(COMPLETIONS, json={"prompt": "hi", "logprobs": 0, **GREEDY})
        assert found.status_code == 500 and "= nan: expected finite numbers" in found.json()["error"]["message"]
        monkeypatch.undo()
        assert client.post(COMPLETIONS, json={"prompt": "hi", **GREEDY}).status_code == 200


def test_a_request_that_finds_no_slots_fails_alone(engine, monkeypatch):
    """As if rows held more than they do; the next one is answered."""
    with TestClient(build_app(Worker(engine), TOKENIZER, None, NAME)) as client:
        monkeypatch.setattr(engine, "window", 2 * engine.room)
        found = client.post(COMPLETIONS, json={"prompt": [1] * (engine.room + 1), **GREEDY})
        assert found.status_code == 500 and "tokens found no slot in layer 0" in found.json()["error"]["message"]
        monkeypatch.undo()
        assert client.post(COMPLETIONS, json={"prompt": "hi", **GREEDY}).status_code == 200


def test_an_engine_that_fails_is_told_of(engine, monkeypatch):
    async def asked():
        worker = Worker(engine)
        monkeypatch.setattr(engine, "step", lambda: 1 / 0)
        with pytest.raises(Failed, match="division by zero"):
            async for _ in worker.submit([Ask([1], 2)])[0]:
                pass
        with pytest.raises(Failed):
            worker.submit([Ask([1], 2)])

    asyncio.run(asked())
