"""LoRA as an adapter folder of `peft`: adapter_config.json and adapter_model.safetensors, beside the folder of its base."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from lcx.interop.families import family_of
from lcx.interop.families.config import Config
from lcx.interop.families.family import same_model
from lcx.interop.folder import Folder, written_whole
from lcx.models.decoder import DecoderModel
from lcx.spec import SpecError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def write(model: DecoderModel, base: Path, target: Path) -> int:
    """The adapter of a model whose base is the checkpoint folder `base`; the bytes of its tensors.

    Raises SpecError for a model without LoRA, one that is another than its base beside it, in what its config says or in any
    parameter, or an addition to a part of a matrix, which the base has in one with others.
    """
    lora = model.spec.lora
    if lora is None:
        raise SpecError("model.lora = None: expected a model with LoRA, of which an adapter is made")
    folder = Folder(base)
    config = Config(folder.config)
    family = family_of(config)
    if (differing := same_model(family.decoder(config), dataclasses.replace(model.spec, lora=None))) is not None:
        raise SpecError(f"model: differs from its base {base} in {differing}: expected LoRA alone, or --format=hf")
    held = {tuple(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    arrays: dict[str, np.ndarray] = {}
    modules: set[str] = set()
    for tensor in family.tensors(family.decoder(config)):
        for part, piece in tensor.taken(folder.read(tensor.name)):
            own = held[tuple(map(str, part.path))]
            own = np.asarray(own if part.period is None else own[part.period])
            if not np.array_equal(own, piece.astype(own.dtype), equal_nan=True):
                raise SpecError(f"model: {tensor.name} is not that of its base {base}: expected LoRA alone, or --format=hf")
            *at, name = map(str, part.path)
            down, up = (held.get((*at, "lora", name, end)) for end in ("down", "up"))
            if down is None or up is None or tensor.name.endswith(".bias"):
                continue
            if len(tensor.parts) > 1:
                raise SpecError(f"model.lora: {name} is a part of {tensor.name} in {base}: expected projections of their own")
            module = tensor.name.removesuffix(".weight")
            place = f"base_model.model.{module}"
            thin = np.asarray(down[part.period], np.float32)
            arrays[f"{place}.lora_A.weight"] = np.ascontiguousarray(thin.reshape(-1, lora.rank).T)
            wide = np.asarray(up[part.period], np.float32).reshape(lora.rank, -1)
            arrays[f"{place}.lora_B.weight"] = np.ascontiguousarray(wide.T)
            modules.add(module.rpartition(".")[2])
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.scale,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with written_whole(target) as made:
        save_file(arrays, made / TENSORS, metadata={"format": "pt"})
        (made / CONFIG).write_text(json.dumps(said, indent=2) + "\n")
    return (target / TENSORS).stat().st_size
