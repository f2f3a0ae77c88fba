"""Prints every benchmark, each as ratios side by side in one run. Needs the `oracles` extra for the peers.

python -m experiments.bench
"""

import subprocess
import sys

BENCHES = {
    "Training step beside Hugging Face Llama on torch, CPU, float32": "lcx.training.bench",
    "Memory of the chunked head": "lcx.objectives.bench",
    "Tile attention": "pallas_kernels.tile_attention.bench",
}


def main() -> int:
    for title, module in BENCHES.items():
        print(f"## {title}\n", flush=True)
        status = subprocess.run([sys.executable, "-m", module]).returncode
        if status:
            return status
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
