"""One executor for every pipeline schedule: it does a rank's list of actions, and tensors travel between the ranks.

    rank 0   F0 F1 F2 B0 ...      -> residual streams to the next virtual stage, [T, D]
    rank 1      F0 F1 B0 F2 ...   <- their gradients to the one before

Receives are posted one action ahead, sends as soon as there is something to send, and both in the order that
`transfers` lays down for each link; an action waits for its own input only. So no order of sends and receives can
deadlock where the lists do not, however little the network buffers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from engine.kernels.linear import WeightGradients, deferred_weight_gradients
from engine.kernels.memory import CPU
from engine.parallel.collectives import Pending
from engine.parallel.links import GRADIENTS, STREAMS, Links
from engine.parallel.schedule import FORWARD, INPUT_GRAD, WEIGHT_GRAD, Action, Schedule, Transfer, transfers

Forward = Callable[[int, int, Tensor | None], Tensor]
_KINDS = {"stream": STREAMS, "gradient": GRADIENTS}
_Key = tuple[str, int, int]  # "stream" or "gradient"; the virtual stage that needs it; micro-batch


def run_pipeline(
    plan: Schedule,
    links: Links,
    forward: Forward,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> None:
    """Does this rank's actions of `plan`, in their order, with the other ranks of the pipeline, over its `links`.

    `forward(micro_batch, chunk, stream)` makes of the residual stream (None at the first virtual stage) the stream for
    the next stage, of shape `shapes[micro_batch]` and `dtype`, on `device`; at the last stage, a scalar to minimise, or
    anything where the plan has no backwards. Gradients of weights go where the backward of the forward's operations
    puts them, micro-batch by micro-batch in ascending order for each chunk: the bits are those of a single rank. A
    WEIGHT_GRAD runs the matrix gradients that its INPUT_GRAD put off.

    `plan` has as many ranks as the pipeline and does not deadlock (`schedule.check` says so). Raises ParallelError when
    another rank is gone or late. What `forward` raises comes through, and leaves the other ranks waiting: where they
    should go on, let it return and tell them afterwards.
    """
    assert plan.num_stages == links.pp.size, f"a schedule of {plan.num_stages} ranks on {links.pp}"
    assert plan.num_micro_batches == len(shapes), f"{len(shapes)} shapes for {plan.num_micro_batches} micro-batches"
    _Run(plan, links, forward, shapes, dtype, device).run()


class _Run:
    def __init__(
        self,
        plan: Schedule,
        links: Links,
        forward: Forward,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.plan = plan
        self.rank = links.pp.index
        self.forward = forward
        self.shapes = shapes
        self.dtype = dtype
        self.mail = _Mail(transfers(plan)[self.rank], links, shapes, dtype, device)
        self.learns = any(action.kind is not FORWARD for action in plan.actions[self.rank])
        # What a micro-batch leaves in a chunk: the stream it came with, and where its backward begins. The stream that
        # was made there is not kept: no backward reads it.
        self.kept: dict[tuple[int, int], tuple[Tensor | None, GradientEdge]] = {}
        self.waiting: dict[tuple[int, int], WeightGradients] = {}

    def run(self) -> None:
        for index, action in enumerate(self.plan.actions[self.rank]):
            self.mail.post(before=index + 1)
            if action.kind is FORWARD:
                self.run_forward(action)
            elif action.kind is WEIGHT_GRAD:
                self.waiting.pop((action.micro_batch, action.chunk)).run()
            else:
                self.run_backward(action)
        self.mail.close()

    def run_forward(self, action: Action) -> None:
        stage, number = self.plan.stage(self.rank, action.chunk), action.micro_batch
        stream = self.mail.take(("stream", stage, number)) if stage else None
        if self.learns and stream is not None:
            stream.requires_grad_()
        with torch.set_grad_enabled(self.learns):
            out = self.forward(number, action.chunk, stream)
        if stage < self.plan.last_stage:
            assert tuple(out.shape) == tuple(self.shapes[number]) and out.dtype == self.dtype, (
                f"chunk {action.chunk} made {tuple(out.shape)} {out.dtype} of micro-batch {number}, which the next "
                f"stage expects as {tuple(self.shapes[number])} {self.dtype}"
            )
            self.mail.give(("stream", stage + 1, number), out.detach())
        if self.learns:
            self.kept[number, action.chunk] = (stream, get_gradient_edge(out))

    def run_backward(self, action: Action) -> None:
        stage, number = self.plan.stage(self.rank, action.chunk), action.micro_batch
        stream, edge = self.kept.pop((number, action.chunk))
        is_last = stage == self.plan.last_stage
        gradient = None if is_last else self.mail.take(("gradient", stage, number))
        with deferred_weight_gradients() if action.kind is INPUT_GRAD else nullcontext() as queue:
            torch.autograd.backward([edge], None if gradient is None else [gradient])
        if queue is not None:
            self.waiting[number, action.chunk] = queue
        if stream is not None:
            assert stream.grad is not None, f"chunk {action.chunk} made a stream that does not depend on its input"
            self.mail.give(("gradient", stage - 1, number), stream.grad)


class _Mail:
    """What one rank sends and receives. A tensor for another chunk of the same rank is handed over as it is."""

    def __init__(
        self,
        entries: list[Transfer],
        links: Links,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._links = links
        self._device = device
        self._shapes = shapes
        self._dtype = dtype
        self._receives = deque(t for t in entries if not t.sends)
        self._sends = {(t.what, t.stage, t.micro_batch): t for t in entries if t.sends}
        self._arriving: dict[_Key, tuple[Transfer, Pending[Tensor]]] = {}
        self._leaving: dict[int, deque[tuple[Transfer, Pending[None]]]] = {}  # by peer, oldest first
        self._here: dict[_Key, Tensor] = {}

    def post(self, before: int) -> None:
        """Gets ready to receive what the actions up to number `before` need."""
        while self._receives and self._receives[0].post <= before:
            t = self._receives.popleft()
            shape, key = self._shapes[t.micro_batch], (t.what, t.stage, t.micro_batch)
            if 0 in shape:  # a context-parallel rank may have no row of a micro-batch: nothing travels
                self._here[key] = torch.empty(shape, dtype=self._dtype, device=self._device)
            else:
                receiving = self._links.receive(shape, self._dtype, _KINDS[t.what], t.peer, self._device)
                self._arriving[key] = (t, receiving)

    def take(self, key: _Key) -> Tensor:
        """A tensor that is needed now; waits for it."""
        if key in self._here:
            return self._here.pop(key)
        t, pending = self._arriving.pop(key)
        tensor = pending.wait()
        # The peer made this after it had received all that its actions up to then needed: those sends are over, and
        # what they kept alive can go.
        leaving = self._leaving.get(t.peer, deque())
        while leaving and leaving[0][0].peer_action <= t.peer_action:
            leaving.popleft()[1].wait()
        return tensor

    def give(self, key: _Key, tensor: Tensor) -> None:
        """Sends a tensor to the virtual stage that needs it; it must not change any more."""
        t = self._sends.pop(key, None)
        if t is None:
            self._here[key] = tensor
        elif tensor.numel():
            sending = self._links.send(tensor, _KINDS[t.what], t.peer)
            self._leaving.setdefault(t.peer, deque()).append((t, sending))

    def close(self) -> None:
        """Waits until everything is sent."""
        for leaving in self._leaving.values():
            for _, pending in leaving:
                pending.wait()
        assert not (self._arriving or self._here or self._receives or self._sends), "tensors that nobody has asked for"
