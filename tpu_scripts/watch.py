"""Shows where a slice stands in the queue, then follows the log of the run on one of its hosts.

python -m tpu_scripts.watch --name=a --zone=us-west4-a
python -m tpu_scripts.watch --name=a --zone=us-west4-a --state          # the queue alone
python -m tpu_scripts.watch --name=a --zone=us-west4-a --stop           # SIGTERM: the run saves a checkpoint and ends
"""

from tpu_scripts.gcloud import QUEUE, gcloud, on_hosts, parser, run


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("--worker", type=int, default=0, help="whose log")
    only = flags.add_mutually_exclusive_group()
    only.add_argument("--state", action="store_true", help="show the queue, not the log")
    only.add_argument("--stop", action="store_true", help="end the run")
    asked = flags.parse_args(argv)
    if asked.stop:
        run(asked, on_hosts(asked, "kill -TERM $(cat lcx/run.pid)"))
        return
    run(asked, gcloud(asked, *QUEUE, "describe", asked.name, "--format=value(state.state)"))
    if not asked.state:
        run(asked, on_hosts(asked, "tail -n 100 -F lcx/run.log", str(asked.worker)))


if __name__ == "__main__":
    main()
