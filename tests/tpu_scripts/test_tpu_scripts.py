"""The commands that go to gcloud, by a gcloud that plays the hosts on this machine."""

import os
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tpu_scripts import create, delete, launch, watch

WHERE = ["--name=a", "--zone=z", "--project=p"]


def shown(capsys):
    return [shlex.split(line.removeprefix("$ ")) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A committed checkout as working directory."""
    git = lambda *words: subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], check=True, cwd=tmp_path)
    git("init", "--quiet")
    (tmp_path / "file").write_text("held")
    (tmp_path / ".gitignore").write_text("build/\n")
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_create_asks_the_queue(capsys):
    create.main([*WHERE, "--type=v5litepod-16", "--spot", "--dry_run"])
    [command] = shown(capsys)
    assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "a"]
    wanted = {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=a", "--spot"}
    assert wanted | {"--zone=z", "--project=p"} == set(command[6:])


@pytest.mark.parametrize("kind", ["v5e-16", "v5p", "v5p-0", "v5p-x", "h100-8"])
def test_an_unknown_type_is_refused(kind, capsys):
    with pytest.raises(SystemExit, match="2"):
        create.main([*WHERE, f"--type={kind}", "--dry_run"])
    assert "expected one of v4, v5litepod, v5p, v6e and a size" in capsys.readouterr().err


def test_dry_runs_run_nothing(checkout, monkeypatch, capsys):
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **kw: real(command, **kw) if command[1] == "status" else pytest.fail()
    )
    for program, flags in ((launch, ["--", "--seed=1"]), (watch, []), (watch, ["--stop"]), (delete, [])):
        program.main([*WHERE, "--dry_run", *flags])
    assert {command[0] for command in shown(capsys)} == {"gcloud", "git"}


def test_launch_refuses_what_is_not_committed(checkout, capsys):
    (checkout / "file").write_text("changed")
    with pytest.raises(SystemExit, match="2"):
        launch.main([*WHERE, "--", "--config=config:a"])
    assert "expected a checkout with everything committed" in capsys.readouterr().err


def test_without_gcloud(checkout, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        delete.main(WHERE)
    assert "gcloud is not installed" in capsys.readouterr().err


GCLOUD = """#!{python}
import os, shutil, subprocess, sys
host, words = {host!r}, sys.argv[1:]
if "scp" in words:
    source, target = words[4:6]
    shutil.copy(source, os.path.join(host, target.partition(":")[2]))
elif "ssh" in words:
    [script] = [word.partition("=")[2] for word in words if word.startswith("--command=")]
    sys.exit(subprocess.run(["bash", "-c", script], cwd=host).returncode)
"""
PYTHON = """#!/bin/bash
echo "$@" >> {calls}
exec sleep 60
"""


def test_launch_on_a_host(checkout, tmp_path_factory, monkeypatch, capfd):
    """A host with git; in place of uv and the project, a python that notes its arguments and stays."""
    host, path = tmp_path_factory.mktemp("host"), tmp_path_factory.mktemp("bin")
    script(path / "gcloud", GCLOUD.format(python=sys.executable, host=str(host)))
    script(path / "python3", "#!/bin/bash\ntrue\n")
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
    (host / "lcx" / "venv" / "bin").mkdir(parents=True)
    script(host / "lcx" / "venv" / "bin" / "python", PYTHON.format(calls=host / "calls"))
    launch.main([*WHERE, "--", "--config=set:model.rope=YaRN(factor=4.0, original_length=128)", "--run_dir=r"])
    assert (host / "lcx" / "code" / "file").read_text() == "held"
    called = eventually(host / "calls")
    assert (
        called == "-m experiments.train --config=set:model.rope=YaRN(factor=4.0, original_length=128) --run_dir=r --multihost\n"
    )
    with pytest.raises(SystemExit, match="1"):
        launch.main([*WHERE, "--", "--run_dir=r"])
    assert "a run is going on here" in capfd.readouterr().out
    process = int((host / "lcx" / "run.pid").read_text())
    watch.main([*WHERE, "--stop"])
    ended = time.monotonic() + 10
    while Path(f"/proc/{process}").exists() and "zombie" not in Path(f"/proc/{process}/status").read_text():
        assert time.monotonic() < ended
        time.sleep(0.05)


def script(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def eventually(path):
    deadline = time.monotonic() + 10
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path.read_text()
