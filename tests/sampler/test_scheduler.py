"""What a step is made of: decodes first, prompts in chunks under the budget, pages given and taken back."""

from collections import deque

import numpy as np
import pytest

from engine.sampler.kv_cache import KVCache
from engine.sampler.request import Sequence
from engine.sampler.scheduler import Scheduler, Step
from engine.sampler.slots import Slots
from engine.types import SamplingParams


def make(num_pages: int = 32, budget: int = 64, max_seqs: int = 8, depth: int = 1) -> Scheduler:
    cache = KVCache(num_pages, 16)
    return Scheduler(cache, Slots(max_seqs, num_pages), budget, max_seqs, depth)


def sequence(length: int, n: int = 1, first: int = 0, max_tokens: int = 100) -> Sequence:
    prompt = np.arange(first, first + length, dtype=np.int32)
    params = SamplingParams(n=n, max_tokens=max_tokens)
    family = [Sequence(0, 0, i, params, prompt, seed=i, max_length=length + max_tokens) for i in range(n)]
    family[0].siblings = family[1:]
    return family[0]


def play(scheduler: Scheduler) -> Step:
    """One step whose every sampled token is 1."""
    step = scheduler.next_step()
    assert step is not None
    scheduler.computed(step)
    if count := len(step.sample_slots):
        zeros = np.zeros(count, np.float32)
        scheduler.slots.append(step.sample_slots, np.ones(count, np.int32), zeros, zeros)
    return step


def test_a_long_prompt_is_prefilled_in_chunks_of_the_budget():
    scheduler = make(budget=24)
    scheduler.waiting.append(sequence(60))
    steps = [play(scheduler) for _ in range(4)]
    assert [s.num_tokens for s in steps] == [24, 24, 12, 1]
    assert [len(s.sample_slots) for s in steps] == [0, 0, 1, 1]


def test_decodes_come_before_prompts_and_share_the_step():
    scheduler = make(budget=24)
    scheduler.waiting.append(sequence(5))
    play(scheduler)
    scheduler.waiting.append(sequence(60, first=100))
    step = play(scheduler)
    assert step.num_new.tolist() == [1, 23]
    assert step.num_decode == 1


def test_siblings_share_full_pages_and_copy_the_partly_filled_one():
    scheduler = make()
    scheduler.waiting.append(sequence(20, n=3))
    step = play(scheduler)
    assert step.num_tokens == 20
    assert len(step.sample_slots) == 3
    assert set(step.sample_rows.tolist()) == {19}
    tables = scheduler.slots.block_tables[scheduler.slots.order, :2]
    assert len(set(tables[:, 0])) == 1
    assert len(set(tables[:, 1])) == 3
    assert {source for source, _ in step.copies} == {int(tables[0, 1])}
    assert scheduler.cache.num_free == 32 - 4


def test_siblings_stand_side_by_side():
    scheduler = make()
    scheduler.waiting.extend([sequence(20, n=2), sequence(20, n=2, first=50)])
    play(scheduler)
    prompts = [int(scheduler.slots.tokens[slot, 0]) for slot in scheduler.slots.order]
    assert prompts == [0, 0, 50, 50]


def test_siblings_without_a_slot_wait_and_run_later():
    scheduler = make(max_seqs=2)
    scheduler.waiting.append(sequence(20, n=5))
    play(scheduler)
    assert len(scheduler.slots.order) == 2
    assert len(scheduler.waiting) == 1
    assert len(scheduler.waiting[0].siblings) == 2


def test_the_youngest_is_preempted_and_nothing_is_lost():
    scheduler = make(num_pages=5)
    scheduler.waiting.extend([sequence(30), sequence(30, first=100)])
    play(scheduler)
    assert len(scheduler.slots.order) == 2
    oldest = scheduler.slots.order[0]
    for _ in range(3):
        play(scheduler)
    assert scheduler.slots.order == [oldest]
    assert scheduler.num_preemptions == 1
    assert scheduler.waiting[0].tokens[:30].tolist() == list(range(100, 130))
    assert len(scheduler.waiting[0].tokens) > 30
    held = int(scheduler.slots.num_pages[oldest])
    assert scheduler.cache.num_free == 5 - held


