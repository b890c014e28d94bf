"""Pipeline schedules as data: for every rank the list of its actions, and what can be known from the lists alone.

A pipeline of P ranks cuts the layers into P * V runs, its virtual stages; rank r holds V of them, its chunks: chunk c
is virtual stage c * P + r. A micro-batch runs forward through the stages 0, 1, 2 ... and backward through them in
reverse. A schedule says in which order a rank does its share. Nothing here starts a process; `pipeline.py` runs the
lists.

# P ranks, V chunks of a rank, M micro-batches
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate, pairwise, product

from engine.errors import ConfigError, nearest


class Kind(Enum):
    """What an action does with one micro-batch in one chunk."""

    FORWARD = "forward"
    BACKWARD = "backward"  # the gradient of the chunk's input and those of its weights at once
    INPUT_GRAD = "input-grad"  # only what the stage before waits for
    WEIGHT_GRAD = "weight-grad"  # the rest; nobody waits for it


FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD = Kind


@dataclass(frozen=True)
class Action:
    kind: Kind
    micro_batch: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value} of micro-batch {self.micro_batch} in chunk {self.chunk}"


@dataclass(frozen=True)
class Schedule:
    """`actions[rank]` in the order that rank does them.

    Within a (rank, chunk) gradients come in ascending order of micro-batches, as on a single rank: sums of
    floating-point numbers depend on their order, and so do the bits of a weight's gradient. (Those of vectors are
    cheap and are added by the INPUT_GRAD already, so its order counts too.)
    """

    name: str
    num_stages: int
    num_micro_batches: int
    num_chunks: int
    actions: tuple[tuple[Action, ...], ...]

    def stage(self, rank: int, chunk: int) -> int:
        """The virtual stage that is chunk `chunk` of `rank`."""
        return chunk * self.num_stages + rank

    @property
    def last_stage(self) -> int:
        """The virtual stage that ends in the loss."""
        return self.num_stages * self.num_chunks - 1


def schedule(name: str, num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """The schedule `name` for P = `num_stages` ranks, M = `num_micro_batches`, V = `num_chunks` chunks a rank.

    Any M and P from 1 on. Bubbles below are for a forward of 1, a backward of 2 and M >= P.

    - "gpipe" (arXiv 1811.06965): all forwards, then all backwards. M activations; bubble (P - 1) / (M + P - 1).
    - "1f1b" (PipeDream-flush, arXiv 2006.09503): a backward after each forward as soon as the pipe is full. The same
      bubble; min(P - rank, M) activations.
    - "interleaved" (arXiv 2104.04473): 1f1b over V >= 2 chunks a rank. Bubble (P - 1) / (V M + P - 1). Micro-batches go
      through the chunks in groups; where P does not divide M the groups are larger than P, and equal but for one
      micro-batch, which keeps the bubble and costs up to (V - 1) (P - 1) more activations.
    - "zero_bubble" (ZB-H1, arXiv 2401.10241): 1f1b whose weight gradients wait for a rank's idle time. Rank r puts
      them off by r micro-batches, so no rank keeps more than the min(P, M) activations that 1f1b keeps on its first.
      Bubble (P - 1) / (3 M + P - 1), a third of 1f1b's.

    Raises ConfigError for an unknown name and for numbers that the schedule cannot be made for.
    """
    if name not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ConfigError(f'there is no pipeline schedule "{name}"{nearest(name, list(SCHEDULES))}; use {known}')
    for value, what in (
        (num_stages, "pipeline stages"),
        (num_micro_batches, "micro-batches"),
        (num_chunks, "chunks (virtual stages) per rank"),
    ):
        if value < 1:
            raise ConfigError(f"a pipeline schedule with {value} {what}; it needs at least 1")
    if name == "interleaved" and num_chunks < 2:
        raise ConfigError('the schedule "interleaved" with 1 chunk per rank; it needs at least 2, or use "1f1b"')
    if name != "interleaved" and num_chunks != 1:
        raise ConfigError(
            f'the schedule "{name}" with {num_chunks} chunks per rank; it has one, only "interleaved" has more'
        )
    make = SCHEDULES[name]
    actions = tuple(tuple(make(rank, num_stages, num_micro_batches, num_chunks)) for rank in range(num_stages))
    return Schedule(name, num_stages, num_micro_batches, num_chunks, actions)


def _gpipe(rank: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Action]:
    numbers = range(num_micro_batches)
    return [Action(FORWARD, m) for m in numbers] + [Action(BACKWARD, m) for m in numbers]


def _one_forward_one_backward(rank: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Action]:
    numbers = range(num_micro_batches)
    forwards, backwards = [Action(FORWARD, m) for m in numbers], [Action(BACKWARD, m) for m in numbers]
    return _alternate(forwards, backwards, warmup=num_stages - rank - 1)


def _interleaved(rank: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Action]:
    # A group smaller than P would not cover the way of its first micro-batch through all ranks to the next chunk (and
    # 1f1b order can then deadlock), so what is left over joins full groups instead of forming one.
    num_groups = max(1, num_micro_batches // num_stages)
    cuts = [-(-num_micro_batches * g // num_groups) for g in range(num_groups + 1)]
    groups = [range(begin, end) for begin, end in pairwise(cuts)]
    chunks = range(num_chunks)
    forwards = [Action(FORWARD, m, c) for group in groups for c in chunks for m in group]
    backwards = [Action(BACKWARD, m, c) for group in groups for c in reversed(chunks) for m in group]
    warmup = 2 * (num_stages - rank - 1) + (num_chunks - 1) * max(len(group) for group in groups)
    return _alternate(forwards, backwards, warmup)


def _zero_bubble(rank: int, num_stages: int, num_micro_batches: int, num_chunks: int) -> list[Action]:
    actions = []
    for action in _one_forward_one_backward(rank, num_stages, num_micro_batches, num_chunks):
        if action.kind is FORWARD:
            actions.append(action)
            continue
        actions.append(Action(INPUT_GRAD, action.micro_batch))
        if action.micro_batch >= rank:
            actions.append(Action(WEIGHT_GRAD, action.micro_batch - rank))
    late = range(max(0, num_micro_batches - rank), num_micro_batches)
    return actions + [Action(WEIGHT_GRAD, m) for m in late]


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then forward and backward in turn, then the backwards that are left."""
    actions = forwards[:warmup]
    for index, backward in enumerate(backwards):
        actions += [*forwards[warmup + index : warmup + index + 1], backward]
    return actions


