"""A run folder keeps to one config, and the run is repeated from it alone."""

import errno
import json

import pytest

from configs.ablations import rope_extension
from configs.recipes import quick_text
from lcx.config import build, loads
from lcx.positions.rope import Rope
from lcx.positions.yarn import YaRN
from lcx.spec import SpecError, edit, fingerprint
from lcx.training.run_folder import claim, open_run, read_config


def test_a_new_folder_holds_config_text_and_environment(tmp_path):
    folder = open_run(tmp_path / "a" / "run", Rope(base=5e5))
    assert read_config(folder) == Rope(base=5e5)
    assert build(loads((folder / "config.json").read_text())) == Rope(base=5e5)
    assert "base = 500000.0" in (folder / "config.txt").read_text()
    start = json.loads((folder / "starts.jsonl").read_text())
    assert start["fingerprint"] == fingerprint(Rope(base=5e5))
    assert start["devices"]["platform"] == "cpu"
    assert start["packages"]["jax"].count(".") == 2
    assert not list(folder.glob("*.tmp"))


def test_a_start_tells_the_seed_of_the_run_or_of_the_base_that_an_ablation_trains(tmp_path):
    base = rope_extension.base()
    for name, spec, seed in (
        ("training", edit(base, "seed", 3), {"seed": 3}),
        ("ablation", edit(rope_extension.quickstart(), "base.seed", 4), {"seed": 4}),
        ("evaluation", quick_text.evaluate(model="reader"), {}),
    ):
        start = json.loads((open_run(tmp_path / name, spec) / "starts.jsonl").read_text())
        assert {key: value for key, value in start.items() if key == "seed"} == seed


def test_the_same_config_comes_again(tmp_path):
    for _ in range(2):
        open_run(tmp_path, Rope())
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("other", [Rope(base=2.0), YaRN(factor=2.0, original_length=8)])
def test_two_configs_are_not_mixed(tmp_path, other):
    open_run(tmp_path, Rope())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SpecError) as error:
        open_run(tmp_path, other)
    message = str(error.value)
    assert fingerprint(Rope()) in message and fingerprint(other) in message
    assert ("base: 10000.0 against 2.0" in message) or ("'Rope' against 'YaRN'" in message)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_the_identity_leaves_out_may_change_and_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(Rope, "identity", lambda self: {"base": self.base}, raising=False)
    open_run(tmp_path, Rope())
    open_run(tmp_path, Rope(rotary=0.5))
    assert read_config(tmp_path) == Rope(rotary=0.5)
    assert json.loads((tmp_path / "starts.jsonl").read_text().splitlines()[1])["changed"] == "rotary: 1.0 against 0.5"
    with pytest.raises(SpecError, match="base"):
        open_run(tmp_path, Rope(base=2.0))


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SpecError, match=r"holds files but no config\.json"):
        open_run(tmp_path, Rope())
    with pytest.raises(SpecError, match="is a file"):
        open_run(tmp_path / "notes.txt", Rope())
    for wanted in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SpecError, match=r"no config\.json; expected the folder of an earlier run"):
            read_config(wanted)


@pytest.mark.parametrize("place", ["notes.txt/run", "/proc/run"])
def test_folders_that_cannot_be_made_are_refused(tmp_path, place):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SpecError, match=r"run folder .*: cannot be made: .*another --run_dir"):
        open_run(tmp_path / place, Rope())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x7fELF\xff", "not a config: not UTF-8 at byte 4"),
        (b"[]", r"expected what a run writes as config\.json, found \[\]"),
        (b'{"a": 1}', r"expected what a run writes as config\.json, found an object of 'a'"),
        (b"{", "not JSON"),
    ],
)
def test_a_config_that_is_none_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SpecError, match=rf"config\.json: .*{message}"):
        read_config(tmp_path)


def test_a_claim_is_given_back(tmp_path):
    for _ in range(2):
        with claim(tmp_path / "run"), pytest.raises(SpecError, match="trains in it now"), claim(tmp_path / "run"):
            pass


def test_a_file_system_without_locks_is_trusted(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with claim(tmp_path), claim(tmp_path):
        pass


def test_a_folder_of_another_version_is_refused(tmp_path):
    open_run(tmp_path, Rope())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"Rope"', '"Roper"'))
    with pytest.raises(SpecError, match="not a config of this version"):
        open_run(tmp_path, Rope())


def test_a_start_that_was_cut_off_before_its_config_can_start_again(tmp_path):
    open_run(tmp_path, Rope())
    (tmp_path / "config.json").rename(tmp_path / "config.json.tmp")
    open_run(tmp_path, Rope(base=2.0))
    assert read_config(tmp_path) == Rope(base=2.0)
