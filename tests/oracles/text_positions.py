"""Writes golden training positions of authors' code with given draws: PoSE, its baseline of random positions, Giraffe, LOGO.

    python tests/oracles/text_positions.py CHECKOUTS    # needs the `oracles` extra; writes golden/text_positions.npz

    PoSE            dwzhu-pku/PoSE a3d4ba8bd38e6615ba778d9a1061e380c8e69647, src/train_pose.py
    Long-Context    abacusai/Long-Context c2a90d1fd0e905d6e8ef8c7e6f5a9441c78616b1, python/models/interpolate.py (Giraffe)
    LCM_Stack       ZetangForward/LCM_Stack 7e4460485a0e63cc7b801649c659bb6415207ea6, data/positional_indices_synthesis.ipynb
    LongEmbed       dwzhu-pku/LongEmbed 033dc4a18e2da7b87d0e388c5b975cabe19c2fdc, src/encoder_model.py

Draws are shares in [0, 1) that stand for the random numbers of a call: an integer of low .. high is low + floor(share * count).

    pose/LENGTH [N,T]       positions of documents of that many tokens below `TARGET`; pose/shares [N,2] which skip begins where
                            (a third draw, of the text that PoSE skips as well, changes no position)
    random [N,T], random/drawn [N,T]      sorted and as drawn
    steps [N,T], steps/shares [N,T]       Giraffe's
    slots [N,4,T]           LOGO's `CHUNKS` chunks of `CHUNK` tokens below `SLOTS`, the last `TAIL` of which are kept for
                            question and answer, as it combines them; the separators that it adds at the end of every slot,
                            where a chunk may end too, are in slots/separators
    tables/MODE/T [T]       rows of a table of `ROWS` that LongEmbed reads for a document of T tokens

LOGO's code runs only where its slots leave some positions over.
Written with torch 2.13.0.
"""

import math
import random
import sys
import types
from pathlib import Path

import numpy as np
from authors import definitions

TARGET, LENGTHS = 96, (1, 2, 7, 16)
SLOTS, TAIL, CHUNKS, CHUNK = 1003, 5, 4, 60
ROWS, FACTOR, DOCUMENTS = 16, 4, (5, 16, 17, 40, 64)


def pose(checkouts: Path, torch) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shares = rng.uniform(size=(40, 2))
    file, found = checkouts / "PoSE/src/train_pose.py", {"pose/shares": shares}
    for length in LENGTHS:
        positions = []
        for first, skip in shares:
            draws = iter((first, 0.3, skip))
            randint = lambda low, high, draws=draws: low + math.floor(next(draws) * (high - low + 1))
            given = {"torch": torch, "random": types.SimpleNamespace(randint=randint)}
            tokens = types.SimpleNamespace(call=lambda texts, length=length, **options: {"input_ids": [[0] * (2 * length)]})
            process = definitions(file, "train_preprocess_function_pose", **given).train_preprocess_function_pose
            positions.append(process({"text": [""]}, tokens.call, TARGET, length)["position_ids"][0].numpy())
        found[f"pose/{length}"] = np.int32(positions)
    drawn = np.stack([rng.permutation(TARGET)[:16] for _ in range(10)]).astype(np.int32)
    given = {"torch": torch, "random": types.SimpleNamespace(sample=lambda of, count: rows.pop(0))}
    rows, tokenizer = drawn.tolist(), lambda texts, **options: {"input_ids": [[0] * 16 for _ in texts]}
    process = definitions(file, "train_preprocess_function_randomized", **given).train_preprocess_function_randomized
    positions = process({"text": [""] * len(drawn)}, tokenizer, TARGET, 16)["position_ids"]
    return found | {"random": torch.stack(positions).int().numpy(), "random/drawn": drawn}


def steps(checkouts: Path, torch) -> dict[str, np.ndarray]:
    """Caught where they are multiplied by frequencies. Half the rows are drawn to reach too far, and are shrunk."""
    shares = np.random.default_rng(1).uniform(size=(8, 20)) ** np.repeat([1.5, 0.7], 4)[:, None]
    caught = []
    rand = lambda size, dtype, device: torch.from_numpy(shares)
    einsum = lambda text, *x: caught.append(x[0].numpy()) or torch.einsum(text, *x)
    given = types.SimpleNamespace(**vars(torch) | {"rand": rand, "einsum": einsum})
    names = ("truncate_frequency", "ScaledLlamaRotaryEmbedding")
    code = definitions(checkouts / "Long-Context/python/models/interpolate.py", *names, torch=given, PI=math.pi)
    code.ScaledLlamaRotaryEmbedding(4, randomize=True).double().train()(torch.zeros(8, 1, 20, 4))
    return {"steps": caught[-1], "steps/shares": shares}


def slots(checkouts: Path, torch) -> dict[str, np.ndarray]:
    import itertools

    names = ("create_covering_position_ids", "auto_padding", "combine_fn", "create_chunked_reference")
    given = {"torch": torch, "random": random, "itertools": itertools}
    code = definitions(checkouts / "LCM_Stack/data/positional_indices_synthesis.ipynb", *names, **given)
    tokenizer = lambda text, **options: types.SimpleNamespace(input_ids=torch.zeros(1, CHUNK, dtype=torch.int64))
    random.seed(0)
    found, *_ = code.create_chunked_reference(tokenizer, [""] * CHUNKS, CHUNKS * (CHUNK + 1), SLOTS, 0, TAIL)
    found = torch.stack(found).reshape(len(found), CHUNKS, CHUNK + 1).int().numpy()
    return {"slots": found[..., :-1], "slots/separators": found[0, :, -1]}


def tables(checkouts: Path, torch) -> dict[str, np.ndarray]:
    """Rows of a table that documents of `DOCUMENTS` tokens read, by mode; an interpolated one is FACTOR times as long."""
    given = {"torch": torch, "Tensor": torch.Tensor, "math": math}
    ids = definitions(checkouts / "LongEmbed/src/encoder_model.py", "get_position_ids", **given).get_position_ids
    found = {}
    for mode in ("recurrent", "group", "interpolate"):
        for tokens in DOCUMENTS:
            options = {"mode": mode, "max_original_positions": ROWS, "encode_max_length": ROWS * FACTOR}
            found[f"tables/{mode}/{tokens}"] = ids(torch.zeros(1, tokens), **options)[0].int().numpy()
    return found


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    return pose(checkouts, torch) | steps(checkouts, torch) | slots(checkouts, torch) | tables(checkouts, torch)


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "text_positions.npz", **arrays(Path(sys.argv[1])))
