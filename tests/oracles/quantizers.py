"""Writes what KIVI's and KVQuant's authors' quantizers make of random tokens.

    python tests/oracles/quantizers.py CHECKOUTS    # writes tests/oracles/golden/quantizers.npz

    KIVI       jy-yuan/KIVI 876b4d2d08e3b1d5f70d0969c299d8c7c42ddfb6, quant/new_pack.py
    KVQuant    SqueezeAILab/KVQuant 57a238357f0ffe50084670fcd5781c9848f80ea2, quant/kvquant/simquant_module_quantizer.py

`quant_and_pack_kcache`, `quant_and_pack_vcache` and what unpacks them, `get_outliers`, `get_outliers_dynamic` and
`quant_fn_nuq_recon` run as they are in float32 on a CPU, but that what unpacks rounds to float16.

    x [1,2,64,32]                     two heads, 64 tokens; channel 5 is offset by 40, channel 9 twenty times as wide
    kivi/keys, kivi/values            2 bits, groups of 32 tokens of a channel, of 16 channels of a token: what codes stand for
    kvquant/upper, lower [64]         percentiles 99 and 1 of the first head's channels (2 % outliers), and of the second's
    kvquant/codebook [8]              ascending
    kvquant/keys [64,64]              3 bits, of both heads' channels side by side, with outliers, without cap
    kvquant/values [64,32]            of the first head alone: ranges of a token without its 2 % outliers
    kvquant/normed [64,64]            keys with Q-Norm, scale 1.1, shift 0.02
    kvquant/plain [64,64]             keys without outliers
"""

import sys
from pathlib import Path

import numpy as np
from authors import definitions


def main(checkouts: Path) -> None:
    import torch

    rng = np.random.default_rng(3)
    x = rng.normal(size=(1, 2, 64, 32)).astype(np.float32)
    x[..., 5] += 40
    x[..., 9] *= 20
    made, given = {"x": x}, torch.from_numpy(x)
    names = ("quant_and_pack_kcache", "quant_and_pack_vcache", "unpack_and_dequant_kcache", "unpack_and_dequant_vcache")
    packing = ("pack_tensor", "unpack_tensor")
    kivi = definitions(checkouts / "KIVI" / "quant" / "new_pack.py", *packing, *names, torch=torch)
    made["kivi/keys"] = kivi.unpack_and_dequant_kcache(*kivi.quant_and_pack_kcache(given, 32, 2), 32, 2).float().numpy()
    made["kivi/values"] = kivi.unpack_and_dequant_vcache(*kivi.quant_and_pack_vcache(given, 16, 2), 16, 2).float().numpy()

    file = checkouts / "KVQuant" / "quant" / "kvquant" / "simquant_module_quantizer.py"
    functions = ("round_to_nearest_pole_sim", "get_outliers", "get_outliers_dynamic", "quant_fn_nuq_recon")
    kvquant = definitions(file, *functions, torch=torch, np=np)
    keys = given[0].permute(1, 0, 2).reshape(64, 64)
    codebook = np.asarray([-0.95, -0.6, -0.35, -0.1, 0.12, 0.4, 0.62, 0.9], np.float32)
    ends = np.percentile(keys.numpy(), [99, 1], axis=0).astype(np.float32)
    made |= {"kvquant/upper": ends[0], "kvquant/lower": ends[1], "kvquant/codebook": codebook}
    upper, lower = map(torch.from_numpy, ends)
    mask = kvquant.get_outliers(keys, channel=0, outlier_threshold_upper=upper, outlier_threshold_lower=lower)
    static = {"bits": 3, "qchannel": 0, "maxval": upper, "minval": lower, "lut": [codebook[:, None]]}
    recon = kvquant.quant_fn_nuq_recon
    made["kvquant/keys"] = recon(keys.clone(), include_sparse=True, outlier_mask=mask, **static).numpy()
    norm = {"norm": True, "normscale": torch.tensor(1.1), "normoffset": torch.tensor(0.02)}
    made["kvquant/normed"] = recon(keys.clone(), include_sparse=True, outlier_mask=mask, **static, **norm).numpy()
    made["kvquant/plain"] = recon(keys.clone(), **static).numpy()
    values = given[0, 0]
    found = kvquant.get_outliers_dynamic(values, channel=-1, thresh=0.98)
    online = {"bits": 3, "qchannel": -1, "dynamicquantization": True, "include_sparse": True, "lut": [codebook[:, None]]}
    made["kvquant/values"] = recon(values.clone(), outlier_mask=found, **online).numpy()
    np.savez_compressed(Path(__file__).parent / "golden" / "quantizers.npz", **made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