SCHEDULES: dict[str, Callable[[int, int, int, int], list[Action]]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zero_bubble": _zero_bubble,
}


# ---- what the lists say ----


@dataclass(frozen=True)
class Costs:
    """Durations, in any one unit, for one micro-batch in ALL chunks of a rank; one chunk takes 1 / V of them.

    A BACKWARD takes input_grad + weight_grad. `communication` is the time between the end of an action and the moment
    its result is there on another rank; it keeps neither rank from working.
    """

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    communication: float = 0.0

    def of(self, kind: Kind) -> float:
        if kind is BACKWARD:
            return self.input_grad + self.weight_grad
        return {FORWARD: self.forward, INPUT_GRAD: self.input_grad, WEIGHT_GRAD: self.weight_grad}[kind]


@dataclass(frozen=True)
class Simulation:
    """`start[rank][i]` and `end[rank][i]` of that rank's i-th action; the first action starts at 0."""

    start: list[list[float]]
    end: list[list[float]]
    makespan: float


_Result = tuple[str, int, int]  # "stream", "gradient" or "weights"; virtual stage; micro-batch


def _makes(plan: Schedule, rank: int, action: Action) -> _Result:
    what = {FORWARD: "stream", WEIGHT_GRAD: "weights"}.get(action.kind, "gradient")
    return what, plan.stage(rank, action.chunk), action.micro_batch


