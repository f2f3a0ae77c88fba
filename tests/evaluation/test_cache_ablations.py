"""The ablations of caches take any model: caches lie in each layer that they are for; what cannot be measured is refused."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.ablations import cache
from configs.ablations.cache import bits, kept, prefixes, streams
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.kvzip import FIRST
from lcx.mixers.attention import Attention
from lcx.spec import SpecError

GOLDEN = Path(__file__).parents[1] / "oracles" / "golden" / "hf"
WINDOW = 512


def folder(name: str, at: Path) -> str:
    """A golden folder with a tokenizer of its own, read at 512 tokens."""
    shutil.copytree(GOLDEN / name, at / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / "llama3.1" / file, at / name / file)
    said = json.loads((at / name / "config.json").read_text())
    (at / name / "config.json").write_text(json.dumps(said | {"max_position_embeddings": WINDOW}))
    return str(at / name)


def caches(ablation, arm: str) -> list:
    """Those of each layer, first to last."""
    [arm] = [one for one in ablation.arms if one.name == arm]
    model = ablation.experiment(arm, ablation.variants[0]).model
    return [layer.mixer.cache for layer in model.pattern * model.periods if isinstance(layer.mixer, Attention)]


def test_a_shipped_model_is_edited_in_its_one_kind_of_layer():
    found = streams()
    assert [[path for path, _ in arm.edits] for arm in found.arms] == [["model.pattern[0].mixer.cache"]] * 8
    assert found.panels[0].title == "held-out code, nats a byte"
    assert caches(kept(only="Q-Filters"), "Q-Filters")[0].policy.score.directions == "reader_2k"
    assert caches(kept(only="KVzip"), "KVzip")[0].policy.first == tuple(FIRST.encode())


def test_codecs_are_in_every_layer_and_policies_where_all_tokens_are_seen(tmp_path, caplog, monkeypatch):
    some, policies = ("SnapKV", "KVzip", "WindowKV"), cache._policies
    monkeypatch.setattr(cache, "_policies", lambda *known: {name: policies(*known)[name] for name in some})
    gemma = folder("gemma3", tmp_path)  # two layers that see seven tokens, then one that sees all
    coded = bits(gemma, WINDOW, only="KIVI, 2 bits")
    assert [one.codec.bits for one in caches(coded, "KIVI, 2 bits")] == [2, 2, 2]
    assert coded.panels[0].title == "held-out code, nats a token"
    with caplog.at_level(logging.INFO, "lcx"):
        chosen = kept(gemma, WINDOW, measured="")
    near = [DenseCache(), DenseCache()]
    assert caches(chosen, "SnapKV")[:2] == near and caches(chosen, "SnapKV")[2].policy.keep == 0.12
    zipped = caches(chosen, "KVzip")
    assert zipped[:2] == [KVCache(), KVCache()] and zipped[2].policy.first != tuple(FIRST.encode())
    assert "left out: WindowKV" in caplog.text and "WindowKV" not in {arm.name for arm in chosen.arms}
    with pytest.raises(SpecError, match=r"WindowKV: WindowKV.layers = .*mixer, model.pattern\[1\].mixer see a window"):
        kept(gemma, WINDOW, measured="", only="WindowKV")
    assert caches(prefixes(gemma, WINDOW, only="Quest, 0.3"), "Quest, 0.3")[:2] == near


def test_layers_that_hold_unlike_numbers_of_tokens_are_unrolled(tmp_path):
    llama = folder("llama3.1", tmp_path)
    unrolled = lambda arm: ("model.unroll", "all") in kept(llama, WINDOW, measured="", only=arm).arms[0].edits
    assert unrolled("SnapKV, pyramid") and unrolled("WindowKV") and not unrolled("SnapKV")


def test_a_rope_that_turns_keys_anew_finds_them_raw(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "READ", (0.1,))
    dynamic = folder("llama-dynamic", tmp_path)
    for arm in ("full precision", "int8"):
        assert {one.keys for one in caches(bits(dynamic, WINDOW, calibration=""), arm)} == {"raw"}
    with pytest.raises(SpecError, match=r"nothing to measure: .*selector: expected None beside"):
        prefixes(dynamic, WINDOW)


def test_what_was_measured_is_found_in_the_folder(tmp_path):
    llama = folder("llama3.1", tmp_path)
    np.savez(Path(llama) / "duo_attention.npz", gates=np.zeros((2, 2), np.float32), model=np.uint32(0))
    [arm] = streams(llama, WINDOW, only="DuoAttention").arms
    assert arm.edits[0][1].policy.gates == llama
    assert "DuoAttention" not in {arm.name for arm in streams(llama, WINDOW, measured="").arms}


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (bits, {}, "calibration: .* has no kvquant.npz: expected a file that `python -m experiments.calibrate --run_dir="),
        (bits, {"only": "KVQuant, 3 bits"}, 'kvquant.npz.*or calibration="" without KVQuant'),
        (kept, {}, "measured: .* has no qfilters.npz: .* --method=QFilters"),
        (kept, {"length": 256, "measured": ""}, "length = 256: expected at least 300, of which 12% hold"),
        (bits, {"length": 2048}, "length = 2048: expected at most 512, the window of"),
    ],
)
def test_refused(config, options, words, tmp_path):
    with pytest.raises(SpecError, match=words):
        config(folder("llama3.1", tmp_path), **({"length": WINDOW} | options))


def test_a_model_that_sees_windows_alone_has_its_codecs_measured(tmp_path):
    mistral = folder("mistral", tmp_path)
    assert len(caches(bits(mistral, WINDOW, calibration="", only="int8"), "int8")) == 2
    with pytest.raises(SpecError, match=r"length = 512: expected at most 9, what some layer of .* sees, or codecs alone"):
        kept(mistral, WINDOW, measured="")
