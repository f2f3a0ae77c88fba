"""Named edits of a whole experiment, for what no single `set:` says: `--config=fiddler:edits.windowed(64)`."""

import fiddle

from lcx.attention.mask import Window


def windowed(config: fiddle.Config, size: int) -> None:
    """Every attention layer sees the `size` nearest tokens."""
    for layer in config.model.pattern:
        layer.mixer.mask = fiddle.Config(Window, size=size)
