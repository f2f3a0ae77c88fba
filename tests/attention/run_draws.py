"""The long form of the support matrix: many draws, resumable; a row a draw in docs/results/support_draws.jsonl.

    python tests/attention/run_draws.py --draws 2000 --minutes 14

A row says what was drawn and why it was refused, or its errors against the dense float32 reference over the largest entry. The
run stops at the first draw that is neither. At the end it prints the table of docs/numerics.md.
"""

import argparse
import collections
import json
import time
from pathlib import Path

import jax
from draws import DATA, check, config

ROWS = Path(__file__).parents[2] / "docs" / "results" / "support_draws.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=14.0, help="stop after these; the next call goes on")
    asked = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    end = time.monotonic() + 60 * asked.minutes
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    check_drawn(rows)
    with open(ROWS, "a") as file:
        for draw in range(len(rows), asked.draws):
            if time.monotonic() > end:
                break
            rows.append(check(*divmod(draw, DATA)))
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    print(summary(rows))


def check_drawn(rows: list[dict]) -> None:
    """Stops if rows are of other configs than are drawn today."""
    for row in rows:
        if "choice" in row and row["choice"] != str(config(row["config"])):
            raise SystemExit(f"{ROWS}: config {row['config']} is drawn as another today: delete the file to draw anew")


def summary(rows: list[dict]) -> str:
    """Counts, and the largest error by dtype and number of devices that share a row."""
    ran = [row for row in rows if "error" in row]
    largest: dict[tuple[str, int], float] = collections.defaultdict(float)
    for row in ran:
        key = row["dtype"], row["shards"]
        largest[key] = max(largest[key], *row["error"].values())
    lines = [f"{len(rows)} draws, {len(ran)} ran ({len(ran) / max(1, len(rows)):.0%}), the rest refused with a reason.", ""]
    lines += ["| dtype | devices that share a row | draws | largest error over largest entry |", "|---|---|---|---|"]
    for (dtype, shards), error in sorted(largest.items()):
        count = sum((row["dtype"], row["shards"]) == (dtype, shards) for row in ran)
        lines.append(f"| {dtype} | {shards} | {count} | {error:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
