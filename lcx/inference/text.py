"""The text of tokens as they come: whole characters only, and nothing behind a stop string or of one that may yet be whole."""

from collections.abc import Sequence

from lcx.data.tokenizers import Tokenizer

LONGEST = 3  # bytes of a character that may still be completed


class Unfolding:
    """`add` gives the text that is certain by then, `end` the rest. `stopped`: whether a stop string was found; the text ends
    before it, and `needed` is how many tokens it took. The text is that of all ids together, but that few are decoded again."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        if "" in stops:
            raise ValueError("stop = '': expected no empty stop string")
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.stopped, self.needed = False, 0
        self._ids: list[int] = []
        self._before = self._read = 0  # ids whose text stands before, and is known
        self._shown = ""  # of the ids behind these
        self._held = ""  # text that is known, but may be the beginning of a stop string

    def add(self, ids: Sequence[int]) -> str:
        """The text that further ids make certain."""
        if not self.stops:
            return "" if self.stopped else self._take(ids)
        pieces = []
        for token in ids:
            if not self.stopped:
                pieces.append(self._take([token]))
        return "".join(pieces)

    def end(self) -> str:
        """The text that is left."""
        if self.stopped:
            return ""
        text = self._held + self._window()[len(self._known()) :]
        place = min((text.find(stop) for stop in self.stops if stop in text), default=None)
        self.stopped = place is not None
        return text if place is None else text[:place]

    def _take(self, ids: Sequence[int]) -> str:
        self._ids += ids
        self.needed += len(ids)
        known, text = self._known(), self._window()
        open_bytes = min(len(text) - len(text.rstrip("\ufffd")), LONGEST)
        whole = text[: len(text) - open_bytes]
        new = whole[len(known) :] if len(whole) > len(known) else ""
        if new and not open_bytes:
            self._before, self._read = self._read, len(self._ids)
            self._shown = ""
        else:
            self._shown += new
        return self._released(new)

    def _known(self) -> str:
        """The text of the window that `add` has had."""
        return self.tokenizer.decode(self._ids[self._before : self._read]) + self._shown

    def _window(self) -> str:
        return self.tokenizer.decode(self._ids[self._before :])

    def _released(self, new: str) -> str:
        """What of the text no stop string can claim any more."""
        text = self._held + new
        found = [text.find(stop) for stop in self.stops if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        sizes = (size for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
        kept = max(sizes, default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]
