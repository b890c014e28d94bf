"""Connections between the stages of a pipeline: for every kind of message a group of two ranks, sender and receiver.

    stage 0  -- streams -->  stage 1  -- streams -->  stage 2         tied: the first stage and the last, both ways
             <- gradients --          <- gradients --                 with several chunks a stage, streams go from the
        ^           ^---------- tokens ----------'                    last stage to the first too, and gradients back
        '---------------------- tokens ----------'

A link carries its messages in the order in which they are sent, and its receiver asks for them in this order:

- streams, gradients: `schedule.transfers` posts the receives of a link in the order of the sender's actions. In
  sampling, all stages run the same steps, and chunks of them, in the same order.
- tokens: the last stage draws them step by step; another asks for them when it begins the step.
- tied: one message each way, when the pipeline is through.

So no message needs a tag, which NCCL would ignore. Nor can a receive that is posted early hold up a send, as it would
where both use one communicator, because each of these runs its operations one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.memory import CPU
from engine.parallel.collectives import Group, Pending, start_receive, start_send

STREAMS, GRADIENTS, TOKENS, TIED = "streams", "gradients", "tokens", "tied"


class Link(NamedTuple):
    """What is sent, and from which place in the pipeline to which."""

    kind: str
    source: int
    to: int

    def group(self, ranks: tuple[int, ...], rank: int, handle: object = None) -> Group:
        """The group of the link in a pipeline of these ranks, as one of the two sees it."""
        pair = ranks[self.source], ranks[self.to]
        return Group(f"{self.kind} from stage {self.source} to {self.to}", pair, pair.index(rank), handle)


def links_of(num_stages: int, chunks_per_stage: int) -> list[Link]:
    """Every link of a pipeline, in a fixed order: 3 (P - 1) + 2, and 2 more with several chunks a stage; none for one
    stage."""
    if num_stages == 1:
        return []
    last = num_stages - 1
    steps = [(stage, stage + 1) for stage in range(last)] + ([(last, 0)] if chunks_per_stage > 1 else [])
    return [
        *(Link(STREAMS, source, to) for source, to in steps),
        *(Link(GRADIENTS, to, source) for source, to in steps),
        *(Link(TOKENS, last, stage) for stage in range(last)),
        Link(TIED, 0, last),
        Link(TIED, last, 0),
    ]


@dataclass(frozen=True)
class Links:
    """The links that begin or end at this rank of the pipeline `pp`."""

    pp: Group
    groups: Mapping[Link, Group] = field(default_factory=dict, hash=False)

    @classmethod
    def layout(cls, pp: Group, chunks_per_stage: int, handles: Mapping[Link, object] | None = None) -> Links:
        """Those of a pipeline, with torch.distributed's `handles`, or without connections."""
        rank, handles = pp.ranks[pp.index], handles or {}
        mine = [link for link in links_of(pp.size, chunks_per_stage) if pp.index in (link.source, link.to)]
        return cls(pp, {link: link.group(pp.ranks, rank, handles.get(link)) for link in mine})

    def connect(self, device: torch.device) -> None:
        """Sends a first message over every link, from memory of the device's kind. All stages go through the links in
        one order, each when the one before is through.

        With the first message of two ranks NCCL makes their connection, and both wait for it. A receive that a schedule
        posts early could wait for a stage that waits for what comes after it: gpipe would not begin. Raises
        ParallelError.
        """
        for link in self.groups:
            if link.source == self.pp.index:
                self.send(torch.zeros(1, dtype=torch.float32, device=device), link.kind, link.to).wait()
            else:
                self.receive((1,), torch.float32, link.kind, link.source, device).wait()

    def send(self, x: Tensor, kind: str, to: int) -> Pending[None]:
        """Sends x to the stage `to`. x must live and stay as it is until `wait`."""
        return start_send(x, self.groups[Link(kind, self.pp.index, to)], 1)

    def receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, kind: str, source: int, device: torch.device = CPU
    ) -> Pending[Tensor]:
        """The tensor of that kind that the stage `source` sends next, from its memory of the same kind as `device`."""
        return start_receive(shape, dtype, self.groups[Link(kind, source, self.pp.index)], 0, device)
