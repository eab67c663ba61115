"""From the tokens of an answer, one by one, to its text: whole letters, and nothing from a stop text on."""

from collections.abc import Sequence

_UNFINISHED = "\ufffd"  # what a letter decodes to of which some tokens are missing
_WINDOW = 32  # tokens that are decoded together: not all of a long answer for each of its tokens
_KEPT = 8  # of them, when a window ends, because a token may decode to something else after others


class Writer:
    """The text of one answer as it grows."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []  # of the window
        self._told = 0  # letters of the window that are in `_held` or have been given out
        self._held = ""  # what may be the beginning of a stop text

    def add(self, token: int) -> tuple[str, bool]:
        """What is new after this token, and whether a stop text has come: then nothing follows."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        whole = text.removesuffix(_UNFINISHED)
        new, self._told = whole[self._told :], len(whole)
        if whole == text and len(self._ids) > _WINDOW:
            self._ids = self._ids[-_KEPT:]
            self._told = len(self._tokenizer.decode(self._ids))
        return self._given(new)

    def end(self) -> str:
        """What is left when no token follows: letters that stay unfinished too."""
        rest = self._tokenizer.decode(self._ids)[self._told :]
        new, stopped = self._given(rest)
        return new if stopped else new + self._held

    def _given(self, new: str) -> tuple[str, bool]:
        self._held += new
        places = [place for text in self._stop if (place := self._held.find(text)) >= 0]
        if places:
            return self._held[: min(places)], True
        kept = max((_overlap(self._held, text) for text in self._stop), default=0)
        given, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return given, False


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of a text are the beginning of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
