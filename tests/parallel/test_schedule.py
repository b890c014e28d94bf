"""Pipeline schedules: everything that can be known of them from the lists, no process started.

# P ranks, V chunks of a rank, M micro-batches
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.parallel.schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRAD,
    WEIGHT_GRAD,
    Action,
    Costs,
    Kind,
    Schedule,
    bubble_fraction,
    check,
    peak_activations,
    schedule,
    simulate,
    transfers,
)

NAMES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
RANKS = (1, 2, 3, 4, 5, 8, 13, 16)
MICRO_BATCHES = (1, 2, 3, 7, 15, 16, 17, 31, 64)
GRID = list(product(RANKS, MICRO_BATCHES))


@st.composite
def plans(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(NAMES))
    chunks = draw(st.integers(2, 4)) if name == "interleaved" else 1
    return schedule(name, draw(st.integers(1, 16)), draw(st.integers(1, 64)), chunks)


def swapped(plan: Schedule, rank: int, first: int, second: int) -> Schedule:
    """The schedule with two actions of one rank in each other's place."""
    actions = list(plan.actions[rank])
    actions[first], actions[second] = actions[second], actions[first]
    return replace(plan, actions=(*plan.actions[:rank], tuple(actions), *plan.actions[rank + 1 :]))


def without(plan: Schedule, rank: int, index: int) -> Schedule:
    actions = (*plan.actions[rank][:index], *plan.actions[rank][index + 1 :])
    return replace(plan, actions=(*plan.actions[:rank], actions, *plan.actions[rank + 1 :]))


def one_f_one_b_bubble(num_stages: int, num_micro_batches: int) -> float:
    return (num_stages - 1) / (num_micro_batches + num_stages - 1)


# ---- the lists ----


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_micro_batch_passes_every_chunk_once_per_kind(plan: Schedule) -> None:
    cells = Counter((m, c) for m in range(plan.num_micro_batches) for c in range(plan.num_chunks))
    apart = plan.name == "zero_bubble"
    for actions in plan.actions:
        by_kind = {kind: Counter((a.micro_batch, a.chunk) for a in actions if a.kind is kind) for kind in Kind}
        assert by_kind[FORWARD] == cells
        assert by_kind[BACKWARD] == (Counter() if apart else cells)
        assert by_kind[INPUT_GRAD] == by_kind[WEIGHT_GRAD] == (cells if apart else Counter())


@settings(max_examples=60, deadline=None)
@given(plans())
def test_gradients_of_a_chunk_come_in_ascending_order(plan: Schedule) -> None:
    for actions, chunk, kind in product(plan.actions, range(plan.num_chunks), (INPUT_GRAD, WEIGHT_GRAD)):
        order = [a.micro_batch for a in actions if a.chunk == chunk and a.kind in (BACKWARD, kind)]
        assert order == list(range(plan.num_micro_batches))


@settings(max_examples=60, deadline=None)
@given(plans(), st.sampled_from([Costs(), Costs(1, 0.2, 3, 0.5), Costs(0.1, 2, 1, 4)]))
def test_no_schedule_deadlocks_whatever_actions_cost(plan: Schedule, costs: Costs) -> None:
    check(plan)
    simulation = simulate(plan, costs)
    assert [len(times) for times in simulation.end] == [len(actions) for actions in plan.actions]


@pytest.mark.parametrize("num_stages", range(1, 17))
def test_interleaved_runs_for_every_number_of_micro_batches(num_stages: int) -> None:
    """Groups of the wrong size deadlock only at some numbers, so every one up to two full groups more is tried."""
    for num_micro_batches in [*range(1, 3 * num_stages + 1), 64]:
        plan = schedule("interleaved", num_stages, num_micro_batches, 2)
        assert [len(ends) for ends in simulate(plan).end] == [len(actions) for actions in plan.actions]


def test_one_rank_alternates_forward_and_backward() -> None:
    expected = [action for m in range(3) for action in (Action(FORWARD, m), Action(BACKWARD, m))]
    assert list(schedule("1f1b", 1, 3).actions[0]) == expected


def test_1f1b_of_two_ranks_as_drawn_by_hand() -> None:
    first, second = schedule("1f1b", 2, 3).actions
    assert [(a.kind.value[0], a.micro_batch) for a in first] == [
        ("f", 0), ("f", 1), ("b", 0), ("f", 2), ("b", 1), ("b", 2),
    ]  # fmt: skip
    assert [(a.kind.value[0], a.micro_batch) for a in second] == [
        ("f", 0), ("b", 0), ("f", 1), ("b", 1), ("f", 2), ("b", 2),
    ]  # fmt: skip


