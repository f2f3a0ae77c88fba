"""Writes golden positions of texts with images and videos, and FAR's masks, as authors' code and transformers give them.

    python tests/oracles/vision_positions.py CHECKOUTS    # needs the `oracles` extra; writes golden/vision_positions.npz

    transformers 5.24   models/qwen2_vl, models/qwen2_5_vl: get_rope_index
    HoPE    hrlics/HoPE 85b76c03abcf9624b6efd27d1af1bc11ce9899c4, modeling_hope.py
    V2PE    OpenGVLab/V2PE f96f18990e88f511ca0502b92fc30d8708ba3ada, internvl/model/internvl_chat/modeling_internvl_chat.py
    FAR     showlab/FAR e59536ac30e5e3fa93db756fccfd422420a65ff6, far/models/far_model.py, far_long_model.py

Rows of `ROWS` with axes (time, row, column), n of N the row:

    n/kinds [T]             0 text, 1 image, 2 video
    n/grids [B,3]           time, rows and columns of each block of images or videos, in tokens
    n/RULE [3,T]            positions; n/RULE/next the position of the token that is generated after them
      qwen2                 transformers: text goes on max(rows, columns) after a block's beginning
      qwen2_max             authors' code (of transformers 4): text goes on after the largest position on any axis
      qwen2_5               transformers: `SECONDS` between the frames of a video, 2 positions a second, rounded down
      video_rope            a frame steps by 2, rows and columns around it; text goes on after the last frame (HoPE's copy)
      hope_0.75, hope_1.5   the same with the steps of HoPE
      vanilla, time         all tokens in order on all axes; all tokens of a frame at one position

    v2pe/kinds [T]          0 text, 1 image, of 256 tokens a tile, `TILES` a block
    v2pe/STRIDE [T]         positions, image tokens stepping by STRIDE / 256; v2pe/mixed has `MIXED` strides, one a block

    far/ids [T,3]           frame, row, column of 4 frames of 2 x 3 tokens
    far/mask [T,T]          what is added to logits: -inf for later frames, -0.05 for a frame of distance
    far/long/ids, far/long/mask    2 context frames of 1 x 2 tokens (ids not taken from the code), then 3 frames of 2 x 3
"""

import random
import sys
import types
from itertools import cycle
from pathlib import Path

import numpy as np
from authors import definitions

TEXT, START, END, IMAGE, VIDEO = 5, 1, 2, 3, 4  # tokens; a block stands between START and END
ROWS = (  # of a row its texts' lengths, and blocks between them: kind, time, rows, columns
    (2, (IMAGE, 1, 2, 3), 1),
    (3, (VIDEO, 6, 2, 2), 4),
    (1, (VIDEO, 4, 3, 5), 2, (IMAGE, 1, 4, 2), 0, (VIDEO, 3, 1, 1), 5),
    (0, (IMAGE, 1, 1, 1), 0, (IMAGE, 1, 5, 4), 3),
)
MERGE, SECONDS = 2, 1.25
TILES, MIXED = (1, 2), (64, 8)
SLOPE = 0.05


def row(torch, spans) -> dict:
    """Tokens [1,T], their kinds, and grids in patches, before MERGE x MERGE of them are a token."""
    tokens, grids = [], []
    for span in spans:
        if isinstance(span, int):
            tokens += [TEXT] * span
        else:
            kind, *grid = span
            tokens += [START, *[kind] * int(np.prod(grid)), END]
            grids.append((kind, grid))
    of = lambda kind: [[t, h * MERGE, w * MERGE] for k, (t, h, w) in grids if k == kind]
    named = {name: torch.tensor(of(kind)) if of(kind) else None for name, kind in (("image", IMAGE), ("video", VIDEO))}
    tokens = torch.tensor([tokens])
    kinds = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    every = np.int32([grid for _, grid in grids])
    return {"tokens": tokens, "kinds": kinds, "grids": every, "given": {f"{name}_grid_thw": x for name, x in named.items()}}