def _needs(plan: Schedule, rank: int, action: Action) -> list[_Result]:
    stage, micro_batch = plan.stage(rank, action.chunk), action.micro_batch
    if action.kind is FORWARD:
        return [("stream", stage - 1, micro_batch)] if stage else []
    if action.kind is WEIGHT_GRAD:
        return [("gradient", stage, micro_batch)]
    after = [("gradient", stage + 1, micro_batch)] if stage < plan.last_stage else []
    return [("stream", stage, micro_batch), *after]


def forwards_only(plan: Schedule) -> Schedule:
    """The forwards of a schedule in their order, without what follows them: to score."""
    return replace(plan, actions=tuple(tuple(a for a in own if a.kind is FORWARD) for own in plan.actions))


def simulate(plan: Schedule, costs: Costs = Costs()) -> Simulation:
    """When each action starts and ends if every rank does its list in order, each action as soon as it can.

    Raises ConfigError when the lists deadlock; it says for every rank that is stuck at what, and what that waits for.
    """
    done: dict[_Result, tuple[float, int]] = {}  # -> when, on which rank
    waiting: dict[_Result, int] = {}  # -> the rank to look at again
    start: list[list[float]] = [[] for _ in plan.actions]
    end: list[list[float]] = [[] for _ in plan.actions]
    stuck: dict[int, _Result] = {}
    runnable = list(range(plan.num_stages))
    while runnable:
        rank = runnable.pop()
        stuck.pop(rank, None)
        now = end[rank][-1] if end[rank] else 0.0
        for action in plan.actions[rank][len(end[rank]) :]:
            needs = _needs(plan, rank, action)
            missing = next((need for need in needs if need not in done), None)
            if missing is not None:
                stuck[rank] = missing
                waiting[missing] = rank
                break
            for when, origin in (done[need] for need in needs):
                now = max(now, when if origin == rank else when + costs.communication)
            start[rank].append(now)
            now += costs.of(action.kind) / plan.num_chunks
            end[rank].append(now)
            result = _makes(plan, rank, action)
            done[result] = (now, rank)
            if result in waiting:
                runnable.append(waiting.pop(result))
    if stuck:
        raise ConfigError(f'the schedule "{plan.name}" deadlocks: {_describe(plan, stuck, end)}')
    return Simulation(start, end, max(times[-1] for times in end if times))


def _describe(plan: Schedule, stuck: dict[int, _Result], end: list[list[float]]) -> str:
    lines = []
    for rank, (what, stage, micro_batch) in sorted(stuck.items()):
        chunk, origin = divmod(stage, plan.num_stages)
        lines.append(
            f"rank {rank} cannot do {plan.actions[rank][len(end[rank])]} without the {what} of micro-batch "
            f"{micro_batch} from chunk {chunk} of rank {origin}"
        )
    return "; ".join(lines)


def check(plan: Schedule) -> None:
    """Lets a schedule pass that an executor can run to the end with the bits of a single rank.

    Raises ConfigError where a (micro-batch, chunk) is left out or done twice, where gradients of a chunk are not added
    in ascending order of micro-batches, and where the lists deadlock.
    """
    cells = Counter((m, c) for m in range(plan.num_micro_batches) for c in range(plan.num_chunks))
    for rank, actions in enumerate(plan.actions):
        where = f'the schedule "{plan.name}" on rank {rank}'
        for kinds in ((FORWARD,), (BACKWARD, INPUT_GRAD), (BACKWARD, WEIGHT_GRAD)):
            found = Counter((action.micro_batch, action.chunk) for action in actions if action.kind in kinds)
            if wrong := found - cells or cells - found:
                m, c = min(wrong)
                names = " or ".join(kind.value for kind in kinds)
                raise ConfigError(
                    f"{where} has {found[m, c]} actions {names} for micro-batch {m} in chunk {c}, not {cells[m, c]}"
                )
        for chunk, last in product(range(plan.num_chunks), (INPUT_GRAD, WEIGHT_GRAD)):
            order = [a.micro_batch for a in actions if a.chunk == chunk and a.kind in (BACKWARD, last)]
            if order != sorted(order):
                raise ConfigError(f"{where} adds gradients of chunk {chunk} in the order {order}; sort them")
    simulate(plan)


