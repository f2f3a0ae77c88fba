"""Checkpoint folders of `transformers` as trained models: wherever a run folder is read, such a folder can be named."""

from pathlib import Path
from typing import Any

from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.sources import StandardLibrary
from lcx.data.tokenizers import HFTokenizer
from lcx.interop.entries import check
from lcx.interop.folder import CONFIG, Folder
from lcx.interop.hf import read_decoder
from lcx.spec import SpecError
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Constant


def pretrained(path: Path) -> Experiment:
    """The experiment that would train a folder's model further, on rows of plain text as long as its window.

    Its `data.length` is the window and `data.tokenizer` the folder's. Raises SpecError for a folder that is not whole or known.
    """
    folder = Folder(path)
    spec, window = read_decoder(folder)
    tokenizer = tokenizer_of(folder)
    if spec.vocab < tokenizer.size:
        expected = f"expected at least the {tokenizer.size} ids of its tokenizer.json"
        raise SpecError(f"{path / CONFIG}: vocab_size = {spec.vocab}: {expected}")
    rows = PackedText(source=StandardLibrary(split="train"))
    data = Pipeline(mixture=(Weighted(rows=rows),), length=window, batch_size=1, tokenizer=tokenizer)
    optimizer = AdamW(learning_rate=Constant(peak=1e-5))
    return Experiment(model=spec, data=data, optimizer=optimizer, steps=1, init_from=str(path))


def tokenizer_of(folder: Folder) -> HFTokenizer:
    """A folder's tokenizer. An answer ends at any token that its configs name. Raises SpecError if there is none."""
    file = folder.path / "tokenizer.json"
    if not file.is_file():
        raise SpecError(f"{file}: there is no such file; transformers writes it with AutoTokenizer's save_pretrained")
    said = folder.json("tokenizer_config.json")
    words = _words(file)
    ids = [i for name in ("generation_config.json", CONFIG) for i in _ids(folder, name, words)]
    named = [_word(said.get("eos_token")), *(words[i] for i in ids)]
    ends = list(dict.fromkeys(token for token in named if token is not None))
    if not ends:
        raise SpecError(f"{folder.path}: no eos_token in tokenizer_config.json, no eos_token_id in config.json: expected one")
    return HFTokenizer(path=str(file), eos_token=ends[0], pad_token=_word(said.get("pad_token")), stop_tokens=tuple(ends[1:]))


def _ids(folder: Folder, name: str, words: dict[int, str]) -> list[int]:
    """The ids that a file of the folder ends answers at. Raises SpecError for one that is no token."""
    found = folder.json(name).get("eos_token_id")
    check("eos_token_id", found, f"{folder.path / name}:")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    for i in ids:
        if i not in words:
            raise SpecError(
                f"{folder.path / name}: eos_token_id = {found}: {i} is no id of tokenizer.json: expected ids of its tokens"
            )
    return ids


def _word(token: Any) -> str | None:
    """A token as older files have it, an object, or newer ones."""
    return token.get("content") if isinstance(token, dict) else token


def _words(file: Path) -> dict[int, str]:
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing narrower
        raise SpecError(f"{file}: cannot be read: {error}") from None
    return {n: token for token, n in vocabulary.items()}
