"""Ranks to run tests on: worker processes that are connected once and live for the whole session.

    def shares(mesh_config, x):            # a module-level function: the workers import it by name
        mesh = make_mesh(mesh_config)
        ...
        return result

    def test_something(pool2):
        first, second = pool2.run(shares, ParallelConfig(tp=2), x)

The workers are forked from a server that has imported torch and the engine already, so a pool starts in a moment, and
starts again after a test that left it in disorder.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import ParallelError
from engine.parallel.launch import backend

PRELOADED = ["torch", "torch.distributed", "tests.parallel.pool", "engine.engine"]
GRACE_SECONDS = 3.0  # for the other ranks to answer once one has failed

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


class WorkerDied(Exception):
    """A worker process ended in the middle of a call."""


class Hang(Exception):
    """A call that did not end in time, with the stack of every rank."""


class Pool:
    """`size` ranks in one gloo world, one thread each. `run` starts them when they are not running."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []
        self._store: dist.TCPStore | None = None
        self._stacks = tempfile.TemporaryDirectory(prefix="pool-stacks-")

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """`function(*args, **kwargs)` on every rank at once; the results in rank order.

        An exception on a rank is raised here, with its rank and its traceback as a note; of several, one that is no
        ParallelError, which tells of the failure of another. Raises WorkerDied, and Hang after `timeout` seconds. The
        pool starts afresh after a call that did not end alike on all ranks.
        """
        self.start()
        call = pickle.dumps((function, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        answers, silent = self._collect(timeout)
        errors = {rank: content for rank, (kind, content) in answers.items() if kind == "error"}
        if not errors and not silent:
            return [answers[rank][1] for rank in range(self.size)]
        dead = {rank: code for rank in silent if (code := self._exit_code(rank)) is not None}
        stacks = self._dump(silent - dead.keys())
        if silent or len(errors) < self.size:
            self.close()
        if errors:
            raise self._combined(errors, silent, dead, stacks)
        if dead:
            raise WorkerDied(f"{_list(dead)} while running {function.__name__}{stacks}")
        raise Hang(f"{function.__name__} did not end on ranks {sorted(silent)} in {timeout:g} s{stacks}")

    def start(self) -> None:
        """Starts the workers, if they are not running."""
        if self._workers:
            return
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            arguments = (theirs, rank, self.size, self._store.port, str(self._stack_file(rank)))
            worker = context.Process(target=_work, args=arguments, name=f"rank {rank} of {self.size}", daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(mine)

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        self._workers, self._pipes, self._store = [], [], None

    def pids(self) -> list[int]:
        """The workers' process ids, in rank order."""
        return [worker.pid for worker in self._workers]

    def _collect(self, timeout: float) -> tuple[dict[int, tuple[str, Any]], set[int]]:
        """Answers by rank until all are there, time is up, or a failure leaves the others no more time; and the ranks
        that have not answered."""
        answers: dict[int, tuple[str, Any]] = {}
        silent = set(range(self.size))
        living = set(silent)
        deadline = time.monotonic() + timeout
        while living:
            ready = wait([self._pipes[rank] for rank in living], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank in living if self._pipes[rank] in ready]:
                living.remove(rank)
                try:
                    answers[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                    silent.remove(rank)
                except EOFError:
                    pass  # it died: `silent` keeps it
                if rank in silent or answers[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers, silent

    def _combined(self, errors: dict[int, Any], silent: set[int], dead: dict[int, int], stacks: str) -> BaseException:
        first = min(errors, key=lambda rank: (isinstance(errors[rank][0], ParallelError), rank))
        error: BaseException = errors[first][0]
        for rank in sorted(errors, key=lambda rank: rank != first):
            error.add_note(f"on rank {rank}:\n{errors[rank][1]}")
        if dead:
            error.add_note(_list(dead))
        if silent - dead.keys():
            error.add_note(f"ranks {sorted(silent - dead.keys())} did not answer{stacks}")
        return error

    def _exit_code(self, rank: int) -> int | None:
        self._workers[rank].join(0.2 if self._pipes[rank].poll() else 0)
        return self._workers[rank].exitcode

    def _dump(self, ranks: set[int]) -> str:
        """The stacks of these ranks, as text."""
        for rank in ranks:
            os.kill(self._workers[rank].pid, signal.SIGUSR1)
        text = ""
        for rank in sorted(ranks):
            until = time.monotonic() + 5.0
            stack, before = self._stack_file(rank).read_text(), ""
            while (not stack.endswith("\n") or stack != before) and time.monotonic() < until:  # written by lines
                time.sleep(0.1)
                stack, before = self._stack_file(rank).read_text(), stack
            text += f"\nrank {rank}:\n{stack}"
        return text

    def _stack_file(self, rank: int) -> Path:
        return Path(self._stacks.name) / f"rank-{rank}.txt"


def _work(pipe: Connection, rank: int, size: int, port: int, stack_file: str) -> None:
    """A worker: joins the world, then answers calls until its pipe is closed."""
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        _one_thread()
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        if torch.cuda.device_count() >= size:  # each rank has one to itself, and NCCL connects them
            os.environ["LOCAL_RANK"] = str(rank)
        dist.init_process_group(backend(), store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
        gc.freeze()  # what has been imported stays: collecting after a call looks at the call's objects only
        while True:
            try:
                call = pipe.recv_bytes()
            except EOFError:
                os._exit(0)  # the session is over; leave without waiting for the other ranks
            pipe.send_bytes(_answer(call))
            _clean_up()


def _answer(call: bytes) -> bytes:
    try:
        function, args, kwargs = pickle.loads(call)
        return pickle.dumps(("result", function(*args, **kwargs)))
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            answer = pickle.dumps(("error", (error.with_traceback(None), trace)))
            pickle.loads(answer)
        except Exception:  # an exception whose arguments do not travel: its text does
            answer = pickle.dumps(("error", (RuntimeError(f"{type(error).__name__}: {error}"), trace)))
        return answer


def _clean_up() -> None:
    """Lets go of what the call made: engines, and the groups of meshes that were not closed."""
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    _one_thread()


def _one_thread() -> None:
    from engine.kernels.op import cpu_missing, extension

    torch.set_num_threads(1)
    if not cpu_missing():
        extension().set_num_threads(1)


def _list(dead: dict[int, int]) -> str:
    return ", ".join(f"rank {rank} died (exit code {code})" for rank, code in sorted(dead.items()))
