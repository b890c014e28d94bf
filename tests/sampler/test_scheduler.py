"""What a step is made of: decodes first, prompts in chunks under the budget, pages given and taken back."""

import numpy as np

from engine.sampler.kv_cache import KVCache
from engine.sampler.request import Sequence
from engine.sampler.scheduler import Scheduler, Step
from engine.sampler.slots import Slots
from engine.types import SamplingParams


def make(num_pages: int = 32, budget: int = 64, max_seqs: int = 8) -> Scheduler:
    cache = KVCache(num_pages, 16)
    return Scheduler(cache, Slots(max_seqs, num_pages), budget, max_seqs)


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
