"""What a program on top of the engine sees of the ranks."""

from __future__ import annotations

from typing import Any

import pytest

from engine import ConfigError, EngineError, Ranks, is_main_rank
from tests.parallel.pool import Pool


def of_each() -> tuple[int, int, bool, list[str], list[bool]]:
    ranks = Ranks.join()
    return (
        ranks.index,
        ranks.count,
        is_main_rank(),
        ranks.gather(f"rank {ranks.index}"),
        [ranks.any(False), ranks.any(ranks.index == 1)],
    )


def test_each_rank_knows_its_place_and_what_the_others_tell(pool2: Pool) -> None:
    words = ["rank 0", "rank 1"]
    assert pool2.run(of_each) == [(0, 2, True, words, [False, True]), (1, 2, False, words, [False, True])]


def work_once(kind: type[BaseException] | None) -> tuple[Any, int]:
    ranks, calls = Ranks.join(), []

    def work() -> str:
        calls.append(1)
        if kind is not None:
            raise kind("no space")
        return "done"

    try:
        return ranks.once(work), len(calls)
    except BaseException as error:
        return (type(error), str(error)), len(calls)


def test_what_is_done_once_is_done_on_rank_0_and_known_to_all(pool2: Pool) -> None:
    assert pool2.run(work_once, None) == [("done", 1), ("done", 0)]


@pytest.mark.parametrize("kind", [ConfigError, EngineError])
def test_an_error_of_what_is_done_once_is_raised_by_all(pool2: Pool, kind: type[EngineError]) -> None:
    assert pool2.run(work_once, kind) == [((kind, "no space"), 1), ((kind, "no space"), 0)]


def test_a_foreign_error_is_an_engine_error_elsewhere(pool2: Pool) -> None:
    first, second = pool2.run(work_once, OSError)
    assert first == ((OSError, "no space"), 1)
    assert second == ((EngineError, "on rank 0: OSError: no space"), 0)


def test_an_interrupt_reaches_all(pool2: Pool) -> None:
    assert [result[0][0] for result in pool2.run(work_once, KeyboardInterrupt)] == [KeyboardInterrupt] * 2


def test_a_world_of_one_needs_no_connection() -> None:
    ranks = Ranks.join()
    assert (ranks.index, ranks.count, ranks.gather(7), ranks.any(True)) == (0, 1, [7], True)
    with pytest.raises(OSError, match="no space"):
        ranks.once(lambda: (_ for _ in ()).throw(OSError("no space")))
