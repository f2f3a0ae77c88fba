"""A checkpoint folder goes through the programs: generated from, talked with, measured, trained on, converted."""

import io
import json
import shutil

import numpy as np
import pytest
from golden import GOLDEN
from safetensors.numpy import load_file, save_file

from experiments import convert, evaluate, generate, train
from experiments.program import run
from lcx.interop.folder import Folder

FOLDER = GOLDEN / "llama3.1"
LLAMA3 = {key: value for key, value in Folder(FOLDER).config["rope_parameters"].items() if key != "rope_theta"}


def told(main, *argv, capsys, status=0):
    assert run(main, [*argv]) == status
    out, err = capsys.readouterr()
    return out if status == 0 else err


def test_generate_continues_and_talks(capsys, monkeypatch):
    flags = (f"--run_dir={FOLDER}", "--max_new=6")
    one = told(generate.main, *flags, "--prompt=hi, you", capsys=capsys)
    assert one.startswith("hi, you") and len(one) > len("hi, you\n")
    stop = one[len("hi, you") + 2]
    cut = told(generate.main, *flags, "--prompt=hi, you", f"--stop={stop}", capsys=capsys)
    assert cut == one[: one.index(stop, len("hi, you"))] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand you\n"))
    talk = told(generate.main, *flags, "--chat", "--system=be kind", "--window=100", capsys=capsys)
    assert talk.strip() and talk.count("\n") >= 2  # an answer a message


def test_answers_on_a_mesh_are_those_of_one_device(capsys):
    flags = (f"--run_dir={FOLDER}", "--prompt=hi, you", "--max_new=6")
    alone = told(generate.main, *flags, capsys=capsys)
    for shared in (("--fsdp=2", "--tensor=2"), ("--context=4", "--tensor=2")):
        assert told(generate.main, *flags, *shared, capsys=capsys) == alone
    line = told(generate.main, *flags, "--tensor=4", capsys=capsys, status=2)
    assert "kv_heads = 2: expected a multiple of 4" in line


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--prompt=" + "a" * 190, "--max_new=10"], "prompt of 191 tokens + 10 new ones: expected at most window = 192"),
        (["--prompt=a", "--system=b"], "--system: expected --chat beside it"),
        (["--prompt=a", "--chat"], "--prompt: expected none beside --chat"),
        (["--prompt=a", "--stop="], "--stop is empty"),
        (["--prompt=a", "--min_p=2.0", "--temperature=1.0"], "min_p = 2.0: expected a share"),
    ],
)
def test_what_cannot_be_generated(argv, line, capsys):
    assert line in told(generate.main, f"--run_dir={FOLDER}", *argv, capsys=capsys, status=2)


def test_weights_that_are_no_numbers_are_told_of(tmp_path, capsys):
    shutil.copytree(FOLDER, tmp_path / "broken")
    held = load_file(FOLDER / "model.safetensors")
    held["model.norm.weight"][0] = np.nan
    save_file(held, tmp_path / "broken" / "model.safetensors")
    line = told(generate.main, f"--run_dir={tmp_path}/broken", "--prompt=hi", capsys=capsys, status=1)
    assert "generate: log-probability 0 of the answer = nan: expected finite numbers; the weights hold some" in line


