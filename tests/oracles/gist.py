"""Writes masks and positions of gist tokens, of their authors' code.

    python tests/oracles/gist.py CHECKOUTS    # needs the `oracles` extra; writes tests/oracles/golden/gist.npz

    gisting    jayelm/gisting 3be0d062b6bdfd3caf51843bbc60261a0855f876, src/data/gist.py and src/gist_llama.py

Of a row, first and last being the places of its first and last gist token; the model's causal mask and padding go on top:

    gist        queries up to last see keys up to last; queries behind it see keys from first on
    negative    queries up to last see keys up to last; queries behind it see keys behind last
    positive    everything; so does, under all three, a row without gist tokens; keys that are padding are never seen
    from, to    (`make_mask_pre_first_gist`, `make_mask_post_last_gist`) 1 from first on, 1 up to last; padding is 0
    span        [first, last + 1), an error if the gists do not stand together

With a cache of the gists alone, keys are those that were rotated at the places where they stood, and a token behind them has
the place it had in the whole row: first + number of gists + i; one offset for all rows of a batch (that of the first).

    tokens [5,10]                   9 a gist token, 0 padding: one gist; three; none; gists at the start; padding in front
    mask/{gist,negative,positive} [5,10,10], mask/{from,to} [5,10], span [4,2] (-1 for none; rows but the last)
    places/{begin,gists,rest}, places/<n>   positions that rotate the tokens behind cached gists, of the cases in order

Written with torch 2.13.0.
"""

import sys
import types
import typing
from pathlib import Path

import numpy as np
from authors import definitions

GIST, PAD = 9, 0
ROWS = [
    [1, 2, 3, 9, 4, 5, 6, 7, 8, 1],
    [1, 2, 9, 9, 9, 3, 4, 5, 6, 7],
    [1, 2, 3, 4, 5, 6, 7, 8, 1, 2],
    [9, 9, 1, 2, 3, 4, 5, 6, 7, 8],
    [0, 0, 1, 2, 9, 9, 3, 4, 5, 6],
]
CACHES = ((3, 1, 4), (2, 3, 5), (0, 2, 3))  # where gists began, their number, tokens behind them


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    src = checkouts / "gisting" / "src"
    names = "reverse_cumsum", "make_mask_pre_first_gist", "make_mask_post_last_gist", "make_gist_mask", "make_neg_control_mask"
    names += "make_pos_control_mask", "get_gist_index", "_assert_continguous_span"
    code = definitions(src / "data" / "gist.py", *names, torch=torch, Optional=typing.Optional, Tuple=tuple)
    tokens = torch.tensor(ROWS)
    kinds = {"gist": code.make_gist_mask, "negative": code.make_neg_control_mask, "positive": code.make_pos_control_mask}
    found = {f"mask/{name}": make(tokens, GIST, pad_token=PAD)[:, 0].bool() for name, make in kinds.items()}
    found["mask/from"] = code.make_mask_pre_first_gist(tokens, GIST, pad_token=PAD).bool()
    found["mask/to"] = code.make_mask_post_last_gist(tokens, GIST, pad_token=PAD).bool()
    spans = [code.get_gist_index(row, GIST) for row in tokens[:4]]
    found |= {"span": torch.tensor([[-1, -1] if one[0] is None else one for one in spans]), "tokens": tokens}
    rotary = definitions(src / "gist_llama.py", "GistLlamaRotaryEmbedding.forward", torch=torch).forward
    table = torch.arange(32.0)[None, None, :, None]  # a table of cosines whose rows are their own numbers
    layer = types.SimpleNamespace(max_seq_len_cached=32, cos_cached=table, sin_cached=table)
    for n, (begin, gists, rest) in enumerate(CACHES):
        rows, _ = rotary(layer, table, seq_len=gists + rest, gist_offset=torch.tensor([begin]))
        found[f"places/{n}"] = rows[0, 0, gists:, 0].long()  # as transformers' rotation skips what the cache holds
    begin, gists, rest = torch.tensor(CACHES).T
    found |= {"places/begin": begin, "places/gists": gists, "places/rest": rest}
    found = {key: value.numpy() for key, value in found.items()}
    return {key: value if value.dtype == bool else value.astype(np.int32) for key, value in found.items()}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "gist.npz", **arrays(Path(sys.argv[1])))
