"""Continues a prompt with a trained model, streaming the text, or talks with one.

    python -m experiments.generate --run_dir=runs/quick --prompt='def main(' --max_new=200 --temperature=0.8
    echo 'import os' | python -m experiments.generate --run_dir=runs/quick
    python -m experiments.generate --run_dir=reader --prompt='def main('     # a model that comes with the package
    python -m experiments.generate --run_dir=models/llama-3.1-8b-instruct --chat --temperature=0.7     # a checkpoint folder

    ... --tensor=8     # on eight devices, heads shared out

Another rope or cache than the trained one is an edit, the parameters stay:
    --run_dir=runs/quick --config='set:model.rope=YaRN(factor=4.0, original_length=256)' --window=1024

--chat reads a line a message from standard input and answers by the chat template of the model's folder, until the input ends.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags
from jax.sharding import Mesh

from experiments.program import Arguments, launch
from lcx.config_text import render
from lcx.data.tokenizers import HFTokenizer, Tokenizer
from lcx.inference.requests import WindowOverflow
from lcx.inference.sampling import Sampling
from lcx.inference.serving import Serving, answering
from lcx.inference.stream import stream, text_of
from lcx.interop.chat import ChatTemplate, chat_template
from lcx.models.decoder import Decoder
from lcx.models.light import light
from lcx.parallel.mesh import MeshSpec
from lcx.plan import listed, model_figures
from lcx.spec import SpecError
from lcx.support import check_devices, validate, validate_serving
from lcx.training.checkpoint import load_model
from lcx.training.experiment import Experiment
from lcx.training.run_folder import read_trained
from lcx.training.shipped import run_folder

DEFAULT = 256  # new tokens


def define(values: flags.FlagValues) -> None:
    define_mesh(values)
    flags.DEFINE_string("prompt", None, "text to continue; default: standard input", flag_values=values)
    flags.DEFINE_bool("chat", False, "answer messages by the chat template, a line each", flag_values=values)
    flags.DEFINE_string("system", None, "the first message of a chat, of the system", flag_values=values)
    most = "most tokens to generate, of each answer; default: 256, or what the window has room for"
    flags.DEFINE_integer("max_new", None, most, lower_bound=1, flag_values=values)
    flags.DEFINE_integer("window", None, "most tokens of all; default: as trained", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("top_k", None, "sample among the k likeliest", flag_values=values)
    flags.DEFINE_float("top_p", None, "sample among the fewest whose mass reaches p", flag_values=values)
    flags.DEFINE_float("min_p", None, "sample among those at least p times as likely as the likeliest", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "end the answer before this text; may be given again", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the samples", lower_bound=0, upper_bound=2**32 - 1, flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint of this step; default: the newest", flag_values=values)


def main(arguments: Arguments) -> None:
    asked = arguments.flags
    experiment = arguments.spec(Experiment, read=read_trained)
    validate(experiment)
    sampling = Sampling(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, min_p=asked.min_p)
    window = experiment.data.length if asked.window is None else asked.window
    if "" in asked.stop:
        raise SpecError("--stop is empty: expected some text")
    if asked.system is not None and not asked.chat:
        raise SpecError("--system: expected --chat beside it")
    if asked.chat and asked.prompt is not None:
        raise SpecError("--prompt: expected none beside --chat, which reads messages from standard input")
    model_spec, mesh = on_mesh(asked, experiment.model, window)
    if arguments.dry_run:
        print(f"{render(experiment.model, 'model')}\n{render(sampling, 'sampling')}\n")
        print(listed(model_figures(experiment.model, (window,))))
        return
    tokenizer = experiment.data.tokenizer
    template = template_of(tokenizer) if asked.chat else None
    prompt = "" if asked.chat else sys.stdin.read() if asked.prompt is None else asked.prompt
    if not asked.chat and not prompt:
        raise SpecError("--prompt is empty: expected some text to continue")
    ids = tokenizer.prompt(prompt).tolist()
    new = lambda ids: _room(ids, asked.max_new, window)
    options = {"sampling": sampling, "seed": asked.seed, "stop": tokenizer.stops}
    if not asked.chat:
        new(ids)
    model = light(load_model(run_folder(arguments.run_dir), model_spec, step=asked.step, mesh=mesh))
    answer = lambda ids: text_of(stream(model, ids, max_new=new(ids), mesh=mesh, **options), tokenizer, asked.stop)
    if template is not None:
        _chat(answer, template, tokenizer, asked.system)
        return
    pieces = answer(ids)
    first = next(pieces, "")  # before the prompt is shown, so that what is logged on the way stands above the text
    print(prompt, end=first, flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def define_mesh(values: flags.FlagValues) -> None:
    """Flags of the devices that share a model's answers out."""
    shared = {"data": "rows", "fsdp": "rows and parameters", "tensor": "heads and hidden channels", "context": "cached keys"}
    for axis, what in shared.items():
        flags.DEFINE_integer(axis, 1, f"devices that share out {what}", lower_bound=1, flag_values=values)


def on_mesh(asked: flags.FlagValues, model: Decoder, window: int, rows: int = 1) -> tuple[Decoder, Mesh | None]:
    """The model as it lies on the mesh that the flags ask for, None for one device. Raises SpecError where it does not."""
    spec = MeshSpec(data=asked.data, fsdp=asked.fsdp, context=asked.context, tensor=asked.tensor)
    if spec.size == 1:
        return model, None
    model = answering(model)
    rows = 1 << (max(rows, spec.data * spec.fsdp) - 1).bit_length()
    serving = Serving(model=model, rows=rows, prompt=window, answer=1, mesh=spec)
    validate_serving(serving)
    check_devices(serving, jax.device_count())
    return model, spec.build()


def template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """That of the folder that the tokenizer is from. Raises SpecError if there is none."""
    if not isinstance(tokenizer, HFTokenizer):
        raise SpecError(f"data.tokenizer = {type(tokenizer).__name__}: expected that of a folder with a chat template")
    return chat_template(Path(tokenizer.path).parent)


def _chat(answer, template: ChatTemplate, tokenizer: Tokenizer, system: str | None) -> None:
    """Answers each line of standard input, which sees all messages before it."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in _lines():
        messages.append({"role": "user", "content": line})
        ids = tokenizer.encode(template.render(messages)).tolist()
        said = ""
        for piece in answer(ids):
            said += piece
            print(piece, end="", flush=True)
        print(flush=True)
        messages.append({"role": "assistant", "content": said})


def _lines() -> Iterator[str]:
    """Messages; a person is asked for each."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _room(ids: list[int], asked: int | None, window: int) -> int:
    """Tokens that may follow. Raises WindowOverflow."""
    new = max(1, min(DEFAULT, window - len(ids))) if asked is None else asked
    if len(ids) + new > window:
        raise WindowOverflow(len(ids), new, window)
    return new


if __name__ == "__main__":
    launch(main)
