"""A block while it runs: its registers, its shared memory, where its threads are, and what is still to happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.spaces import Region, Space
from tests.ptx.syntax import Instruction, PTXError
from tests.ptx.threads import VIEWS, WARP, Threads

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Wait = tuple[Threads, Callable[[], bool], object]  # who waits, whether it is over, and for what
SharedAccess = Callable[[Threads, NDArray, int], None]


class Blocked(Exception):
    """Raised by `Block.wait`, for the scheduler."""

    def __init__(self, instruction: Instruction, waits: Sequence[Wait], again: bool) -> None:
        super().__init__(instruction.text)
        self.instruction, self.waits, self.again = instruction, waits, again


class Strand:
    """Threads at one place of the program; `ready` says whether their wait is over (None: they have none), `what` names
    what they wait for."""

    __slots__ = ("pc", "ready", "threads", "what")

    def __init__(self, pc: int, threads: Threads, ready: Callable[[], bool] | None = None,
                 what: Callable[[], str] = str) -> None:  # fmt: skip
        self.pc, self.threads, self.ready, self.what = pc, threads, ready, what


class Block:
    """One block; the same object serves all blocks of a grid, one after the other, from `begin` to `begin`.

    - `files["b32"][register.index]` is a register's row over the block (uint32 [threads]; also b16, b64, pred).
    - `shared` is shared memory (uint8): symbols in it begin at 0, dynamic memory after static; `shared_space` is the
      same, checked. `memory` is global memory: `memory.bytes(address, size)` is that part of it, checked.
    - `late` says whether an asynchronous operation that begins now is to be done as late as may be. What an mbarrier
      tells of goes to `pending`: the scheduler calls one when no thread can go on, the oldest, or any under a random
      schedule. `at_exit` are called when all threads have returned, before the block's memory goes.
    - `on_shared_store` are called after every ordinary store to shared memory, with uint64 [count] addresses and the
      bytes of each, `on_shared_load` after every load, and `on_barrier` with the threads that came to a barrier (bar)
      when it completes.
    - `state` is what instruction families keep for a block, by the family's name.

    `pending`, `state` and what is called begin empty in each block; then those in BLOCK_HOOKS are called with it.
    """

    def __init__(self, machine: Machine, size: int) -> None:
        self.machine, self.size = machine, size
        self.files: dict[str, NDArray] = {}
        self.views: dict[str, NDArray] = {}
        for file, views in VIEWS.items():
            dtype = next(iter(views.values()))
            self.files[file] = np.zeros((machine.kernel.registers[file], size), dtype)
            self.views |= {name: self.files[file].view(each) for name, each in views.items()}
        self.shared = np.zeros(-(-machine.shared // 16) * 16, np.uint8)
        self.shared_space = Space("shared", [Region(self.shared, 0, 0, machine.shared)])
        self._threads: dict[Any, Threads] = {}
        lanes = np.arange(size, dtype=np.uint32)
        self._specials = {"%tid.x": lanes, "%laneid": lanes % WARP, "%warpid": lanes // WARP}
        self._constants: dict[str, NDArray] = {}

    def begin(self, place: tuple[int, int, int], memory: Space) -> None:
        """The block at `place` (x, y, z) of the grid. Registers and shared memory hold 0xFF: what is read before it is
        written is NaN, or far away."""
        self.memory, self.late = memory, self.machine.late
        for name, table in self.files.items():
            table.fill(True if name == "pred" else -1 & (256**table.itemsize - 1))
        self.shared.fill(0xFF)
        grid = self.machine.grid
        self._constants = {f"%{name}.{axis}": np.array([value], np.uint32) for name, values in (
            ("ctaid", place), ("nctaid", grid), ("ntid", (self.size, 1, 1)), ("tid", (0, 0, 0)),
            ("clusterid", place), ("nclusterid", grid), ("cluster_ctaid", (0, 0, 0)), ("cluster_nctaid", (1, 1, 1)),
        ) for axis, value in zip("xyz", values, strict=True)}  # fmt: skip
        self._constants |= {"%cluster_ctarank": np.zeros(1, np.uint32), "%cluster_nctarank": np.ones(1, np.uint32),
                            "%nwarpid": np.array([self.size // WARP], np.uint32)}  # fmt: skip
        self.pending: list[Callable[[], None]] = []
        self.at_exit: list[Callable[[], None]] = []
        self.on_barrier: list[Callable[[Threads], None]] = []
        self.on_shared_store: list[SharedAccess] = []
        self.on_shared_load: list[SharedAccess] = []
        self.state: dict[str, Any] = {}
        self.strands = [Strand(0, self.threads(np.arange(self.size)))]
        for hook in BLOCK_HOOKS:
            hook(self)

    def special(self, name: str, threads: Threads) -> NDArray:
        """A special register's values: [count], or [1] where they are all the same."""
        if name in self._specials:
            return self._specials[name][threads.select]
        if name in self._constants:
            return self._constants[name]
        raise PTXError(f"special register {name} is not known to the simulator")

    def threads(self, index: NDArray[np.intp]) -> Threads:
        """Threads by their numbers in the block, sorted; the same object for the same threads."""
        low, high = int(index[0]), int(index[-1]) + 1
        key = (low, high) if high - low == len(index) else index.tobytes()
        found = self._threads.get(key)
        if found is None:
            if len(self._threads) > 4096:
                self._threads.clear()
            found = self._threads[key] = Threads(self, index)
        return found

    def written_shared(self, threads: Threads, places: NDArray, size: int) -> None:
        """`size` bytes at each of uint64 [count] addresses."""
        for call in self.on_shared_store:
            call(threads, places, size)

    def read_shared(self, threads: Threads, places: NDArray, size: int) -> None:
        """`size` bytes at each of uint64 [count] addresses."""
        for call in self.on_shared_load:
            call(threads, places, size)

    def wait(self, instruction: Instruction, waits: Sequence[Wait], again: bool) -> None:
        """Does not return where anybody has to wait. Those threads go on once theirs is over: at this instruction
        again, or (again=False) at the next. Other threads of the same call go on at once. What they wait for is an
        object whose text goes into the report of a deadlock."""
        if waits:
            raise Blocked(instruction, waits, again)


BLOCK_HOOKS: list[Callable[[Block], None]] = []