def rope_index(checkouts: Path, torch) -> dict[str, np.ndarray]:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    vision = types.SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=2)
    config = types.SimpleNamespace(
        vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START
    )
    layer = types.SimpleNamespace(config=config)
    layer.get_vision_position_ids = types.MethodType(Qwen2VLModel.get_vision_position_ids, layer)
    names = ("rope_index", "t_scale_rope_index", "dynamic_rope_index", "vanilla_rope_index", "time_rope_index")
    methods = [f"Qwen2VLForConditionalGeneration.get_{name}" for name in names]
    code = definitions(checkouts / "HoPE/modeling_hope.py", *methods, torch=torch, random=random)
    found = {}
    for n, spans in enumerate(ROWS):
        made = row(torch, spans)
        tokens, kinds, grids = made["tokens"], made["kinds"], made["given"]
        seconds = [SECONDS] * int((made["grids"][:, 0] > 1).sum())
        masked = {"attention_mask": torch.ones_like(tokens), **grids}
        by_rule = {
            "qwen2": Qwen2VLModel.get_rope_index(layer, tokens, kinds, **grids),
            "qwen2_5": Qwen2_5_VLModel.get_rope_index(layer, tokens, kinds, second_per_grid_ts=seconds, **grids),
            "qwen2_max": code.get_rope_index(layer, tokens, **masked),
            "video_rope": code.get_t_scale_rope_index(layer, tokens, scale_factor=2.0, **masked),
            "vanilla": code.get_vanilla_rope_index(layer, tokens, **masked),
            "time": code.get_time_rope_index(layer, tokens, **masked),
        }
        for step in (0.75, 1.5):
            by_rule[f"hope_{step}"] = code.get_dynamic_rope_index(layer, tokens, scale_factors=[step], **masked)
        found |= {f"{n}/kinds": kinds[0].numpy(), f"{n}/grids": made["grids"]}
        for name, (positions, delta) in by_rule.items():
            found[f"{n}/{name}"] = positions[:, 0].float().numpy()
            found[f"{n}/{name}/next"] = np.float32(delta.item() + tokens.shape[1])
    return found


def v2pe(checkouts: Path, torch) -> dict[str, np.ndarray]:
    tokens = [TEXT] * 3
    for tiles in TILES:
        tokens += [START, *[IMAGE] * (256 * tiles), END, TEXT, TEXT]
    strides = cycle(MIXED)
    given = {"torch": torch, "random": types.SimpleNamespace(choice=lambda of: next(strides))}
    file = checkouts / "V2PE/internvl/model/internvl_chat/modeling_internvl_chat.py"
    code = definitions(file, "get_rope_pos_id", **given).get_rope_pos_id
    tokenizer = types.SimpleNamespace(convert_tokens_to_ids={"<img>": START, "</img>": END}.get)
    tokens = torch.tensor([tokens])
    made = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    found = {"v2pe/kinds": (tokens[0] == IMAGE).int().numpy()}
    for stride in (1, 16, 64, 256, "mixed"):
        options = {"rope_pos_id_version": "v2pe_fix", "rope_pos_id_stride": stride}
        options = {"rope_pos_id_version": "v2pe_rnd"} if stride == "mixed" else options
        positions = code(made, TILES, torch.float32, tokenizer=tokenizer, **options)
        found[f"v2pe/{stride}"] = np.float32(positions)
    return found


def far(checkouts: Path, torch) -> dict[str, np.ndarray]:
    model = types.SimpleNamespace(config=types.SimpleNamespace(slope_scale=SLOPE, patch_size=1))
    folder, methods = checkouts / "FAR/far/models", ("_build_causal_mask", "_prepare_latent_sequence_ids")
    short = definitions(folder / "far_model.py", *(f"FAR.{name}" for name in methods), torch=torch)
    long = definitions(folder / "far_long_model.py", *(f"FAR_Long.{name}" for name in methods), torch=torch)
    given = {"device": "cpu", "dtype": torch.float32}
    size = {"height": 2, "width": 3, "patch_size": 1}
    return {
        "far/ids": short._prepare_latent_sequence_ids(model, 1, 4, **size, **given).numpy(),
        "far/mask": short._build_causal_mask(model, (1, 4, 24), **given)[0].numpy(),
        "far/long/ids": long._prepare_latent_sequence_ids(model, 1, 3, 2, **size, **given).numpy(),
        "far/long/mask": long._build_causal_mask(model, (3, 6), (2, 2), **given)[0].numpy(),
    }


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    return rope_index(checkouts, torch) | v2pe(checkouts, torch) | far(checkouts, torch)


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "vision_positions.npz", **arrays(Path(sys.argv[1])))
