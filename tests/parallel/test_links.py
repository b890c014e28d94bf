"""Links between stages: each has one order at both ends, so communicators that run their operations one after the
other (as NCCL's do) cannot deadlock; and real groups of two ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import pytest
import torch

from engine.config import ParallelConfig
from engine.kernels.memory import CPU
from engine.parallel.collectives import Group
from engine.parallel.links import GRADIENTS, STREAMS, TIED, TOKENS, Link, Links, links_of
from engine.parallel.mesh import make_mesh
from engine.parallel.schedule import FORWARD, WEIGHT_GRAD, Schedule, Transfer, forwards_only, schedule, transfers
from tests.parallel.pool import Pool

NAMES = ("gpipe", "1f1b", "interleaved", "zero_bubble")
KINDS = {"stream": STREAMS, "gradient": GRADIENTS}
Message = tuple[str, int, int]  # "stream" or "gradient", micro-batch, the stage that needs it


def plans(name: str) -> Iterator[Schedule]:
    """Up to 8 ranks and 16 micro-batches."""
    for num_stages in range(2, 9):
        for num_micro_batches in range(1, 17):
            for num_chunks in (2, 3) if name == "interleaved" else (1,):
                yield schedule(name, num_stages, num_micro_batches, num_chunks)


def link_of(t: Transfer, rank: int) -> Link:
    return Link(KINDS[t.what], *((rank, t.peer) if t.sends else (t.peer, rank)))


def pair_of(t: Transfer, rank: int) -> frozenset[int]:
    return frozenset((rank, t.peer))


def kind_of(t: Transfer, rank: int) -> str:
    return t.what


@pytest.mark.parametrize("name", NAMES)
def test_both_ends_issue_the_messages_of_a_link_in_one_order(name: str) -> None:
    for plan in plans(name):
        links = set(links_of(plan.num_stages, plan.num_chunks))
        for actions in (plan, forwards_only(plan)):
            sent: dict[Link, list[Message]] = {}
            received: dict[Link, list[Message]] = {}
            for rank, entries in enumerate(transfers(actions)):
                for t in entries:
                    ends = sent if t.sends else received
                    ends.setdefault(link_of(t, rank), []).append((t.what, t.micro_batch, t.stage))
            assert sent == received and sent.keys() <= links


def stuck_at(plan: Schedule, communicator: Callable[[Transfer, int], object]) -> list[int]:
    """Actions left on each rank when nothing goes on any more, where operations are queued without waiting, as the
    executor does it, and a communicator runs those of a rank one after the other, each together with its other half."""
    entries = transfers(plan)
    receives = [deque(t for t in own if not t.sends) for own in entries]
    sends = [{t.action: t for t in own if t.sends} for own in entries]
    needs: list[dict[int, list[Message]]] = [{} for _ in entries]
    for rank, own in enumerate(receives):
        for t in own:
            needs[rank].setdefault(t.action, []).append((t.what, t.micro_batch, t.stage))
    queues: dict[tuple[object, int], deque[tuple[bool, int, Message]]] = {}
    arrived: list[set[Message]] = [set() for _ in entries]
    done = [0] * len(entries)

    def issue(t: Transfer, rank: int) -> None:
        queue = queues.setdefault((communicator(t, rank), rank), deque())
        queue.append((t.sends, t.peer, (t.what, t.micro_batch, t.stage)))

    def exchange() -> bool:
        """Runs every operation whose other half is at the head of its queue too."""
        moved = False
        for (where, rank), queue in list(queues.items()):
            while queue and queue[0][0]:
                _, peer, message = queue[0]
                other = queues.get((where, peer))
                if not other or other[0] != (False, rank, message):
                    break
                queue.popleft()
                other.popleft()
                arrived[peer].add(message)
                moved = True
        return moved

    going = True
    while going:
        going = False
        for rank, actions in enumerate(plan.actions):
            while done[rank] < len(actions):
                index = done[rank]
                while receives[rank] and receives[rank][0].post <= index + 1:
                    issue(receives[rank].popleft(), rank)
                if not arrived[rank].issuperset(needs[rank].get(index, [])):
                    break
                if index in sends[rank]:
                    issue(sends[rank][index], rank)
                done[rank] += 1
                going = True
        going |= exchange()
    return [len(actions) - count for actions, count in zip(plan.actions, done, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_no_schedule_deadlocks_where_links_keep_their_order(name: str) -> None:
    for plan in plans(name):
        assert not any(stuck_at(plan, link_of)), plan
        assert not any(stuck_at(forwards_only(plan), link_of)), plan


@pytest.mark.parametrize("name", ["1f1b", "zero_bubble"])
def test_one_communicator_for_both_directions_would_deadlock(name: str) -> None:
    """Each rank has posted a receive, in front of the send that the other waits for."""
    assert all(stuck_at(schedule(name, 2, 4), pair_of))


def test_one_communicator_for_all_streams_of_a_pipeline_would_deadlock() -> None:
    """Over several chunks streams go round in a circle, and each rank has posted a receive in front of a send."""
    assert all(stuck_at(schedule("interleaved", 4, 8, 2), kind_of))


def test_an_action_makes_at_most_one_message() -> None:
    """What `stuck_at` takes for granted; a WEIGHT_GRAD makes none."""
    for name in NAMES:
        for plan in plans(name):
            for rank, entries in enumerate(transfers(plan)):
                made = [t.action for t in entries if t.sends]
                assert len(made) == len(set(made))
                assert all(plan.actions[rank][index].kind is not WEIGHT_GRAD for index in made)
                streams = [t for t in entries if t.sends and t.what == "stream"]
                assert all(plan.actions[rank][t.action].kind is FORWARD for t in streams)


# ---- groups ----


@pytest.mark.parametrize("num_stages", range(2, 9))
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_stages_that_wait_for_each_first_message_all_connect(num_stages: int, num_chunks: int) -> None:
    """As `Links.connect` goes through them: a stage is at its next link when both ends have met at the one before."""
    ranks = tuple(range(num_stages))
    left = [deque(Links.layout(Group("pp", ranks, place), num_chunks).groups) for place in ranks]
    met = 0
    while meeting := [own[0] for own in left if own and left[own[0].source][0] == left[own[0].to][0]]:
        left[meeting[0].source].popleft()
        left[meeting[0].to].popleft()
        met += 1
    assert met == len(links_of(num_stages, num_chunks)) and not any(left)


@pytest.mark.parametrize("num_stages", range(1, 9))
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_a_link_has_a_group_of_its_own_and_ends_know_their_side(num_stages: int, num_chunks: int) -> None:
    links = links_of(num_stages, num_chunks)
    assert len(links) == len(set(links)) == (num_stages > 1) * (3 * (num_stages - 1) + 2 + 2 * (num_chunks > 1))
    ranks = tuple(range(1, 2 * num_stages, 2))
    seen: dict[Link, list[Group]] = {}
    for place in range(num_stages):
        for link, group in Links.layout(Group("pp", ranks, place), num_chunks).groups.items():
            assert group.ranks == (ranks[link.source], ranks[link.to])
            assert group.ranks[group.index] == ranks[place]
            seen.setdefault(link, []).append(group)
    assert seen.keys() == set(links) and all(len(ends) == 2 for ends in seen.values())


def everything(config: ParallelConfig) -> dict[tuple[str, int], list[list[float]]]:
    """What comes over each link to this rank when all receives are posted before the first send, and the last are
    waited for first."""
    mesh = make_mesh(config)
    links = mesh.links
    links.connect(CPU)
    here = links.pp.index
    coming = [
        (link, [links.receive((2,), torch.float32, link.kind, link.source) for _ in range(3)])
        for link in links.groups
        if link.to == here
    ]
    leaving = [
        links.send(torch.tensor([float(mesh.rank), float(number)]), link.kind, link.to)
        for number in range(3)
        for link in reversed(list(links.groups))
        if link.source == here
    ]
    found = {
        (link.kind, link.source): [pending.wait().tolist() for pending in reversed(pendings)]
        for link, pendings in reversed(coming)
    }
    for pending in leaving:
        pending.wait()
    mesh.close()
    return found


@pytest.mark.parametrize(
    "config",
    [
        ParallelConfig(pp=4),
        ParallelConfig(pp=4, schedule="interleaved"),
        ParallelConfig(pp=2, tp=2),
        ParallelConfig(dp=2, pp=2, schedule="interleaved"),
    ],
    ids=lambda c: f"dp{c.dp}pp{c.pp}tp{c.tp}-{c.schedule}",
)
def test_every_link_brings_its_own_messages_in_their_order(pool4: Pool, config: ParallelConfig) -> None:
    results = pool4.run(everything, config)
    stride = config.tp  # between the ranks of two stages
    for rank, found in enumerate(results):
        stage = rank // stride % config.pp
        links = [link for link in links_of(config.pp, config.chunks_per_stage) if link.to == stage]
        assert found.keys() == {(link.kind, link.source) for link in links}
        for (_, source), messages in found.items():
            sender = rank + (source - stage) * stride
            assert messages == [[sender, 2.0], [sender, 1.0], [sender, 0.0]]
    assert {kind for found in results for kind, _ in found} == {STREAMS, GRADIENTS, TOKENS, TIED}
