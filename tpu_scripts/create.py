"""Asks for a TPU slice. It waits in Google's queue until there is one; `watch` shows where it stands.

    python -m tpu_scripts.create --name=a --zone=us-west4-a --type=v5litepod-16 --spot

--type is Google's: the generation, then chips (v5litepod, v6e) or cores, two a chip (v4, v5p).
"""

import argparse

from tpu_scripts.gcloud import QUEUE, gcloud, parser, run

RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}


def slice_type(text: str) -> str:
    generation, _, size = text.partition("-")
    if generation not in RUNTIMES or not size.isdecimal() or int(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(RUNTIMES)} and a size, such as v5litepod-16")
    return text


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--type", required=True, type=slice_type, help="such as v5litepod-16, v5p-32, v6e-8")
    flags.add_argument("--runtime", help="image of the hosts; default: Google's for the generation")
    flags.add_argument("--spot", action="store_true", help="cheaper, and taken back at any time")
    asked = flags.parse_args(argv)
    runtime = asked.runtime or RUNTIMES[asked.type.partition("-")[0]]
    wanted = [f"--node-id={asked.name}", f"--accelerator-type={asked.type}", f"--runtime-version={runtime}"]
    run(asked, [*gcloud(asked, *QUEUE, "create", asked.name), *wanted, *(["--spot"] if asked.spot else [])])


if __name__ == "__main__":
    main()
