"""The server has its address before it says that it is ready."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn")

import uvicorn

import lcx.serving.app
import lcx.serving.worker
from experiments import serve
from experiments.program import run

FOLDER = Path(__file__).parents[1] / "oracles" / "golden" / "hf" / "llama3.1"


@pytest.fixture
def served(monkeypatch):
    """Addresses that servers were started at, none of which serves, of a model that was not read."""
    seen = []
    monkeypatch.setattr(serve, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(serve, "light", lambda model: model)
    monkeypatch.setattr(serve, "Engine", lambda *_, rows, **__: SimpleNamespace(rows=rows))
    monkeypatch.setattr(lcx.serving.worker, "Worker", lambda *_: None)
    monkeypatch.setattr(lcx.serving.app, "build_app", lambda *_: None)
    monkeypatch.setattr(uvicorn, "Config", lambda *_, **__: None)  # which sets up logging anew, over that of the tests
    monkeypatch.setattr(uvicorn, "Server", lambda _: SimpleNamespace(run=lambda sockets: seen.append(sockets[0].getsockname())))
    return seen


def test_the_ready_line_has_the_port_that_is_bound(served, capsys):
    assert run(serve.main, [f"--run_dir={FOLDER}", "--port=0", "--rows=1"]) == 0
    ((host, port),) = served
    assert port > 0 and f"llama3.1: window of 192 tokens, 1 rows, http://{host}:{port}/v1\n" in capsys.readouterr().out


def test_an_address_that_cannot_be_had_is_refused_before_the_model_is_read(served, capsys, monkeypatch):
    monkeypatch.setattr(serve, "load_model", lambda *_, **__: pytest.fail("the model was read"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run(serve.main, [f"--run_dir={FOLDER}", f"--port={port}"]) == 2
    told = f"serve: --host=127.0.0.1 --port={port}: Address already in use: expected a free port of this machine\n"
    assert capsys.readouterr() == ("", told)
    assert run(serve.main, [f"--run_dir={FOLDER}", "--host=999.0.0.1"]) == 2
    assert "expected an address of this machine" in capsys.readouterr().err and not served
