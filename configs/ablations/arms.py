"""The arms of an ablation that takes more than a command of some minutes: all of them, or the one that is named."""

from lcx.spec import SpecError


def chosen(arms: dict, only: str | None) -> dict:
    """The arms, or `only` one of them. Raises SpecError for a name that is none."""
    if only is not None and only not in arms:
        raise SpecError(f"only = {only!r}: expected one of {', '.join(map(repr, arms))}")
    return arms if only is None else {only: arms[only]}
