"""How torchrun's processes find one another, again after each restart: all that is read of its protocol."""

from __future__ import annotations

import atexit
import os
import secrets
import time
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from engine.config import ParallelConfig
from engine.errors import ParallelError
from engine.parallel.collectives import Group, named
from engine.parallel.failure import Process, watch, watchdog

MEETING_SECONDS = 300.0  # from the first rank's start to the last one's
_times_restarted = 0


def launched() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def world_size() -> int:
    """How many ranks there are, connected or not."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def is_main_rank() -> bool:
    """Whether this process speaks for all ranks: it prints, and writes the files that are written once. Connects
    nothing."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return not launched() or int(os.environ["RANK"]) == 0


def ranks_on_this_machine() -> int:
    """How many ranks torchrun started here; they share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1


def local_rank() -> int:
    """The number of this rank on its machine: LOCAL_RANK, which torchrun sets, and whoever starts ranks otherwise."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def times_restarted() -> int:
    """How often torchrun has started the ranks again, after a rank died or machines came or went (`--max-restarts`,
    `--nnodes=1:4`); the same number on every rank. Above 0 a run goes on from its last saved state instead of from the
    beginning. Connects the ranks, so every one of them calls it. Raises ParallelError."""
    if not launched():
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    connect(timedelta(seconds=ParallelConfig().timeout_seconds))
    return _times_restarted


def connect(timeout: timedelta) -> None:
    """Connects the ranks, if torchrun started them and they are not connected, and sets the watchdogs. Raises
    ParallelError, naming the ranks that do not come."""
    global _times_restarted
    if dist.is_initialized():
        _watch_connected()
        return
    if not launched():
        return
    meeting = timedelta(seconds=MEETING_SECONDS)
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=meeting)))
        store, processes = meet(store, rank, size, MEETING_SECONDS)
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        keeper = f"torchrun's agent on {os.environ['MASTER_ADDR']}" if agent else str(processes[0])
        dog = watch(dist.PrefixStore("watchdog", _own_connection(store)), processes, rank, keeper)
        with named("connecting", Group("world", tuple(range(size)), rank)):
            dist.init_process_group(backend(), store=store, rank=rank, world_size=size, timeout=timeout)
    except RuntimeError as error:
        raise ParallelError(f"the ranks cannot connect ({error}); look at torchrun's rendezvous") from error
    dog.world = dist.group.WORLD
    _times_restarted = max(process.restarts for process in processes)
    atexit.register(_leave)


def meet(store: dist.Store, rank: int, size: int, seconds: float) -> tuple[dist.Store, list[Process]]:
    """A part of the store for this start of the ranks alone, and the processes of all.

    torchrun's agent keeps one store over all restarts, with what earlier starts left in it, and on several machines the
    agents count restarts differently; gloo would take the addresses of dead processes for those of living ones. So rank
    0 draws a name for this start. The others ask for it with a word that is new, since there may be an old answer.
    """
    until = time.monotonic() + seconds
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if rank == 0:
        start = secrets.token_hex(8)
        restarts = max(restarts, store.add("meet/starts", 1) - 1)
    else:
        start = _ask_for_start(store, rank, until)
    own = dist.PrefixStore(start, store)
    own.set(f"process/{rank}", msgspec.json.encode(Process.here(rank, restarts)).decode())
    keys = [f"process/{each}" for each in range(size)]
    while not own.check(keys):
        if rank == 0:
            for asking in range(1, size):
                if store.check([f"meet/question/{asking}"]):
                    word = store.get(f"meet/question/{asking}").decode()
                    store.set(f"meet/answer/{asking}", f"{word} {start}")
        if time.monotonic() > until:
            missing = [each for each in range(size) if not own.check([keys[each]])]
            raise ParallelError(
                f"ranks {', '.join(map(str, missing))} have not come within {seconds:g} s; look at their machines' logs"
            )
        time.sleep(0.02)
    return own, [msgspec.json.decode(text, type=Process) for text in own.multi_get(keys)]


def _ask_for_start(store: dist.Store, rank: int, until: float) -> str:
    word = secrets.token_hex(8)
    store.set(f"meet/question/{rank}", word)
    while True:
        if store.check([f"meet/answer/{rank}"]):
            asked, _, start = store.get(f"meet/answer/{rank}").decode().partition(" ")
            if asked == word:
                return start
        if time.monotonic() > until:
            raise ParallelError("rank 0 does not answer; look at the log of its machine")
        time.sleep(0.02)


def _watch_connected() -> None:
    """Sets the watchdog of ranks that were connected by the program itself."""
    world = dist.group.WORLD
    dog = watchdog()
    if dist.get_world_size() == 1 or (dog is not None and dog.world is world):
        return
    assert world is not None
    store = dist.PrefixStore("watchdog", _own_connection(world.get_group_store()))
    keys = [f"process/{each}" for each in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], msgspec.json.encode(Process.here(dist.get_rank())).decode())
    try:
        store.wait(keys, timedelta(seconds=MEETING_SECONDS))
    except RuntimeError as error:
        raise ParallelError(f"not every rank makes a mesh: {str(error).splitlines()[0]}") from error
    processes = [msgspec.json.decode(text, type=Process) for text in store.multi_get(keys)]
    watch(store, processes, dist.get_rank(), str(processes[0]))
    atexit.register(_leave)


def _own_connection(store: dist.Store) -> dist.Store:
    """One that another thread may use while this one waits for an answer."""
    return store.clone()  # type: ignore[attr-defined]


def backend() -> str:
    """gloo for what lies on the CPU, all messages that are no tensors included, and NCCL for what lies on a GPU."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def connects_gpus() -> bool:
    """Whether tensors in the memory of GPUs can travel between the connected ranks."""
    return dist.is_initialized() and "cuda:nccl" in dist.get_backend_config()


def _leave() -> None:
    dog = watchdog()
    if dog is not None:
        dog.leave()
    if dist.is_initialized():
        dist.destroy_process_group()
