"""Gives a slice back, with all that is on its hosts' disks. gcloud asks before it does.

python -m tpu_scripts.delete --name=a --zone=us-west4-a
"""

from tpu_scripts.gcloud import QUEUE, gcloud, parser, run


def main(argv: list[str] | None = None) -> None:
    asked = parser(__doc__).parse_args(argv)
    run(asked, gcloud(asked, *QUEUE, "delete", asked.name, "--force"))


if __name__ == "__main__":
    main()