# ---- bubbles ----


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("num_stages", "num_micro_batches"), GRID)
def test_bubble_is_the_textbook_formula(name: str, num_stages: int, num_micro_batches: int) -> None:
    plan = schedule(name, num_stages, num_micro_batches)
    assert bubble_fraction(plan) == pytest.approx(one_f_one_b_bubble(num_stages, num_micro_batches), abs=1e-12)


@pytest.mark.parametrize("num_chunks", [2, 3, 4])
@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(p, m) for p, m in GRID if m >= p])
def test_interleaved_divides_the_bubble_by_the_number_of_chunks(
    num_stages: int, num_micro_batches: int, num_chunks: int
) -> None:
    plan = schedule("interleaved", num_stages, num_micro_batches, num_chunks)
    expected = (num_stages - 1) / (num_chunks * num_micro_batches + num_stages - 1)
    assert bubble_fraction(plan) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(p, m) for p, m in GRID if 1 < m < p])
def test_interleaved_bubble_is_smaller_with_few_micro_batches_too(num_stages: int, num_micro_batches: int) -> None:
    plan = schedule("interleaved", num_stages, num_micro_batches, 2)
    assert bubble_fraction(plan) < one_f_one_b_bubble(num_stages, num_micro_batches) - 1e-6


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(p, m) for p, m in GRID if p > 1])
def test_zero_bubble_is_smaller_than_1f1b(num_stages: int, num_micro_batches: int) -> None:
    bubble = bubble_fraction(schedule("zero_bubble", num_stages, num_micro_batches))
    assert bubble < one_f_one_b_bubble(num_stages, num_micro_batches) - 1e-6
    if num_micro_batches >= num_stages:
        expected = (num_stages - 1) / (3 * num_micro_batches + num_stages - 1)
        assert bubble == pytest.approx(expected, abs=1e-12)


def test_communication_costs_time() -> None:
    plan = schedule("1f1b", 4, 8)
    assert bubble_fraction(plan, Costs(communication=0.5)) > bubble_fraction(plan)
    assert simulate(plan, Costs(communication=0.5)).start[3][0] == 3 * 1.5


def test_one_rank_has_no_bubble() -> None:
    assert bubble_fraction(schedule("interleaved", 1, 5, 3)) == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(plans())
def test_actions_of_a_rank_do_not_overlap_and_wait_for_their_inputs(plan: Schedule) -> None:
    simulation = simulate(plan, Costs(1, 2, 3, 0.25))
    finished: dict[tuple[str, int, int], float] = {}
    for rank, actions in enumerate(plan.actions):
        ends = [0.0, *simulation.end[rank]]
        for index, action in enumerate(actions):
            assert simulation.start[rank][index] >= ends[index]
            what = "stream" if action.kind is FORWARD else "gradient" if action.kind is not WEIGHT_GRAD else "weights"
            finished[what, plan.stage(rank, action.chunk), action.micro_batch] = ends[index + 1]
    for rank, actions in enumerate(plan.actions):
        for action, begin in zip(actions, simulation.start[rank], strict=True):
            stage, m = plan.stage(rank, action.chunk), action.micro_batch
            late = 0.25 * (plan.num_stages > 1)
            if action.kind is FORWARD and stage > 0:
                assert begin >= finished["stream", stage - 1, m] + late
            if action.kind in (BACKWARD, INPUT_GRAD) and stage < plan.last_stage:
                assert begin >= finished["gradient", stage + 1, m] + late


# ---- activations ----


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), GRID)
def test_gpipe_keeps_every_micro_batch(num_stages: int, num_micro_batches: int) -> None:
    assert peak_activations(schedule("gpipe", num_stages, num_micro_batches)) == [num_micro_batches] * num_stages


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), GRID)
def test_1f1b_keeps_no_more_than_the_ranks_behind_it(num_stages: int, num_micro_batches: int) -> None:
    expected = [min(num_stages - rank, num_micro_batches) for rank in range(num_stages)]
    assert peak_activations(schedule("1f1b", num_stages, num_micro_batches)) == expected


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), GRID)
def test_zero_bubble_keeps_no_more_than_1f1b(num_stages: int, num_micro_batches: int) -> None:
    most = max(peak_activations(schedule("1f1b", num_stages, num_micro_batches)))
    assert max(peak_activations(schedule("zero_bubble", num_stages, num_micro_batches))) == most


@pytest.mark.parametrize("num_chunks", [2, 3, 4])
@pytest.mark.parametrize("num_stages", RANKS)
def test_interleaved_keeps_what_the_paper_says(num_stages: int, num_chunks: int) -> None:
    """P divides M: one more than the warm-up, which is 2 (P - rank - 1) + (V - 1) P."""
    plan = schedule("interleaved", num_stages, 3 * num_stages, num_chunks)
    expected = [2 * (num_stages - r - 1) + (num_chunks - 1) * num_stages + 1 for r in range(num_stages)]
    assert peak_activations(plan) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(1, 64), st.integers(2, 4))
