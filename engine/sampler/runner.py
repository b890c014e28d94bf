"""Runs steps on the model: packed tokens in, one sampled token per finished row out.

Over a pipeline each stage runs its layers of a step and sends the residual stream on; the last one samples and tells
the others. Up to `depth` steps are under way at once, so that no stage waits for another:

    stage 0   | n | n+1 | n+2 | ...        several chunks of layers a stage (interleaved): rounds of `depth` steps,
    stage 1       |  n  | n+1 | n+2        chunk 0 of each of them, then chunk 1 of each, and so on

Stages run the same steps in the same order, so the cache of each is written in that order too.

Context-parallel ranks all run every step, and have all its keys in their caches. Of a step with many tokens (prompts)
each computes its share of the rows; which rows those are changes no bit.

# T tokens of the step, or this rank's share of them, D model width
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.batch import KVView, TokenBatch
from engine.kernels.attention import AttentionPlan, allocate_pages
from engine.kernels.attention_pages import copy_pages
from engine.kernels.cuda_graph import CudaGraphs
from engine.kernels.graph import Recorded
from engine.kernels.memory import upload
from engine.model import Transformer
from engine.parallel.collectives import Pending
from engine.parallel.context import ContextShard, choose_rows, deal_rows
from engine.parallel.links import STREAMS, TOKENS
from engine.sampler.draw import Drawing, Drawn
from engine.sampler.scheduler import Step
from engine.sampler.slots import Slots

SHARED_ROWS = 128  # from so many for each context-parallel rank on, a step's rows are worth dealing out


@dataclass
class Flight:
    """A step on its way through the stages: what of the slots it needs, as it was when the step was made."""

    step: Step
    tokens: np.ndarray  # int32 [T]
    plan: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # what AttentionPlan.build takes
    drawing: Drawing
    context: ContextShard | None = None  # this rank's share of the rows, where they are dealt out
    sampled_rows: Tensor | None = None  # then: which rows are sampled from
    stream: Tensor | None = None  # between two chunks of layers of one rank
    drawn: Drawn | None = None
    message: Pending[Tensor] | None = None  # from the last stage

    @property
    def num_rows(self) -> int:
        """Rows that this rank computes."""
        return len(self.tokens) if self.context is None else self.context.lanes[0].plan.num_tokens

    def results(self) -> Drawn:
        """The sampled tokens; waits for them."""
        if self.message is not None:
            self.drawn = self.drawing.unpack(self.message.wait())
        assert self.drawn is not None, "the step has not been through all stages"
        return self.drawn


class Runner:
    """Owns the KV pool, on the model's device, and the recorded forward of each chunk of layers."""

    def __init__(self, model: Transformer, num_pages: int, page_size: int, max_batch_tokens: int) -> None:
        self.model = model
        self.stages, self.links = model.mesh.pp, model.mesh.links
        self.page_size = page_size
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        with model.device:
            for layer in model.layers:
                keys, values = allocate_pages(num_pages, page_size, layer.attention.spec, model.dtype)
                self.keys.append(keys)
                self.values.append(values)
        self._tokens = torch.zeros(max_batch_tokens, dtype=torch.int32, device=model.device)
        self._plan = AttentionPlan(device=model.device)  # of recorded forwards
        self._eager_plan = AttentionPlan(device=model.device)
        width = model.config.hidden_size
        self._streams = [
            None if chunk.first else torch.zeros((max_batch_tokens, width), dtype=model.dtype, device=model.device)
            for chunk in model.chunks
        ]
        max_pages = -(-min(num_pages * page_size, model.config.max_position_embeddings) // page_size)
        forwards = [partial(self._run, self._plan, chunk) for chunk in range(len(model.chunks))]
        self.recorded: list[Recorded | CudaGraphs] = [
            Recorded(forward, max_batch_tokens)
            if model.device.type == "cpu"
            else CudaGraphs(forward, self._plan, model.device, max_batch_tokens, max_pages)
            for forward in forwards
        ]
        self._round: list[Flight | None] = []
        self._sends: list[Pending[None]] = []

    @property
    def depth(self) -> int:
        """Steps that may be under way: the results of one are known when `depth - 1` more have started."""
        return self.stages.size

    @torch.no_grad()
    def start(self, step: Step | None, slots: Slots) -> Flight | None:
        """Runs this rank's part of the step, or nothing where there is none to run; its results come with, or after,
        the step that is started `depth - 1` calls later."""
        flight = None if step is None else self._flight(step, slots)
        self._settle()
        self._advance(flight, 0)
        self._round.append(flight)
        if len(self._round) == self.depth:
            for chunk in range(1, len(self.model.chunks)):
                for each in self._round:
                    self._advance(each, chunk)
            self._round = []
        return flight

    def clear(self) -> None:
        """Forgets a round that was not finished."""
        self._round = []

    def _flight(self, step: Step, slots: Slots) -> Flight:
        num_new = step.num_new
        start = np.zeros(len(num_new) + 1, dtype=np.int32)
        np.cumsum(num_new, out=start[1:])
        computed = slots.computed[step.slots]
        owner = np.repeat(np.arange(len(num_new), dtype=np.int32), num_new)
        positions = computed[owner] + (np.arange(len(owner), dtype=np.int32) - start[owner])
        tokens = slots.tokens[step.slots[owner], positions]
        context = computed + num_new
        width = int(-(-context.max() // self.page_size))
        tables = np.ascontiguousarray(slots.block_tables[step.slots, :width])
        flight = Flight(step, tokens, (start, context, positions, tables), Drawing(step, slots))
        group = self.model.mesh.cp
        if group.size > 1 and len(tokens) >= SHARED_ROWS * group.size:
            plan = AttentionPlan(device=self.model.device)
            plan.build(*flight.plan, self.page_size)
            lengths = num_new.tolist()
            deal = deal_rows(lengths, group.size, computed.tolist())
            flight.context = ContextShard(group, deal, lengths, plan, self.model.device)
            flight.sampled_rows = torch.from_numpy(flight.drawing.distinct_rows())
        if not self.model.has_last and len(flight.drawing):
            last = self.stages.size - 1
            size = (flight.drawing.message_size,)
            flight.message = self.links.receive(size, torch.int32, TOKENS, last)
        elif not len(flight.drawing):
            flight.drawn = Drawn.empty(0)
        return flight

    def _advance(self, flight: Flight | None, chunk: int) -> None:
        """This rank's `chunk` of layers, from the stage before to the stage after, or to tokens."""
        if flight is None:
            return
        here = self.model.chunks[chunk]
        hidden = self._forward(flight, chunk, None if here.first else self._take_in(flight))
        if flight.step.copies:
            pages = (torch.tensor(pages) for pages in zip(*flight.step.copies, strict=True))
            source, target = (upload(each, self.model.device) for each in pages)
            for layer in here.layers:
                copy_pages(self.keys[layer.place], source, target)
                copy_pages(self.values[layer.place], source, target)
        if not here.last:
            self._pass_on(flight, hidden)
        elif len(flight.drawing):
            if flight.sampled_rows is not None:
                choice = choose_rows(flight.sampled_rows, flight.context)
                hidden = choice.gather(choice.take(hidden))
            flight.drawn = flight.drawing.draw(hidden, self.model)
            self._tell(flight)

    def _forward(self, flight: Flight, chunk: int, stream: Tensor | None) -> Tensor:
        if flight.context is not None:  # so many rows that nothing is won by a recording
            (lane,) = flight.context.lanes
            tokens = upload(torch.from_numpy(flight.tokens)[lane.rows], self.model.device)
            batch = TokenBatch(tokens, lane.plan, KVView(self.keys, self.values), context=flight.context)
            return self.model.forward(batch, stream, chunk)
        total = len(flight.tokens)
        recorded = self.recorded[chunk]
        replays = self.model.recordable and total <= recorded.max_rows
        plan = self._plan if replays else self._eager_plan
        plan.build(*flight.plan, self.page_size)
        if self.model.chunks[chunk].first:
            self._tokens[:total] = upload(torch.from_numpy(flight.tokens), self.model.device)
        buffer = self._streams[chunk]
        if buffer is not None and stream is not None:
            buffer[:total] = stream
        return recorded(total) if replays else self._run(plan, chunk, total)

    def _run(self, plan: AttentionPlan, chunk: int, rows: int) -> Tensor:
        """The forward of `rows` rows of the buffers."""
        buffer = self._streams[chunk]
        batch = TokenBatch(self._tokens[:rows], plan, KVView(self.keys, self.values))
        return self.model.forward(batch, None if buffer is None else buffer[:rows], chunk)

    # ---- between stages ----

    def _take_in(self, flight: Flight) -> Tensor:
        """The residual stream of the chunk before, [T, D]."""
        if flight.stream is not None:
            return flight.stream
        shape, before = (flight.num_rows, self.model.config.hidden_size), (self.stages.index - 1) % self.stages.size
        model = self.model
        return self.links.receive(shape, model.dtype, STREAMS, before, model.device).wait()

    def _pass_on(self, flight: Flight, hidden: Tensor) -> None:
        if self.stages.size == 1:
            flight.stream = hidden.clone()
        else:  # a copy: the next replay writes where this one did
            after = (self.stages.index + 1) % self.stages.size
            self._sends.append(self.links.send(hidden.clone(), STREAMS, after))

    def _tell(self, flight: Flight) -> None:
        """Sends what was sampled to the stages before."""
        if self.stages.size > 1 and flight.drawn is not None:
            message = flight.drawing.pack(flight.drawn)
            self._sends += [self.links.send(message, TOKENS, to) for to in range(self.stages.size - 1)]

    def _settle(self) -> None:
        """Lets go of messages that are old enough to have arrived."""
        while len(self._sends) > 4 * self.depth * len(self.model.chunks):
            self._sends.pop(0).wait()
