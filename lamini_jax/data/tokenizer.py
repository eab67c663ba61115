"""Text to token ids and back. The tiny backbone reads bytes."""

import numpy as np

from lamini_jax.errors import UserError


class ByteTokenizer:
    """UTF-8 bytes are their own ids; special tokens are bytes that UTF-8 never has, so that no text can forge one."""

    vocab_size = 256
    pad_id, begin_id, answer_id, stop_id = 0xFC, 0xFD, 0xFE, 0xFF

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises UserError if it cannot be written in UTF-8 (lone surrogates)."""
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise UserError(f"{text!r}: is not valid UTF-8 text") from error

    def decode(self, ids) -> str:
        """The text of some ids up to the first stop token; bytes that are no UTF-8 become U+FFFD."""
        ids = np.asarray(ids)
        stops = np.flatnonzero(ids == self.stop_id)
        return bytes(ids[: stops[0] if stops.size else ids.size].astype(np.uint8)).decode("utf-8", errors="replace")

    def prompt(self, question: str) -> list[int]:
        """What the model reads before it answers."""
        return [self.begin_id, *self.encode(question), self.answer_id]

    def completion(self, answer: str) -> list[int]:
        """What the model must then produce, the stop token included."""
        return [*self.encode(answer), self.stop_id]

    def continuation(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """A plain text, the begin token in front, and what follows it: no question, no answer, and no stop token."""
        return [self.begin_id, *self.encode(context)], self.encode(text)