def bubble_fraction(plan: Schedule, costs: Costs = Costs()) -> float:
    """The share of all ranks' time, from the first action to the last of any rank, that they are idle; in [0, 1).

    Raises ConfigError when the lists deadlock.
    """
    makespan = simulate(plan, costs).makespan
    busy = sum(costs.of(action.kind) / plan.num_chunks for actions in plan.actions for action in actions)
    return 1.0 - busy / (plan.num_stages * makespan)


def peak_activations(plan: Schedule) -> list[int]:
    """Per rank, the most activations it keeps at a time; one is what one micro-batch leaves in one chunk.

    A FORWARD takes one, a BACKWARD or WEIGHT_GRAD gives it back. An INPUT_GRAD gives nothing back: the matrices'
    inputs and the gradients of their outputs stay until the WEIGHT_GRAD, which makes this an upper bound, as
    everything else that the forward kept is free by then. A chunk is 1 / V of a rank's layers: divide by V to compare.
    """
    peaks = []
    for actions in plan.actions:
        alive = peak = 0
        for action in actions:
            if action.kind is FORWARD:
                alive += 1
                peak = max(peak, alive)
            elif action.kind is not INPUT_GRAD:
                alive -= 1
        peaks.append(peak)
    return peaks


# ---- who sends what to whom, in which order ----


@dataclass(frozen=True)
class Transfer:
    """One tensor that crosses from rank to rank, seen from one of the two.

    `what` is "stream", for the next virtual stage, or "gradient", for the one before; `stage` is the stage that needs
    it. `action` is the index, in this rank's list, of the action that makes it (and is followed by the send) or needs
    it; `peer_action` the same in the peer's list. A receive is posted before action number `post`.
    """

    sends: bool
    peer: int
    what: str
    micro_batch: int
    stage: int
    action: int
    peer_action: int
    post: int


def transfers(plan: Schedule) -> list[list[Transfer]]:
    """Per rank its sends and receives, in the order in which it has to post them.

    Streams from one rank to another are a link that delivers in order, gradients are another, and both ends of a link
    have to agree on one order: it is that of the sender's actions. Sends stand where the tensor is made. Receives stand
    before the first action that needs them or one that was sent later on the link; in the schedules above a rank needs
    them in the order they were sent in. Tensors between two chunks of one rank (P = 1) do not travel and are not
    listed.
    """
    needed: dict[_Result, tuple[int, int]] = {}  # -> rank and index of the action of another stage that needs it
    for rank, actions in enumerate(plan.actions):
        for index, action in enumerate(actions):
            own = plan.stage(rank, action.chunk)
            needed |= {need: (rank, index) for need in _needs(plan, rank, action) if need[1] != own}
    found: list[list[Transfer]] = [[] for _ in plan.actions]
    links: dict[tuple[str, int, int], list[Transfer]] = {}  # -> what its receiver gets
    for rank, actions in enumerate(plan.actions):
        for index, action in enumerate(actions):
            result = what, stage, number = _makes(plan, rank, action)
            peer, at = needed.get(result, (rank, index))
            if peer != rank:
                stage += 1 if what == "stream" else -1
                found[rank].append(Transfer(True, peer, what, number, stage, index, at, index))
                receive = Transfer(False, rank, what, number, stage, at, index, at)
                links.setdefault((what, rank, peer), []).append(receive)
    for (_, _, receiver), received in links.items():
        # A tensor that is needed early pulls those forward that were sent before it.
        posts = list(accumulate((transfer.action for transfer in reversed(received)), min))[::-1]
        found[receiver] += [replace(t, post=post) for t, post in zip(received, posts, strict=True)]
    return [sorted(entries, key=lambda t: (t.post, t.sends)) for entries in found]