def test_every_page_comes_back_when_all_are_finished():
    scheduler = make()
    scheduler.waiting.extend([sequence(20, n=3), sequence(33, n=2, first=60)])
    for _ in range(4):
        play(scheduler)
    for slot in list(scheduler.slots.order):
        scheduler.finish(slot)
    assert scheduler.cache.num_free == 32
    assert scheduler.slots.num_free == 8


def test_nothing_to_run_gives_none():
    assert make().next_step() is None


def pipelined(scheduler: Scheduler, depth: int) -> list[Step | None]:
    """All steps until nothing is left, the results of each taken in when `depth - 1` more have started."""
    slots, steps = scheduler.slots, []
    under_way: deque[Step | None] = deque()
    while True:
        step = scheduler.next_step()
        if step is None and not any(under_way):
            return steps
        steps.append(step)
        under_way.append(step)
        if step is not None:
            scheduler.computed(step)
        if len(under_way) < depth or (done := under_way.popleft()) is None:
            continue
        here = slots.tenancy[done.sample_slots] == done.tenancy
        sampled = done.sample_slots[here]
        if len(sampled):
            zeros = np.zeros(len(sampled), np.float32)
            slots.append(sampled, np.ones(len(sampled), np.int32), zeros, zeros)
        for slot in sampled[slots.length[sampled] >= slots.max_length[sampled]].tolist():
            scheduler.finish(slot)


def idle_share(steps: list[Step | None], stages: int) -> float:
    """Of the time of all stages, on a clock where a step takes each stage a fixed time and some for each token, and
    can begin when the results of the step `stages` before it are known."""
    ends = [[0.0] * stages for _ in range(stages)]  # of the steps before, the latest last
    busy = 0.0
    for step in steps:
        cost = 0.0 if step is None else 4.0 + step.num_tokens
        at = max(ends[-stages][-1], ends[-1][0])
        row = []
        for stage in range(stages):
            at = max(at, ends[-1][stage]) + cost
            row.append(at)
        ends.append(row)
        busy += cost * stages
    return 1.0 - busy / (stages * max(row[-1] for row in ends))


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_stages_of_a_pipeline_idle_less_than_a_twentieth_while_sequences_decode(stages: int) -> None:
    scheduler = make(num_pages=1024, budget=64, max_seqs=64, depth=stages)
    for index in range(64):
        scheduler.waiting.append(sequence(5 + index % 7, first=100 * index, max_tokens=100))
    assert idle_share(pipelined(scheduler, stages), stages) < 0.05


def test_steps_one_after_another_would_idle_all_stages_but_one() -> None:
    """The measure itself: without steps at once it shows what a pipeline without micro-batches is."""
    scheduler = make(num_pages=1024, budget=64, max_seqs=64, depth=1)
    scheduler.waiting.append(sequence(5, max_tokens=50))
    steps = [each for step in pipelined(scheduler, 1) for each in (step, None, None, None)]
    assert idle_share(steps, 4) == pytest.approx(0.75, abs=0.01)


def test_a_sequence_is_in_no_step_until_its_token_is_known() -> None:
    scheduler = make(depth=3)
    for index in range(5):
        scheduler.waiting.append(sequence(4, first=100 * index, max_tokens=20))
    steps = pipelined(scheduler, 3)
    for first, second in (pair for gap in (1, 2) for pair in zip(steps, steps[gap:], strict=False)):
        if first is not None and second is not None:
            assert not set(first.sample_slots.tolist()) & set(second.slots.tolist())


def test_running_sequences_take_turns_in_equal_shares() -> None:
    scheduler = make(depth=4)
    scheduler.waiting.append(sequence(4, n=8, max_tokens=40))
    sizes = [0 if step is None else step.num_decode for step in pipelined(scheduler, 4)]
    assert sizes[4:-8] == [2] * len(sizes[4:-8])


def test_a_sequence_that_is_preempted_while_its_token_is_drawn_draws_it_again() -> None:
    scheduler = make(num_pages=6, depth=2)
    for index in range(4):
        scheduler.waiting.append(sequence(10, first=100 * index, max_tokens=30))
    steps = pipelined(scheduler, 2)
    drawn = sum(len(step.sample_slots) for step in steps if step is not None)
    assert scheduler.num_preemptions > 0 and drawn > 4 * 30
    assert scheduler.cache.num_free == 6 and not scheduler.waiting
