"""Prints every benchmark, each as ratios side by side in one run. Needs the `oracles` extra for the peers.

python -m experiments.bench
"""

import argparse
import importlib.util
import subprocess
import sys

BENCHES = {
    "Training step beside Hugging Face Llama on torch, CPU, float32": "lcx.training.bench",
    "Prefill, decoding and loading beside transformers on torch, CPU, float32": "lcx.inference.bench",
    "Memory of the chunked head": "lcx.objectives.bench",
    "Tile attention": "pallas_kernels.tile_attention.bench",
    "Distance plans beside plain attention": "lcx.positions.bench",
    "Titans' memory beside titans-pytorch, CPU, float32": "lcx.mixers.bench",
    "Ring attention beside the ringattention package, eight forced devices": "lcx.attention.bench",
}


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser("bench", description=__doc__, allow_abbrev=False).parse_args(argv)
    for package in ("torch", "transformers", "ringattention", "titans_pytorch"):
        if importlib.util.find_spec(package) is None:
            print(f"bench: needs {package}: use `make bench`", file=sys.stderr)
            return 2
    for title, module in BENCHES.items():
        print(f"## {title}\n", flush=True)
        status = subprocess.run([sys.executable, "-m", module]).returncode
        if status:
            return status
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
