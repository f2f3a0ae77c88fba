"""A small Llama of subword tokens, for what a byte model cannot show: a folder of `transformers` with a tokenizer of its own.

python -m configs.models.bpe models/bpe                                  # trains tokenizer.json: 1,024 tokens, seconds
python -m experiments.train --config=config:models.bpe.train --run_dir=runs/bpe
python -m experiments.convert --run_dir=runs/bpe --to=models/llama-bpe --format=hf
"""

import sys
from pathlib import Path

from configs.models.llama import llama
from lcx.data.packing import PackedText
from lcx.data.pipeline import Pipeline, Weighted
from lcx.data.recall import Needles, Records
from lcx.data.rows import Joined
from lcx.data.sources import StandardLibrary
from lcx.data.tokenizers import HFTokenizer
from lcx.spec import edits
from lcx.training.checkpoint import Checkpointing
from lcx.training.experiment import Experiment
from lcx.training.optimizer import AdamW
from lcx.training.schedules import Cosine

VOCAB, END = 1024, "<|end|>"
TOY = (("compute", "float32"), ("remat", "none"), ("unroll", "all"))


def train(tokenizer: str = "models/bpe/tokenizer.json", steps: int = 900) -> Experiment:
    """1.05 M parameters, rows of 1,024 tokens: source code, needles and records, most of the recall in short documents."""
    return Experiment(
        model=edits(llama(width=128, layers=4, heads=4, kv_heads=2, hidden=384, vocab=VOCAB, base=10_000.0), TOY),
        data=Pipeline(
            mixture=(
                Weighted(rows=PackedText(source=StandardLibrary(split="train")), weight=2.0),
                Weighted(rows=Joined(rows_of=Needles(needles=2, queries=2, answer_weight=10.0), parts=8), weight=2.0),
                Weighted(rows=Joined(rows_of=Records(answer_weight=10.0), parts=8)),
                Weighted(rows=Needles(needles=8, queries=8, answer_weight=10.0)),
                Weighted(rows=Needles(answer_weight=10.0)),
            ),
            length=1024,
            batch_size=4,
            tokenizer=HFTokenizer(path=tokenizer, eos_token=END),
        ),
        optimizer=AdamW(learning_rate=Cosine(peak=3e-3, warmup=60)),
        steps=steps,
        checkpoint=Checkpointing(every=100),
        log_every=20,
    )


def _tokenizer(folder: Path) -> None:
    """Byte-level BPE, each digit a token, of the standard library's source code."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    documents = StandardLibrary(split="train").documents()
    made = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator((documents[i] for i in range(len(documents))), trainer)
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))


if __name__ == "__main__":
    _tokenizer(Path(sys.argv[1]))