def test_convert_writes_the_folder_again_with_another_rope(tmp_path, capsys):
    out = f"--to={tmp_path}/out"
    told(convert.main, f"--run_dir={FOLDER}", "--format=hf", out, capsys=capsys)
    before, after = Folder(FOLDER), Folder(tmp_path / "out")
    assert before.config == after.config
    for name in before.tensors:
        np.testing.assert_array_equal(before.read(name), after.read(name))
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    assert all((FOLDER / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)
    longer = (f"--run_dir={FOLDER}", "--config=set:model.rope.factor=16.0", "--format=hf", f"--to={tmp_path}/longer")
    assert "--window is missing: expected the tokens that the edited rope is for" in told(
        convert.main, *longer, capsys=capsys, status=2
    )
    told(convert.main, *longer, "--window=384", capsys=capsys)
    said = Folder(tmp_path / "longer").config
    assert (said["max_position_embeddings"], said["rope_scaling"]) == (384, {**LLAMA3, "factor": 16.0})
    dynamic = "--config=set:model.rope=DynamicNTK(original_length=192)"
    line = told(convert.main, longer[0], dynamic, *longer[2:3], "--window=384", f"--to={tmp_path}/no", capsys=capsys, status=2)
    assert "--window=384: expected 192, which config.json has to say for DynamicNTK" in line
    line = told(convert.main, f"--run_dir={FOLDER}", f"--to={tmp_path}/no", capsys=capsys, status=2)
    assert "a checkpoint folder, which is read where it stands: expected --format=hf" in line
    line = told(convert.main, "--run_dir=reader", "--format=hf", f"--to={tmp_path}/no", capsys=capsys, status=2)
    assert "embed_mixer" in line and not (tmp_path / "no").exists()


def test_a_folder_is_trained_on_measured_and_written_back(tmp_path, capsys):
    """Fine-tuned on text under a rope for a longer window, then a checkpoint folder again that says so."""
    base = f"config:recipes.extend_hf.extended({str(FOLDER)!r}, factor=2.0, steps=12)"
    source = 'set:data.mixture[0].rows.source=StandardLibrary(split="heldout")'
    flags = [f"--config={base}", f"--config={source}"]
    told(train.main, *flags, f"--run_dir={tmp_path}/run", capsys=capsys)
    told(convert.main, f"--run_dir={tmp_path}/run", "--format=hf", f"--to={tmp_path}/out", capsys=capsys)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 384
    assert config["rope_scaling"] == {**LLAMA3, "factor": 16.0}  # twice that of the folder, of the same trained window
    out = told(generate.main, f"--run_dir={tmp_path}/out", "--prompt=hi", "--max_new=3", capsys=capsys)
    assert out.startswith("hi")
    told(
        evaluate.main,
        f"--config=config:recipes.extend_hf.measured(model='{tmp_path}/out', lengths=(64, 256))",
        f"--run_dir={tmp_path}/measured",
        capsys=capsys,
    )
    assert (tmp_path / "measured" / "table.md").is_file()
    line = told(train.main, *flags, f"--run_dir={tmp_path}/out", capsys=capsys, status=2)
    assert "holds a checkpoint of transformers, which stays as it is" in line


def test_a_folder_learns_to_answer(tmp_path, capsys):
    """Fine-tuned on one conversation until it says what it was told, then served from its own folder."""
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well, you"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": talk}))
    base = f"config:recipes.chat_hf.tuned({str(FOLDER)!r}, chats='{tmp_path}/chats.jsonl', steps=60, length=48, batch_size=1)"
    flags = [f"--config={base}", "--config=set:optimizer.learning_rate.peak=0.02", f"--run_dir={tmp_path}/run"]
    told(train.main, *flags, capsys=capsys)
    prompt = "<u>hi</s><a>"
    out = told(generate.main, f"--run_dir={tmp_path}/run", f"--prompt={prompt}", "--max_new=12", capsys=capsys)
    assert out == f"{prompt}well, you\n"


def test_an_adapter_is_trained_merged_and_written(tmp_path, capsys):
    """LoRA alone is trained; merged it is the same model in a folder; the adapter has each projection's two matrices."""
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": talk}))
    given = f"{str(FOLDER)!r}, chats='{tmp_path}/chats.jsonl', rank=2, steps=12, length=48, batch_size=1"
    flags = [f"--config=config:recipes.chat_hf.adapted({given})", f"--run_dir={tmp_path}/run"]
    told(train.main, *flags, "--config=set:optimizer.learning_rate.peak=0.01", capsys=capsys)
    run_dir = f"--run_dir={tmp_path}/run"
    told(convert.main, run_dir, "--format=hf", f"--to={tmp_path}/merged", capsys=capsys)
    changed = [
        name
        for name in Folder(FOLDER).tensors
        if not np.array_equal(Folder(FOLDER).read(name), Folder(tmp_path / "merged").read(name))
    ]
    assert len(changed) == 2 * 7 and all("_proj" in name for name in changed)
    ask = ["--prompt=<u>hi</s><a>", "--max_new=6"]
    texts = [told(generate.main, f"--run_dir={tmp_path}/{name}", *ask, capsys=capsys) for name in ("run", "merged")]
    assert texts[0] == texts[1]
    told(convert.main, run_dir, "--format=peft", f"--to={tmp_path}/adapter", capsys=capsys)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    assert held[f"{first}.lora_A.weight"].shape == (2, 16) and held[f"{first}.lora_B.weight"].shape == (24, 2)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["target_modules"] == sorted(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    line = told(generate.main, f"--run_dir={tmp_path}/adapter", "--prompt=hi", capsys=capsys, status=2)
    assert "adapter_config.json, of an adapter, is not read back: expected a folder that it was merged into" in line
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    line = told(generate.main, f"--run_dir={tmp_path}/adapter", "--prompt=hi", capsys=capsys, status=2)
    assert "expected the folder of a training run, a checkpoint of transformers, or a shipped model" in line
    line = told(convert.main, f"--run_dir={FOLDER}", "--format=peft", f"--to={tmp_path}/no", capsys=capsys, status=2)
    assert "model.lora = None: expected a model with LoRA" in line
    told(train.main, *flags[:1], f"--run_dir={tmp_path}/all", "--config=set:trainable=None", capsys=capsys)
    line = told(convert.main, f"--run_dir={tmp_path}/all", "--format=peft", f"--to={tmp_path}/no", capsys=capsys, status=2)
    assert "is not that of its base" in line
