"""Stop strings: text is decoded as tokens come, and the first stop string that appears ends the sequence."""

from __future__ import annotations

from engine.tokenizer import StreamDecoder, Tokenizer


class StopScanner:
    """Watches one sequence. `text` is what it said, up to (not including) the stop string once one has come."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._overlap = max(map(len, stop)) - 1  # a stop string may begin in text that came earlier
        self.text = ""

    def push(self, token: int) -> bool:
        """Adds one token; True when a stop string has appeared."""
        new = self._decoder.push([token])
        start = max(0, len(self.text) - self._overlap)
        self.text += new
        found = [at for s in self._stop if (at := self.text.find(s, start)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)
