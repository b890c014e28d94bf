"""What one watchdog concludes from the processes of its machine and from the store, with time told to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from engine.config import ParallelConfig
from engine.errors import ParallelError
from engine.parallel import failure
from engine.parallel.collectives import Group, all_gather_object, all_reduce
from engine.parallel.failure import BEAT_SECONDS, GRACE_SECONDS, SILENT_SECONDS, Process, Watchdog
from engine.parallel.launch import meet
from engine.parallel.mesh import make_mesh
from tests.parallel.pool import Pool


@pytest.fixture
def neighbour() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def process_of(pid: int, rank: int) -> Process:
    state = failure._state(pid)
    assert state is not None
    here = Process.here(rank)
    return Process(rank, here.host, here.machine, pid, state[1])


def far(rank: int, machine: str) -> Process:
    return Process(rank, machine, machine, 1000 + rank, 5)


def dogs(processes: list[Process], *ranks: int) -> list[Watchdog]:
    store = dist.HashStore()
    return [Watchdog(store, processes, rank, "the test") for rank in ranks]


def text_of(dog: Watchdog) -> str:
    return "" if dog.culprit is None else dog.culprit.text


def test_process_that_was_killed_is_not_running(neighbour: subprocess.Popen[bytes]) -> None:
    process = process_of(neighbour.pid, 1)
    assert process.is_running()
    neighbour.kill()
    until = time.monotonic() + 5
    while process.is_running() and time.monotonic() < until:  # it stays a zombie until its parent asks for it
        time.sleep(0.01)
    assert not process.is_running()
    neighbour.wait()
    assert not process.is_running()


def test_number_that_is_used_again_is_another_process() -> None:
    here = Process.here(0)
    assert here.is_running()
    assert not Process(0, here.host, here.machine, here.pid, here.started - 1).is_running()


def test_dead_neighbour_is_found_within_a_tick(neighbour: subprocess.Popen[bytes]) -> None:
    (dog,) = dogs([Process.here(0), process_of(neighbour.pid, 1)], 0)
    dog.tick(0.0)
    assert dog.culprit is None
    neighbour.kill()
    neighbour.wait()
    dog.tick(0.5)
    assert text_of(dog) == f"rank 1 (host {Process.here(0).host}, pid {neighbour.pid}) died"


def test_main_thread_that_does_not_come_out_is_ended_after_its_grace(capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    first, second = dogs([Process.here(0), Process.here(1)], 0, 1)
    first.exit = ended.append
    second.report(KeyError("x"))
    first.call = ("receive", Group("pp", (0, 1)), 0.0)
    first.tick(100.0)
    first.tick(100.0 + GRACE_SECONDS - 0.1)
    assert not ended
    first.tick(100.0 + GRACE_SECONDS)
    assert ended == [1]
    assert capfd.readouterr().err == (
        f"error: {Process.here(1)} failed: KeyError: 'x'; rank 0 was in receive over the group pp (ranks 0, 1) and is "
        "ended\n"
    )


def test_all_ranks_name_the_one_that_was_found_first(neighbour: subprocess.Popen[bytes]) -> None:
    dead = process_of(neighbour.pid, 1)
    here = Process.here(0)
    also_dead = Process(2, here.host, here.machine, here.pid, here.started - 1)
    first, second = dogs([here, dead, also_dead, Process.here(3)], 0, 3)
    neighbour.kill()
    neighbour.wait()
    second.find()
    first.find()
    assert text_of(first) == text_of(second) and "rank 1 " in text_of(first)


def test_exception_that_ends_a_rank_is_told_to_the_others() -> None:
    first, second = dogs([Process.here(0), Process.here(1)], 0, 1)
    second.report(OSError("No space left on device"))
    first.tick(0.0)
    assert text_of(first) == f"{Process.here(1)} failed: OSError: No space left on device"


def test_thread_has_ended_when_its_rank_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the store is slow: a thread that was in it would have the interpreter abort at its end."""
    asked = threading.Event()

    class SlowStore(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            asked.set()
            time.sleep(0.3)
            return super().check(keys)

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # what `start` sets is taken back
    before, others = signal.getsignal(signal.SIGTERM), set(threading.enumerate())
    dog = Watchdog(SlowStore(), [Process.here(0)], 0, "the test")
    dog.start()
    try:
        assert asked.wait(5)
        dog.leave()
        assert set(threading.enumerate()) <= others
    finally:
        signal.signal(signal.SIGTERM, before)


def test_rank_that_ended_well_is_no_failure_until_it_is_needed(neighbour: subprocess.Popen[bytes]) -> None:
    first, second = dogs([Process.here(0), process_of(neighbour.pid, 1)], 0, 1)
    second.leave()
    neighbour.kill()
    neighbour.wait()
    first.tick(0.0)
    assert first.culprit is None
    error = first.explain("all_reduce", Group("tp", (0, 1)), RuntimeError("Connection closed by peer"))
    assert str(error).endswith(
        "has ended while others were in need of it; rank 0 was in all_reduce over the group tp (ranks 0, 1)"
    )


def test_no_collective_begins_after_a_rank_is_gone(pool2: Pool) -> None:
    """The ranks that are left are out of step: gloo would abort one that gets the bytes of another's collective."""
    assert "has not begun all_reduce over the group tp (ranks 0, 1)" in pool2.run(begin_after_a_death)[0]
    pool2.close()


def test_machine_that_falls_silent_is_found_by_its_first_rank() -> None:
    processes = [Process.here(0), far(1, "b"), far(2, "c")]
    near, remote, third = dogs(processes, 0, 1, 2)
    now = 0.0
    while now < 30:
        remote.tick(now)
        third.tick(now)
        near.tick(now + 0.1)
        now += BEAT_SECONDS
    assert near.culprit is None
    last = now - BEAT_SECONDS
    while near.culprit is None and now < 90:
        third.tick(now)
        near.tick(now)
        now += 0.5
    assert "rank 1 (host b, pid 1001) has not been heard of for" in text_of(near)
    assert SILENT_SECONDS < now - last < SILENT_SECONDS + 2 * BEAT_SECONDS + 1


def test_machine_whose_rank_ended_well_may_fall_silent() -> None:
    near, remote = dogs([Process.here(0), far(1, "b")], 0, 1)
    for step in range(3):
        remote.tick(step * BEAT_SECONDS)
        near.tick(step * BEAT_SECONDS)
    remote.leave()
    for step in range(3, 40):
        near.tick(step * BEAT_SECONDS)
    assert near.culprit is None


def test_store_that_is_gone_ends_only_those_that_wait() -> None:
    class Gone:
        def __getattr__(self, name: str) -> object:
            def lost(*arguments: object) -> None:
                raise dist.DistNetworkError("Broken pipe")

            return (lambda timeout: None) if name == "set_timeout" else lost

    dog = Watchdog(Gone(), [Process.here(0), far(1, "b")], 0, "torchrun's agent on a")  # type: ignore[arg-type]
    now = time.monotonic()
    for step in range(60):
        dog.tick(now + step)
    assert dog.culprit is None
    dog.call = ("all_reduce", Group("tp", (0, 1)), now)
    dog.tick(now + 60)
    assert text_of(dog) == "the store of the ranks, which torchrun's agent on a keeps, does not answer any more"


def test_timeout_names_the_ranks_that_did_not_come() -> None:
    processes = [Process.here(rank) for rank in range(3)]
    first, second, _ = dogs(processes, 0, 1, 2)
    group, other = Group("dp", (0, 1, 2)), Group("tp", (1, 2))
    now = time.monotonic()
    second.call = ("send", other, now)
    second.tick(now + 5)
    error = first.explain("all_reduce", group, RuntimeError("Timed out waiting 500ms for recv"))
    assert "all_reduce over the group dp (ranks 0, 1, 2) took longer than its timeout on rank 0" in str(error)
    assert "rank 1 is in send over the group tp (ranks 1, 2), rank 2 is in no collective" in str(error)
    assert "ParallelConfig.timeout_seconds" in str(error)
    told = second.explain("all_reduce", group, RuntimeError("Connection closed by peer"))
    assert "rank 0 gave up after a timeout in all_reduce over the group dp" in str(told)


def meet_with(store: dist.Store, rank: int, size: int, found: dict[int, list[Process]]) -> None:
    own, processes = meet(store, rank, size, 10.0)
    own.set(f"seen/{rank}", "yes")
    found[rank] = processes
    own.wait([f"seen/{each}" for each in range(size)])


def test_a_restart_does_not_read_what_an_earlier_start_left() -> None:
    store = dist.HashStore()
    for start, size in enumerate((3, 3, 2)):  # the last start with a rank fewer
        found: dict[int, list[Process]] = {}
        threads = [threading.Thread(target=meet_with, args=(store, rank, size, found)) for rank in range(size)]
        for thread in reversed(threads):
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(found) == list(range(size))
        for processes in found.values():
            assert [(p.rank, p.pid) for p in processes] == [(rank, os.getpid()) for rank in range(size)]
            assert max(p.restarts for p in processes) == start


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(ParallelError, match=r"ranks 1, 2 have not come within 0.1 s"):
        meet(dist.HashStore(), 0, 3, 0.1)
    with pytest.raises(ParallelError, match=r"rank 0 does not answer"):
        meet(dist.HashStore(), 1, 3, 0.1)


# ---- on ranks ----


def begin_after_a_death() -> str:
    mesh = make_mesh(ParallelConfig(tp=2))
    all_reduce(torch.ones(3), mesh.tp)  # both have made it
    dog = failure.watchdog()
    assert dog is not None
    dog.stop()
    dog.report(KeyError("a planted failure"))
    with pytest.raises(ParallelError) as caught:
        all_reduce(torch.ones(3), mesh.tp)
    return str(caught.value)


def error_of_rank_0() -> str:
    mesh = make_mesh(ParallelConfig(tp=2, timeout_seconds=60))
    if mesh.rank == 1:
        os.kill(os.getpid(), 9)
    with pytest.raises(ParallelError) as caught:
        all_gather_object(mesh.rank, mesh.tp)
    raise RuntimeError(str(caught.value))


def test_collective_with_a_killed_rank_names_it(pool2: Pool) -> None:
    pool2.start()
    pid = pool2.pids()[1]
    with pytest.raises(RuntimeError) as caught:
        pool2.run(error_of_rank_0)
    assert f"pid {pid}) died; rank 0 was in all_gather_object over the group tp (ranks 0, 1)" in str(caught.value)
