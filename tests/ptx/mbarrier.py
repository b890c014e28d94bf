"""The state of mbarriers: phases, pending arrivals and bytes still to come (PTX ISA, "mbarrier")."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_MOST_ARRIVALS = 2**20 - 1
_MOST_BYTES = 2**20 - 1
SEAL = np.frombuffer(b"mbarrier", np.uint8)  # what the eight bytes of a live one hold here: nobody else may write there


class ProtocolError(AssertionError):
    """A program breaks a rule of the asynchronous instructions; the message says which, and where."""


@dataclass
class Barrier:
    """An mbarrier that `expected` arrivals complete, phase after phase.

    `released` is what the arrivals of the current phase have published, and `acquired` what the ones of completed
    phases have: see `tests.ptx.ordering`.
    """

    address: int
    expected: int
    released: np.ndarray
    acquired: np.ndarray
    phase: int = 0
    bytes_to_come: int = 0
    pending: int = field(init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.expected <= _MOST_ARRIVALS:
            raise ProtocolError(f"{self} is made for {self.expected} arrivals; 1 to {_MOST_ARRIVALS} are possible")
        self.pending = self.expected

    def __str__(self) -> str:
        return f"mbarrier at {self.address} of shared memory"

    def arrive(self, count: int = 1) -> None:
        """Raises ProtocolError where more arrive than the phase has to wait for."""
        if not 1 <= count <= self.pending:
            raise ProtocolError(f"{count} arrive at the {self}, whose phase {self.phase} waits for {self.pending}")
        self.pending -= count
        self._complete()

    def expect(self, size: int) -> None:
        """The phase waits for so many bytes more; a negative size is bytes that have come."""
        self.bytes_to_come += size
        if abs(self.bytes_to_come) > _MOST_BYTES:
            raise ProtocolError(f"{self} counts {self.bytes_to_come} bytes to come; {_MOST_BYTES} are the most")
        self._complete()

    def passed(self, parity: int) -> bool:
        """Whether the last phase of this parity is complete; the one before the first counts as complete."""
        return self.phase & 1 != parity

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes_to_come == 0:
            self.phase, self.pending = self.phase + 1, self.expected
            np.maximum(self.acquired, self.released, out=self.acquired)
            self.released[:] = 0

    @property
    def state(self) -> str:
        """For the report of a deadlock."""
        return (
            f"{self}: phase {self.phase} (parity {self.phase & 1}) waits for {self.pending} of {self.expected} "
            f"arrivals and {self.bytes_to_come} bytes"
        )
