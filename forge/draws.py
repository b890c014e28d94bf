"""Random draws that are a function of a key and a counter, and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")

_WORD = (1 << 64) - 1


class Draws:
    """A stream of random numbers named by a key, for example (seed, walk, step).

    Draw n is SplitMix64's mix (Steele et al., OOPSLA 2014) of hash(key) + n * golden ratio: no state is shared between
    streams, so walks can be drawn in any order, in parallel or again later and give the same values. The methods are
    written out here because those of Python's `random` have changed between versions.
    """

    __slots__ = ("_counter", "_key")

    def __init__(self, *key: int | str) -> None:
        digest = blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
        self._key = int.from_bytes(digest, "little")
        self._counter = 0

    def word(self) -> int:
        """64 random bits."""
        self._counter += 1
        mixed = (self._key + self._counter * 0x9E3779B97F4A7C15) & _WORD
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
        return mixed ^ (mixed >> 31)

    def uniform(self) -> float:
        """A float in [0, 1), a multiple of 2**-53."""
        return (self.word() >> 11) * 2.0**-53

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included. Raises ValueError when empty or wider than 2**64."""
        span = high - low + 1
        if not 0 < span <= 1 << 64:
            raise ValueError(f"cannot draw an integer in [{low}, {high}]: it must hold 1 to 2**64 integers")
        # Lemire's method (arXiv 1805.10941): reject the few products that would favour some integers.
        product = self.word() * span
        while product & _WORD < (1 << 64) % span:
            product = self.word() * span
        return low + (product >> 64)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, each as likely. Raises ValueError when there are none."""
        if not items:
            raise ValueError("cannot choose from no items")
        return items[self.integer(0, len(items) - 1)]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """One of the items, with probability in proportion to its weight (>= 0). Raises ValueError when all are 0."""
        total = sum(weights)
        if total <= 0:
            raise ValueError(f"cannot choose with the weights {list(weights)}: one must be above 0")
        mark = self.uniform() * total
        last = None
        for item, weight in zip(items, weights, strict=True):
            if weight > 0:
                last = item
                if mark < weight:
                    return item
                mark -= weight
        return last  # type: ignore[return-value]  # rounding left the mark at the end: the last item that can be drawn

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order (Fisher-Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.integer(0, i)
            out[i], out[j] = out[j], out[i]
        return out
