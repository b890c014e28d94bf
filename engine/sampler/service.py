"""Requests in, completions out: each request's prompts are started, steps run until its samples are there, and what
comes out of a step goes to the request that it belongs to.

Replicas share the prompts of `generate` by one queue and exchange what they sampled; a stream runs on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.errors import EngineError, NumericsError
from engine.parallel.mesh import Mesh
from engine.parallel.queue import Queue
from engine.sampler.exchange import exchange
from engine.sampler.output import Inbox, Stream
from engine.sampler.sampler import Sampler
from engine.tokenizer import Tokenizer
from engine.types import Completion, SamplingParams


@dataclass(frozen=True)
class Call:
    """A request that has been found good, alike on every rank: prompts as token ids, parameters and seed of each."""

    name: str  # no other call of these ranks has it
    prompts: list[list[int]]
    params: list[SamplingParams]
    seeds: list[int]
    weight_version: int


class Service:
    """The requests in flight on one sampler. Not thread-safe."""

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer | None, mesh: Mesh) -> None:
        self._sampler, self._tokenizer, self._mesh = sampler, tokenizer, mesh
        self._inboxes: dict[int, Inbox] = {}
        self._requests = 0

    def generate(self, call: Call) -> list[list[Completion]]:
        """[P][n] completions, on every rank. Raises NumericsError, on every rank."""
        request, inbox = self._open(call, streaming=False)
        queue = Queue(call.name, [params.n for params in call.params], self._mesh)
        failure = None
        try:
            while (fresh := queue.take(self._room(queue, inbox))) or not inbox.complete:
                self._start(request, call, fresh)
                self.step()
        except NumericsError as error:
            failure = error
            queue.drain()
        finally:
            self.close(request)
        done = exchange(inbox.done, failure, call.prompts, call.weight_version, self._mesh.dp)
        queue.close()
        return [[done[prompt, sample] for sample in range(params.n)] for prompt, params in enumerate(call.params)]

    def stream(self, call: Call) -> Stream:
        """The same, step by step."""
        request, inbox = self._open(call, streaming=True)
        self._start(request, call, range(len(call.prompts)))
        return Stream(
            inbox,
            step=self.step,
            abort=lambda prompt_index: self.abort(request, prompt_index),
            close=lambda: self.close(request),
        )

    def abort_all(self) -> None:
        """Ends every request."""
        for request in self._inboxes:
            self.abort(request, None)

    def abort(self, request: int, prompt_index: int | None) -> None:
        """Ends a request, or one prompt of it."""
        for sequence in self._sampler.abort(request, prompt_index):
            self._inboxes[request].finish(sequence)

    def close(self, request: int) -> None:
        """Forgets the request and ends what still runs of it."""
        inbox = self._inboxes.pop(request, None)
        if inbox is not None and not inbox.complete:
            self._sampler.abort(request)
        if not self._sampler.num_unfinished:
            self._sampler.drain()

    @torch.inference_mode(False)  # what lives on, as the runner's buffers, is written to outside of that mode too
    def step(self) -> None:
        """One step of the sampler; what comes out goes to the request it belongs to."""
        sampler, slots = self._sampler, self._sampler.slots
        try:
            result = sampler.step()
        except BaseException:  # an interrupt too: it may come when siblings have forked but have no token yet
            sampler.clear()
            raise
        if result is None:
            raise EngineError("this request was dropped when a step of another failed; submit it again")
        alive, finished = result
        for slot in alive:
            sequence = slots.sequence[slot]
            assert sequence is not None
            inbox = self._inboxes[sequence.request_id]
            if inbox.streaming:
                span = slice(sequence.num_prompt_tokens + sequence.reported, int(slots.length[slot]))
                inbox.progress(sequence, slots.tokens[slot, span], slots.logprobs[slot, span])
        for sequence in finished:
            self._inboxes[sequence.request_id].finish(sequence)

    # ---- inside ----

    def _open(self, call: Call, streaming: bool) -> tuple[int, Inbox]:
        self._requests += 1
        inbox = Inbox([params.n for params in call.params], self._tokenizer, call.weight_version, streaming)
        self._inboxes[self._requests] = inbox
        return self._requests, inbox

    def _start(self, request: int, call: Call, numbers: range) -> None:
        for index in numbers:
            self._sampler.add(request, index, call.prompts[index], call.params[index], call.seeds[index])
            self._inboxes[request].expect(index)

    def _room(self, queue: Queue, inbox: Inbox) -> int:
        """Samples to take from the queue now: up to this replica's fair share of all, where there is room for them; and
        one in any case when it has none left."""
        if queue.is_empty:
            return 0
        return max(min(self._sampler.room, queue.fair_share - inbox.missing), int(inbox.complete))
