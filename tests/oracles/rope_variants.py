"""Writes golden frequencies, rotations and scales of authors' rope variants.

    python tests/oracles/rope_variants.py CHECKOUTS    # needs the `oracles` extra; writes golden/rope_variants.npz; 30 seconds

    Long-Context   abacusai/Long-Context c2a90d1fd0e905d6e8ef8c7e6f5a9441c78616b1, python/models/{interpolate,xpos}.py (Giraffe)
    DPRoPE         1180301012/DPRoPE b9db7b5000d1827f3f261588116956b3a4f25365, DPRoPE/DPRope.py
    GIRAFFE        kiaia/GIRAFFE 0d30a229328256865610378bcdf9aadaa35caa93, models/mrope_plus_mokey_patch.py (M-RoPE++)
    HoPE           hrlics/HoPE 85b76c03abcf9624b6efd27d1af1bc11ce9899c4, modeling_hope.py (and VideoRoPE's channels, Qwen2-VL's)
    Entropy-ABF    GAIR-NLP/Entropy-ABF a5e91077f90cb2da678371354ef1dd9dc88a3489, patch/EABF.py
    LongLLaDA      OpenMOSS/LongLLaDA cb4278fc2920d2b1cdf668f7cee59e89434f2d5f, eval/*.py
    yarn           jquesnelle/yarn 995db5b575e75230b3384d658f8b944c9662f775, scaled_rope/Llama{NTK,DynamicYaRN}Scaled*.py
    PoSE           dwzhu-pku/PoSE a3d4ba8bd38e6615ba778d9a1061e380c8e69647, src/my_modeling_llama.py (YaRN of wavelengths)

Qwen3-VL's channels are transformers', FLUX's, which are FAR's, diffusers'. Codes are told float64, except Giraffe's and
M-RoPE++'s, which are as released. DPRoPE's code counts angles in Python and takes the divergence of the old
histogram from the new one, of the candidates the least, without a threshold; a count begins at the least float16.
Written with transformers 5.24, diffusers 0.42.1 (installed without what it needs) and torch 2.13.0.
"""

import importlib.util
import logging
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
from authors import definitions, in_float64, told_float64

GIRAFFE = [  # head_dim, scale, power, truncation
    *((dim, 1.0, power, 0) for dim in (16, 128) for power in (0.1, 0.5, 1.0)),
    *((dim, 1.0, 0.0, length) for dim in (16, 128) for length in (256, 2048, 4096)),
    *((dim, 4.0, 0.0, 0) for dim in (16, 128)),
]
DPROPE = [(16, 256, 4), (32, 128, 2), (64, 512, 2), (64, 512, 4), (128, 1024, 4)]  # head_dim, window, factor
MROPE_PLUS_PLUS = [(128, 16_384, 65_536, (16, 24, 24)), (32, 256, 1024, (4, 6, 6))]  # head_dim, window, target, sections
XPOS_LENGTH = 40
DIM, SECTIONS, INTERLEAVED = 32, (4, 6, 6), (6, 5, 5)
YARN = [(16, 256), (128, 4096)]  # head_dim, window; each of its rules at FACTORS, dynamic YaRN at as many windows of tokens
FACTORS = (1.0, 1.5, 4.0, 32.0)
PLACES = (0, 1, 100, 4094, 4095, 4096, 8191, 16_383, 65_535, 1_000_000)


def giraffe(checkouts: Path, torch) -> dict[str, np.ndarray]:
    given = {"torch": torch, "PI": np.pi}
    names = ("truncate_frequency", "ScaledLlamaRotaryEmbedding")
    made = definitions(checkouts / "Long-Context/python/models/interpolate.py", *names, **given).ScaledLlamaRotaryEmbedding
    found = [made(dim, scale=scale, scale_power=power, truncate=length) for dim, scale, power, length in GIRAFFE]
    return {f"giraffe/{n}": module.freq_2pi.numpy() for n, module in enumerate(found)}


