"""Starts `experiments.train` of this checkout on every host of a slice, detached; `watch` follows it.

    python -m tpu_scripts.launch --name=a --zone=us-west4-a -- \
        --config=config:recipes.quick_text.quick --config=set:mesh.data=16 --run_dir=/mnt/runs/quick

Each host gets HEAD with its history in ~/lcx/code, Python 3.11 with the `tpu` extra in ~/lcx/venv, and runs in ~/lcx. The hosts
join by --multihost, which is added. They need one run folder that all of them see (NFS, a mounted bucket): the program checks.
"""

import shlex
import subprocess
from pathlib import Path

from tpu_scripts.gcloud import SLICE, gcloud, on_hosts, parser, run, stop

BUNDLE = Path("build/lcx.bundle")  # in a folder that git ignores
IDLE = "! { test -e lcx/run.pid && kill -0 $(cat lcx/run.pid) 2>/dev/null; } || { echo 'a run is going on here'; exit 1; }"
INSTALL = (
    f"mkdir -p lcx && cd lcx && rm -rf code && git clone --quiet ../{BUNDLE.name} code"
    " && python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.11 venv"
    " && python3 -m uv pip install --quiet --python venv/bin/python --editable 'code[tpu]'"
)


def start(flags: list[str]) -> str:
    """The script that starts a training run and leaves its log and process id in ~/lcx."""
    command = shlex.join(["venv/bin/python", "-m", "experiments.train", *flags, "--multihost"])
    return f"cd lcx && {{ setsid nohup {command} > run.log 2>&1 < /dev/null & echo $! > run.pid; }}"


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("flags", nargs="+", help="after --: those of experiments.train")
    asked = flags.parse_args(argv)
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True)
    if changed.returncode or changed.stdout:
        first = (changed.stdout or changed.stderr).strip().splitlines()[0].strip()
        stop(f"launch: the hosts get HEAD, but the checkout differs ({first}): expected a checkout with everything committed")
    BUNDLE.parent.mkdir(exist_ok=True)
    run(
        asked,
        on_hosts(asked, IDLE),
        ["git", "bundle", "create", "--quiet", str(BUNDLE), "HEAD"],
        gcloud(asked, *SLICE, "scp", str(BUNDLE), f"{asked.name}:{BUNDLE.name}", "--worker=all"),
        on_hosts(asked, INSTALL),
        on_hosts(asked, start(asked.flags)),
    )


if __name__ == "__main__":
    main()
