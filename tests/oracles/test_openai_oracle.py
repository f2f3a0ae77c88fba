"""The official client of OpenAI talks to a served model: completions, chats, streams, log-probabilities, errors."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "golden" / "hf" / "llama3.1"


@pytest.fixture(scope="module")
def client():
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.serve", f"--run_dir={FOLDER}", f"--port={port}", "--window=96", "--rows=2"]
    server = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=os.environ | {"JAX_PLATFORMS": "cpu"})
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.oracle
def test_the_official_client(client):
    import openai

    assert [model.id for model in client.models.list()] == [FOLDER.name]
    ask = {"model": FOLDER.name, "temperature": 0, "max_tokens": 6}
    whole = client.completions.create(prompt="hi, you", logprobs=2, **ask)
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.tokens) > 0
    streamed = client.completions.create(prompt="hi, you", stream=True, **ask)
    assert "".join(part.choices[0].text for part in streamed) == whole.choices[0].text
    messages = [{"role": "user", "content": "hi there"}]
    chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **ask)
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    with client.chat.completions.create(messages=messages, stream=True, stream_options={"include_usage": True}, **ask) as parts:
        parts = list(parts)
    assert "".join(part.choices[0].delta.content for part in parts[:-1]) == chat.choices[0].message.content
    assert parts[-1].usage == chat.usage
    with pytest.raises(openai.BadRequestError, match="window = 96") as found:
        client.completions.create(model=FOLDER.name, prompt="a" * 96, max_tokens=4)
    assert found.value.code == "context_length_exceeded" and found.value.param == "prompt"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="a")