def dprope(checkouts: Path, torch) -> dict[str, np.ndarray]:
    """factors: by how much the code slows each pair. scores: of each pair kept and slowed, a sum over bins, not their mean."""
    given = {"torch": torch, "F": torch.nn.functional, "logger": logging.getLogger("dprope")}
    given["logger"].setLevel(logging.ERROR)
    made = definitions(checkouts / "DPRoPE/DPRoPE/DPRope.py", "DPRopeClass", **given).DPRopeClass
    found = {}
    for n, (dim, window, factor) in enumerate(DPROPE):
        rule = made(head_dim=dim, origin_max_position=window, scaling_factor=factor)
        scores, score = [], rule._compute_distribution_similarity
        rule._compute_distribution_similarity = lambda *of, score=score, to=scores: to.append(score(*of)) or to[-1]
        with told_float64(torch):
            _, factors = rule.get_dprope_inv_freq()
        found |= {f"dprope/{n}/factors": factors.numpy(), f"dprope/{n}/scores": 360 * torch.stack(scores).numpy()}
    return found


def mrope_plus_plus(checkouts: Path, torch) -> dict[str, np.ndarray]:
    file = checkouts / "GIRAFFE/models/mrope_plus_mokey_patch.py"
    made = definitions(file, "Qwen2RotaryEmbeddingMRoPEPP", torch=torch, nn=torch.nn).Qwen2RotaryEmbeddingMRoPEPP
    rules = (
        made(dim, window, max_target_position=target, mrope_section=[*sections])
        for dim, window, target, sections in MROPE_PLUS_PLUS
    )
    return {f"mrope_plus_plus/{n}": rule.inv_freq.numpy() for n, rule in enumerate(rules)}


def sections(checkouts: Path, torch) -> dict[str, np.ndarray]:
    """x [1,T,2,D] turned at positions [1,T,3] by the channels of four models, in float64."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 2, DIM)).astype(np.float32)
    positions = np.float32([[[0, 0, 0], [3, 3, 3], [7.5, 6.5, 8.5], [2, -1, 3], [1000, 1007, 995]]])
    theta = 1e4 ** -(np.arange(0, DIM, 2) / DIM)
    angle = torch.from_numpy(positions.astype(float).transpose(2, 0, 1)[..., None] * theta)
    cosine, sine = (torch.cat([table, table], dim=-1) for table in (angle.cos(), angle.sin()))
    given = {"torch": torch}
    names = {
        "multimodal": "apply_multimodal_rotary_pos_emb",
        "hybrid": "apply_hybrid_multimodal_rotary_pos_emb",
        "video": "apply_m_modify_multimodal_rotary_pos_emb",
    }
    code = vars(definitions(checkouts / "HoPE/modeling_hope.py", "rotate_half", *names.values(), **given))
    found = {"sections/x": x, "sections/positions": positions}
    given = torch.from_numpy(x).double().transpose(1, 2)
    for name, function in names.items():
        turned, _ = code[function](given, given, cosine, sine, [*SECTIONS])
        found[f"sections/{name}"] = turned.transpose(1, 2).float().numpy()
    config = types.SimpleNamespace(mrope_section=[*INTERLEAVED])
    tables = (Qwen3VLTextRotaryEmbedding.recomposition_frequencies(config, t.clone()) for t in (angle.cos(), angle.sin()))
    cosine, sine = (table[:, None] for table in tables)
    turned = given * cosine + code["rotate_half"](given) * sine
    turned = {"interleaved": turned.float(), "axial": axial(torch, given, torch.from_numpy(positions[0]))}
    return found | {f"sections/{name}": x.transpose(1, 2).numpy() for name, x in turned.items()}


def axial(torch, x, positions):
    """diffusers' FluxPosEmbed with a ladder for each section."""
    folder = Path(importlib.util.find_spec("diffusers").submodule_search_locations[0]) / "models"
    parts = definitions(folder / "embeddings.py", "get_1d_rotary_pos_embed", "apply_rotary_emb", torch=torch, np=np)
    given = {"torch": torch, "nn": torch.nn, "maybe_adjust_dtype_for_device": lambda dtype, device: dtype}
    flux = folder / "transformers/transformer_flux.py"
    embed = definitions(flux, "FluxPosEmbed", get_1d_rotary_pos_embed=parts.get_1d_rotary_pos_embed, **given).FluxPosEmbed
    with told_float64(torch):
        turned = parts.apply_rotary_emb(x, embed(10_000, [2 * pairs for pairs in SECTIONS])(positions))
    return turned.to(torch.float32)


