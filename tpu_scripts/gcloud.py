"""What the commands share: naming a slice, and running gcloud or showing what would be run."""

import argparse
import shlex
import shutil
import subprocess
import sys

SLICE = ("compute", "tpus", "tpu-vm")
QUEUE = ("compute", "tpus", "queued-resources")


def parser(doc: str) -> argparse.ArgumentParser:
    """Flags that every command takes; the docstring of its module is its help."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--name", required=True, help="of the slice and of its place in the queue")
    made.add_argument("--zone", required=True, help="such as us-west4-a")
    made.add_argument("--project", help="default: the one of `gcloud config`")
    made.add_argument("--dry_run", action="store_true", help="print the commands, run none")
    return made


def gcloud(asked: argparse.Namespace, *words: str) -> list[str]:
    """One gcloud command about the slice."""
    project = [f"--project={asked.project}"] if asked.project else []
    return ["gcloud", *words, f"--zone={asked.zone}", *project]


def on_hosts(asked: argparse.Namespace, script: str, worker: str = "all") -> list[str]:
    """A shell script on the hosts of the slice."""
    return gcloud(asked, *SLICE, "ssh", asked.name, f"--worker={worker}", f"--command={script}")


def run(asked: argparse.Namespace, *commands: list[str]) -> None:
    """Prints every command and, without --dry_run, runs it; ends the program at the first that fails."""
    for command in commands:
        print(f"$ {shlex.join(command)}", flush=True)
        if asked.dry_run:
            continue
        if shutil.which(command[0]) is None:
            stop(f"{command[0]} is not installed; --dry_run shows the commands")
        if status := subprocess.run(command).returncode:
            stop(f"{command[0]} ended with exit status {status}", status)


def stop(reason: str, status: int = 2) -> None:
    """Ends the program with one line."""
    print(reason, file=sys.stderr)
    sys.exit(status)
