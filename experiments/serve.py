"""Serves a trained model behind OpenAI's HTTP interface: completions, chats, streaming, log-probabilities.

    python -m experiments.serve --run_dir=models/llama-3.1-8b-instruct --port=8000
    curl localhost:8000/v1/completions -d '{"prompt": "def main(", "max_tokens": 20}'
    OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none  ...any client of OpenAI's

--run_dir is a run, a shipped model or a checkpoint folder; its chat template serves /v1/chat/completions. Requests share rows
that are refilled as they finish. A field that is not served is refused by its name. Needs the `serve` extra.
"""

import contextlib
import socket

from absl import flags

from experiments.generate import define_mesh, on_mesh, template_of
from experiments.program import Arguments, launch
from lcx.config_text import render
from lcx.data.tokenizers import HFTokenizer
from lcx.inference.engine import Engine
from lcx.models.light import light
from lcx.plan import listed, model_figures
from lcx.spec import SpecError
from lcx.support import validate
from lcx.training.checkpoint import load_model
from lcx.training.experiment import Experiment
from lcx.training.run_folder import read_trained
from lcx.training.shipped import run_folder


def define(values: flags.FlagValues) -> None:
    define_mesh(values)
    flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0 is every one", flag_values=values)
    flags.DEFINE_integer("port", 8000, "to listen at", lower_bound=0, upper_bound=65535, flag_values=values)
    flags.DEFINE_string("name", None, "of the model; default: as --run_dir", flag_values=values)
    flags.DEFINE_integer("window", None, "most tokens of a request; default: as trained", lower_bound=2, flag_values=values)
    flags.DEFINE_integer("rows", 8, "requests answered at once", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("waiting", 256, "most requests that are unfinished at a time", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("chunk", 512, "tokens of a prompt read between two bursts", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("burst", 8, "tokens of every row between two chunks", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint of this step; default: the newest", flag_values=values)


def main(arguments: Arguments) -> None:
    asked = arguments.flags
    experiment = arguments.spec(Experiment, read=read_trained)
    validate(experiment)
    window = asked.window or experiment.data.length
    model_spec, mesh = on_mesh(asked, experiment.model, window, asked.rows)
    if arguments.dry_run:
        print(f"{render(experiment.model, 'model')}\n")
        print(listed(model_figures(experiment.model, (window,))))
        return
    try:
        import uvicorn

        from lcx.serving.app import build_app
        from lcx.serving.worker import Worker
    except ImportError as error:
        raise SpecError(f"{error.name} is not installed: expected the extra, pip install 'lcx[serve]'") from None
    tokenizer = experiment.data.tokenizer
    try:
        template = template_of(tokenizer) if isinstance(tokenizer, HFTokenizer) else None
    except SpecError as error:
        template = None
        print(f"chats are refused, completions are not: {error}", flush=True)
    listening = _bound(asked.host, asked.port)
    model = light(load_model(run_folder(arguments.run_dir), model_spec, step=asked.step, mesh=mesh))
    engine = Engine(model, window=window, rows=asked.rows, chunk=asked.chunk, burst=asked.burst, mesh=mesh)
    name = asked.name or arguments.run_dir.name
    app = build_app(Worker(engine, asked.waiting), tokenizer, template, name)
    address = f"http://{asked.host}:{listening.getsockname()[1]}/v1"
    print(f"{name}: window of {window:,} tokens, {engine.rows} rows, {address}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address, before a model is read for it. Raises SpecError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise SpecError(f"--host={host}: {error.strerror}: expected an address of this machine") from None
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        raise SpecError(f"--host={host} --port={port}: {error.strerror}: expected a free port of this machine") from None
    return made


if __name__ == "__main__":
    launch(main)