def yarn(checkouts: Path, torch) -> dict[str, np.ndarray]:
    """Of each rule inv_freq, of YaRN's what cosine and sine are multiplied by."""
    given = {"torch": in_float64(torch), "math": math, "np": np}
    names = ("find_correction_dim", "find_correction_range", "linear_ramp_mask", "get_mscale")
    folder, name = checkouts / "yarn/scaled_rope", "LlamaDynamicYaRNScaledRotaryEmbedding"
    dynamic = vars(definitions(folder / f"{name}.py", name, *names, **given))[name]
    name = "LlamaNTKScaledRotaryEmbedding"
    ntk = vars(definitions(folder / f"{name}.py", name, **given))[name]
    name = "LlamaYaRNScaledRotaryEmbedding"
    names = [f"_yarn_{part}" for part in names]
    harmonic = vars(definitions(checkouts / "PoSE/src/my_modeling_llama.py", name, *names, **given))[name]
    found = {}
    with told_float64(torch):
        for n, (dim, window) in enumerate(YARN):
            window_of = {"original_max_position_embeddings": window, "max_position_embeddings": window}
            for factor in FACTORS:
                growing = dynamic(dim, **window_of)
                growing(torch.zeros(1), seq_len=int(factor * window))
                scaled = harmonic(dim, **(window_of | {"max_position_embeddings": 1}), scale=factor)
                made = {"ntk": ntk(dim, max_position_embeddings=1, alpha=factor), "dynamic_yarn": growing, "harmonic": scaled}
                found |= {f"yarn/{n}/{factor}/{name}": module.inv_freq.numpy() for name, module in made.items()}
                found[f"yarn/{n}/{factor}/temperature"] = np.float64([growing.mscale, scaled.mscale])
    return found


def xpos(checkouts: Path, torch) -> dict[str, np.ndarray]:
    """Products of random queries and keys of one head, [T, T], as turned by Giraffe's copy of xPos."""
    given = {"torch": torch, "nn": torch.nn, "math": math}
    names = ("fixed_pos_embedding", "rotate_every_two", "duplicate_interleave", "apply_rotary_pos_emb", "XPOS")
    made = definitions(checkouts / "Long-Context/python/models/xpos.py", *names, **given).XPOS
    q, k = (np.random.default_rng(n).normal(size=(1, 1, XPOS_LENGTH, DIM)).astype(np.float32) for n in range(2))
    turn = made(DIM, XPOS_LENGTH)
    turned = turn(torch.from_numpy(q), 0), turn(torch.from_numpy(k), 0, downscale=True)
    products = turned[0].double() @ turned[1].double().transpose(2, 3)
    return {"xpos/q": q[0, 0], "xpos/k": k[0, 0], "xpos": products[0, 0].float().numpy()}


def entropy_abf(checkouts: Path, torch) -> dict[str, np.ndarray]:
    """The factor on queries at PLACES: queries of one that nothing turns."""
    given = {"torch": torch, "math": math}
    names = ("rotate_half", "apply_rotary_pos_emb_scale")
    scaled = definitions(checkouts / "Entropy-ABF/patch/EABF.py", *names, **given).apply_rotary_pos_emb_scale
    one = torch.ones(1, 1, len(PLACES), 2, dtype=torch.float64)
    table = torch.ones(1, 1, max(PLACES) + 1, 2)
    query, _ = scaled(one, one, table, 0 * table, torch.tensor([PLACES]))
    return {"entropy_abf": query[0, 0, :, 0].numpy()}


def longllada(checkouts: Path) -> dict[str, np.ndarray]:
    """The multipliers of its evaluations, by model."""
    text = "".join(file.read_text() for file in sorted((checkouts / "LongLLaDA/eval").glob("*.py")))
    found = re.findall(r"\('(llada|llama|dream)_[^']*', \{'scaling_factor': (\d+)\}", text)
    return {
        f"longllada/{of}": np.int32(sorted({int(n) for name, n in found if name == of})) for of in ("llada", "llama", "dream")
    }


def arrays(checkouts: Path) -> dict[str, np.ndarray]:
    import torch

    found = longllada(checkouts)
    for part in (giraffe, xpos, dprope, mrope_plus_plus, sections, yarn, entropy_abf):
        found |= part(checkouts, torch)
    return found


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden" / "rope_variants.npz", **arrays(Path(sys.argv[1])))
