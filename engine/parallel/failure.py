"""When a rank dies, the others end within half a minute, and all of them name the same one.

A collective with a dead rank mostly fails by itself: the kernel closes the dead process's sockets and gloo raises. What
gloo cannot do is tell who was first (the ranks that fail take others with them, one after another), notice a machine
that is gone without a goodbye, or wake a thread that waits for a rank which waits for the dead one: it has no abort,
and a send or receive that was given a short timeout to poll with is broken by it. So each process has a watchdog, a
thread beside the main one:

- it looks whether the processes of the same machine still run (/proc, twice a second) and, for each other machine,
  whether its first rank still counts up in the store that the ranks share;
- whoever finds a dead rank first, or ends with an exception, writes it down once, for all;
- a collective that fails asks the watchdog, so that its ParallelError names the culprit;
- a main thread that does not come out by itself, `GRACE_SECONDS` after that, is ended with its process: one line on
  stderr, exit code 1. (The kernels release the interpreter's lock, so a long one stops no watchdog.)

An exception is preferred, since it can be caught and cleaned up after; the exit is for threads that nothing can wake.

keys in the store: culprit | left/<rank> how it ended | beat/<rank> a count | waiting/<rank> the collective it is in
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import msgspec
import torch.distributed as dist

from engine.errors import ParallelError
from engine.log import logger

if TYPE_CHECKING:
    from engine.parallel.collectives import Group

T = TypeVar("T")
TICK_SECONDS = 0.5
BEAT_SECONDS = 3.0
SILENT_SECONDS = 15.0  # without a beat a machine, and without an answer the store, counts as gone
GRACE_SECONDS = 8.0  # for the main thread to end by itself
BLOCKED_SECONDS = 2.0  # a collective that takes longer is shown to the other ranks
STORE_SECONDS = 10.0  # for one answer of the store
GAVE_UP = "gave up after a timeout in "


class Process(msgspec.Struct, frozen=True):
    """A rank's process. Its number means something on its `machine` only: one boot of a host, and one container."""

    rank: int
    host: str
    machine: str
    pid: int
    started: int  # clock ticks after boot: a number that is used again is another process
    restarts: int = 0  # how often torchrun has started it again

    @classmethod
    def here(cls, rank: int, restarts: int = 0) -> Process:
        """This process."""
        host = socket.gethostname()
        marks = (_read("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid"))
        started = _state(os.getpid())
        assert started is not None, "this process does not find itself in /proc"
        return cls(rank, host, " ".join((host, *marks)), os.getpid(), started[1], restarts)

    def is_running(self) -> bool:
        """Whether it runs still; only for a process of this machine."""
        state = _state(self.pid)
        return state is not None and state[0] not in "ZX" and state[1] == self.started

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


class Culprit(msgspec.Struct, frozen=True):
    """The rank whose end ends the others, and what is known of it."""

    rank: int
    text: str