def test_interleaved_keeps_few_more_where_ranks_do_not_divide_micro_batches(
    num_stages: int, num_micro_batches: int, num_chunks: int
) -> None:
    plan = schedule("interleaved", num_stages, num_micro_batches, num_chunks)
    most = 2 * (num_stages - 1) + (num_chunks - 1) * (num_stages + num_stages - 1) + 1
    assert max(peak_activations(plan)) <= min(most, num_micro_batches * num_chunks)


# ---- transfers ----


@settings(max_examples=40, deadline=None)
@given(plans())
def test_both_ends_of_a_link_have_one_order(plan: Schedule) -> None:
    sent: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    received: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for rank, entries in enumerate(transfers(plan)):
        for t in entries:
            link, ends = ((t.what, rank, t.peer), sent) if t.sends else ((t.what, t.peer, rank), received)
            ends.setdefault(link, []).append((t.micro_batch, t.stage))
    assert sent == received
    hops = (plan.num_stages * plan.num_chunks - 1) * plan.num_micro_batches * (plan.num_stages > 1)
    assert sum(map(len, sent.values())) == 2 * hops


@settings(max_examples=40, deadline=None)
@given(plans())
def test_a_rank_needs_streams_and_gradients_in_the_order_they_were_sent(plan: Schedule) -> None:
    for entries in transfers(plan):
        needed: dict[tuple[int, str], list[int]] = {}
        for t in entries:
            if not t.sends:
                needed.setdefault((t.peer, t.what), []).append(t.action)
        assert all(order == sorted(order) for order in needed.values())


@settings(max_examples=40, deadline=None)
@given(plans())
def test_receives_are_posted_before_the_action_and_sends_after(plan: Schedule) -> None:
    """Posted in list order, with each action done once all before it are posted, every receive is there in time."""
    for rank, entries in enumerate(transfers(plan)):
        last_send = -1
        for t in entries:
            action = plan.actions[rank][t.action]
            assert t.micro_batch == action.micro_batch
            if t.sends:
                last_send = t.action
                assert (t.what == "stream") == (action.kind is FORWARD)
            else:
                assert t.stage == plan.stage(rank, action.chunk)
                assert t.action > last_send


# ---- faults ----


def test_planted_deadlock_is_reported_with_every_rank_that_is_stuck() -> None:
    plan = schedule("1f1b", 2, 2)  # rank 0: F0 F1 B0 B1; rank 1: F0 B0 F1 B1
    careful = swapped(plan, 0, 1, 2)  # rank 0: F0 B0 F1 B1, which is slower and correct
    check(careful)
    with pytest.raises(ConfigError, match=r"deadlocks: rank 0 cannot do backward.*; rank 1 cannot do forward"):
        simulate(swapped(careful, 1, 0, 2))  # rank 1: F1 B0 F0 B1, and rank 0 needs B0 before it does F1


def test_backward_before_its_own_forward_is_a_deadlock() -> None:
    with pytest.raises(ConfigError, match="rank 0 cannot do backward of micro-batch 0 in chunk 0 without the stream"):
        simulate(swapped(schedule("1f1b", 1, 2), 0, 0, 1))


@settings(max_examples=40, deadline=None)
@given(plans(), st.data())
def test_an_action_left_out_is_reported(plan: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.num_stages - 1))
    index = data.draw(st.integers(0, len(plan.actions[rank]) - 1))
    with pytest.raises(ConfigError, match=f"on rank {rank} has 0 actions"):
        check(without(plan, rank, index))


def test_an_action_done_twice_is_reported() -> None:
    plan = schedule("gpipe", 2, 2)
    twice = replace(plan, actions=(plan.actions[0], (*plan.actions[1], Action(BACKWARD, 1))))
    with pytest.raises(ConfigError, match="on rank 1 has 2 actions backward or input-grad for micro-batch 1"):
        check(twice)


def test_weight_gradients_out_of_order_are_reported() -> None:
    with pytest.raises(ConfigError, match=r"in the order \[1, 0\]"):
        check(swapped(schedule("gpipe", 1, 2), 0, 2, 3))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("1f1", 2, 4), 'did you mean "1f1b"'),
        (("1f1b", 0, 4), "0 pipeline stages"),
        (("1f1b", 2, 0), "0 micro-batches"),
        (("interleaved", 2, 4, 0), "0 chunks"),
        (("interleaved", 2, 4), 'at least 2, or use "1f1b"'),
        (("zero_bubble", 2, 4, 2), 'only "interleaved" has more'),
    ],
)
def test_impossible_arguments_are_refused(arguments: tuple[str, int, int], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        schedule(*arguments)