class Watchdog:
    """Watches the other ranks for this one. `store` is its own connection, with nothing of another start in it;
    `keeper` says whose process keeps the store."""

    def __init__(self, store: dist.Store, processes: Sequence[Process], rank: int, keeper: str) -> None:
        self.rank = rank
        self.processes = list(processes)
        self.call: tuple[str, Group, float] | None = None  # the collective this rank is in, and since when
        self.culprit: Culprit | None = None
        self.exit: Callable[[int], object] = os._exit
        self.world = dist.group.WORLD if dist.is_initialized() else None
        self._store = store
        self._keeper = keeper
        store.set_timeout(timedelta(seconds=STORE_SECONDS))
        mine = self.processes[rank].machine
        self._neighbours = [p for p in self.processes if p.machine == mine and p.rank != rank]
        first_of = {p.machine: p for p in reversed(self.processes)}
        self._remote = [p for machine, p in first_of.items() if machine != mine]
        self._beats_for_all = bool(self._remote) and first_of[mine].rank == rank
        self._beats: dict[int, tuple[str, float]] = {}  # by rank: the last count and when it was new
        self._count = 0
        self._next_beat = 0.0
        self._shown = ""
        self._store_lost: float | None = None  # since when
        self._deadline: float | None = None
        self._told = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    # ---- for the main thread ----

    def start(self) -> None:
        """Begins to watch; also makes exceptions that end this process, and SIGTERM, known to the others."""
        self._thread.start()
        previous = sys.excepthook

        def hook(kind: type[BaseException], error: BaseException, trace: object) -> None:
            self.report(error)
            previous(kind, error, trace)  # type: ignore[arg-type]

        sys.excepthook = hook
        ours = threading.current_thread() is threading.main_thread()
        if ours and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminate)

    def stop(self) -> None:
        """Watches no more, and its thread has ended: one that is still inside the store's C++ when the interpreter
        shuts down aborts the process."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(STORE_SECONDS)

    def leave(self) -> None:
        """The program is at its end. If that is because of another rank this process ends here and now: threads of
        gloo may wait for it, and joining them would take until their timeout."""
        self.stop()
        self._set(f"left/{self.rank}", "has ended")
        if self.culprit is not None or self._told:
            _flush()
            self.exit(1)

    def report(self, error: BaseException) -> None:
        """This rank fails: the others will say so."""
        if self.culprit is None:
            lines = str(error).splitlines() or [""]
            self._accuse(self.rank, f"{self.processes[self.rank]} failed: {type(error).__name__}: {lines[0]}")

    def explain(self, what: str, group: Group, error: BaseException) -> ParallelError:
        """The error of a collective that has failed: who is dead, or else who did not come to it."""
        timed_out = "imed out" in str(error) or "timeout" in str(error)
        here = f"rank {self.rank} was in {what} over the group {group}"
        far = any(self.processes[rank].machine != self.processes[self.rank].machine for rank in group.ranks)
        if timed_out:
            patience = 0.0
            self._show(f"{GAVE_UP}{what} over the group {group}")
        else:
            patience = SILENT_SECONDS + BEAT_SECONDS if far else 3.0
        culprit = self.find(patience, group)
        if culprit is not None:
            self._told = True
            return ParallelError(f"{culprit.text}; {here}")
        others = self._others(group, f"{what} over the group {group}")
        if timed_out:
            return ParallelError(
                f"{what} over the group {group} took longer than its timeout on rank {self.rank}: {others}; every rank "
                "makes the same calls, and ParallelConfig.timeout_seconds is how long one may wait for another"
            )
        return ParallelError(
            f"{what} over the group {group} failed on rank {self.rank}: {str(error).splitlines()[0]} ({others})"
        )

    def refuse(self, what: str, group: Group) -> ParallelError:
        """The error of a collective that must not begin, since a rank is gone: the ranks that are left are no longer in
        step, and gloo ends a process that is sent what it does not expect."""
        assert self.culprit is not None
        self._told = True
        return ParallelError(f"{self.culprit.text}; rank {self.rank} has not begun {what} over the group {group}")

    def find(self, patience: float = 0.0, group: Group | None = None, ended_too: bool = True) -> Culprit | None:
        """Who is to blame, looking for at most `patience` seconds: a rank that is gone, even one that ended well if
        `ended_too`. Of a group, one that gave up ends the search."""
        until = time.monotonic() + patience
        while True:
            if self._read_culprit() is None:
                self._look_around(ended_too)
            gave_up = group is not None and any(GAVE_UP in text for text in self._waiting(group).values())
            if self.culprit is not None or gave_up or time.monotonic() >= until:
                return self.culprit
            time.sleep(0.05)

    # ---- the thread ----

    def _run(self) -> None:
        while not self._stopped.wait(TICK_SECONDS):
            self.tick(time.monotonic())

    def tick(self, now: float) -> None:
        """Looks once; ends the process when its main thread has had its time."""
        call = self.call
        blocked = 0.0 if call is None else now - call[2]
        self._show(f"{call[0]} over the group {call[1]}" if call is not None and blocked > BLOCKED_SECONDS else "")
        if self._read_culprit() is None:
            lost = self._store_lost is not None
            if not lost or blocked > BLOCKED_SECONDS:  # without the store who has ended well is not known
                self._look_around(ended_too=lost)
            if lost and blocked > BLOCKED_SECONDS and now - (self._store_lost or now) > SILENT_SECONDS:
                self._accuse(0, f"the store of the ranks, which {self._keeper} keeps, does not answer any more")
        if now >= self._next_beat and self._remote:
            self._next_beat = now + BEAT_SECONDS
            self._exchange_beats(now)
        if self.culprit is not None:
            self._deadline = self._deadline or now + GRACE_SECONDS
            if now >= self._deadline:
                self._end()

    def _look_around(self, ended_too: bool) -> None:
        """Accuses a process of this machine that is gone."""
        for process in self._neighbours:
            if process.is_running():
                continue
            ended = self._get(f"left/{process.rank}")
            if not ended:
                self._accuse(process.rank, f"{process} died")
            elif ended_too:
                self._accuse(process.rank, f"{process} {ended} while others were in need of it")
            if self.culprit is not None:
                return

    def _exchange_beats(self, now: float) -> None:
        if self._beats_for_all:
            self._count += 1
            self._set(f"beat/{self.rank}", str(self._count))
        for process in self._remote:
            beat = self._get(f"beat/{process.rank}")
            if beat is None:
                self._beats.clear()  # the store does not answer: nobody else is to blame for that
                return
            count, since = self._beats.get(process.rank, (None, now))
            if beat != count:
                self._beats[process.rank] = (beat, now)
            elif now - since > SILENT_SECONDS and self._get(f"left/{process.rank}") == "":
                self._accuse(process.rank, f"{process} has not been heard of for {now - since:.0f} s")

    def _end(self) -> None:
        assert self.culprit is not None
        if not self._told:
            call = self.call
            here = f"was in {call[0]} over the group {call[1]}" if call else "was at work"
            os.write(2, f"error: {self.culprit.text}; rank {self.rank} {here} and is ended\n".encode())
        flushing = threading.Thread(target=_flush, daemon=True)  # the main thread may hold the streams' locks
        flushing.start()
        flushing.join(1.0)
        self.exit(1)

    # ---- the store ----

    def _ask(self, question: Callable[[dist.Store], T]) -> T | None:
        """The store's answer, or None when it does not answer."""
        try:
            answer = question(self._store)
        except RuntimeError as error:
            if self._store_lost is None:
                self._store_lost = time.monotonic()
                logger.debug("the store of the ranks does not answer: %s", error)
            return None
        self._store_lost = None
        return answer

    def _get(self, key: str) -> str | None:
        """What is written there, "" when nothing is, None when the store does not answer."""
        return self._ask(lambda store: store.get(key).decode() if store.check([key]) else "")

    def _set(self, key: str, value: str) -> None:
        self._ask(lambda store: store.set(key, value))

    def _accuse(self, rank: int, text: str) -> None:
        """Writes down who is to blame, unless another was written down before."""
        mine = Culprit(rank, text)
        first = self._ask(lambda store: store.compare_set("culprit", "", msgspec.json.encode(mine).decode()))
        with self._lock:
            self.culprit = self.culprit or (msgspec.json.decode(first, type=Culprit) if first else mine)

    def _read_culprit(self) -> Culprit | None:
        if self.culprit is None:
            found = self._get("culprit")
            if found:
                with self._lock:
                    self.culprit = self.culprit or msgspec.json.decode(found, type=Culprit)
        return self.culprit

    def _show(self, text: str) -> None:
        if text != self._shown and not (self._shown.startswith(GAVE_UP) and not text):
            self._shown = text
            self._set(f"waiting/{self.rank}", text)

    def _waiting(self, group: Group) -> dict[int, str]:
        """What the other ranks of a group show of where they are."""
        return {rank: self._get(f"waiting/{rank}") or "" for rank in group.ranks if rank != self.rank}

    def _others(self, group: Group, here: str) -> str:
        texts = []
        for rank, text in self._waiting(group).items():
            if text.startswith(GAVE_UP):
                texts.append(f"rank {rank} {text}")
            elif not text.endswith(here):
                texts.append(f"rank {rank} " + (f"is in {text}" if text else "is in no collective"))
        return ", ".join(texts) or "all of its ranks are in it"

    # ---- signals ----

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM, where the program has no handler of its own. torchrun sends it to the ranks that are left when one
        has died: then that one is named, else the process ends as it would have."""
        culprit = self.find(ended_too=False)
        if culprit is not None:
            self._end()
        self._set(f"left/{self.rank}", "was ended by SIGTERM")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


_current: Watchdog | None = None  # a process is one rank, and has one


def watchdog() -> Watchdog | None:
    """This process's; None as long as it is alone."""
    return _current


def watch(store: dist.Store, processes: Sequence[Process], rank: int, keeper: str) -> Watchdog:
    """Starts this process's watchdog; one of an earlier world stops."""
    global _current
    if _current is not None:
        _current.stop()
    _current = Watchdog(store, processes, rank, keeper)
    _current.start()
    return _current


def report_failure(error: BaseException) -> None:
    """Tells the other ranks, if there are any, that this one is about to end because of `error`: they end too, and name
    it. An exception that nothing catches is reported without this."""
    if _current is not None:
        _current.report(error)


def _state(pid: int) -> tuple[str, int] | None:
    """The state letter and start time of a process of this machine; None when there is none."""
    text = _read(f"/proc/{pid}/stat")
    if not text:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return fields[0], int(fields[19])


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _flush() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
