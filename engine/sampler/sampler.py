"""Many requests, one loop: schedule a step, run it, hand out the tokens.

Every rank of a replica runs this loop and comes to the same decisions: they depend on tokens, and all ranks get those.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from engine.config import EngineConfig
from engine.errors import NumericsError
from engine.kernels.sample_token import hash_seed
from engine.model import Transformer
from engine.sampler.draw import Drawn
from engine.sampler.kv_cache import KVCache
from engine.sampler.request import Sequence
from engine.sampler.runner import Flight, Runner
from engine.sampler.scheduler import Scheduler, Step
from engine.sampler.slots import Slots
from engine.sampler.stopping import StopScanner
from engine.tokenizer import Tokenizer
from engine.types import SamplingParams


@dataclass
class SamplerStats:
    """Counts since the engine was made."""

    steps: int = 0
    prompt_tokens: int = 0  # prompt tokens asked for, once per sample
    cached_tokens: int = 0  # of those, tokens whose keys and values were shared or found
    computed_tokens: int = 0  # tokens that went through the model
    sampled_tokens: int = 0
    preemptions: int = 0
    idle_turns: int = 0  # of a pipeline: there was no step to start while others were under way


class Sampler:
    """Continuous batching over the paged cache. Not thread-safe."""

    def __init__(self, model: Transformer, config: EngineConfig, tokenizer: Tokenizer | None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        num_pages = config.kv_tokens // config.page_size
        self.capacity = min(num_pages * config.page_size, model.config.max_position_embeddings)
        self.cache = KVCache(num_pages, config.page_size, config.prefix_caching)
        self.slots = Slots(config.max_seqs, -(-self.capacity // config.page_size))
        self.runner = Runner(model, num_pages, config.page_size, config.max_batch_tokens)
        depth = self.runner.depth
        self.scheduler = Scheduler(self.cache, self.slots, config.max_batch_tokens, config.max_seqs, depth)
        self._under_way: deque[Flight | None] = deque()
        self.stats = SamplerStats()
        self._is_eos = np.zeros(model.config.vocab_size, dtype=bool)
        eos = set(model.config.eos_token_ids) | set(tokenizer.eos_token_ids if tokenizer else ())
        self._is_eos[[t for t in eos if t < model.config.vocab_size]] = True

    @property
    def num_unfinished(self) -> int:
        """Sequences in slots and in the waiting line (siblings that have not forked yet not counted)."""
        return len(self.slots.order) + len(self.scheduler.waiting)

    def add(self, request_id: int, prompt_index: int, prompt: list[int], params: SamplingParams, seed: int) -> None:
        """Puts the n samples of one prompt at the end of the waiting line. Stop strings need a tokenizer."""
        tokens = np.array(prompt, dtype=np.int32)
        limit = min(len(prompt) + params.max_tokens, self.capacity + 1, self.model.config.max_position_embeddings)
        family = [
            Sequence(request_id, prompt_index, i, params, tokens, hash_seed(seed, prompt_index, i), limit)
            for i in range(params.n)
        ]
        if params.stop:
            assert self.tokenizer is not None, "stop strings without a tokenizer"
            for sequence in family:
                sequence.scanner = StopScanner(self.tokenizer, params.stop)
        family[0].siblings = family[1:]
        self.scheduler.waiting.append(family[0])
        self.stats.prompt_tokens += len(prompt) * params.n

    @property
    def room(self) -> int:
        """Sequences that could start now: none while some wait, or while the cache has no page to spare."""
        running = self.slots.order
        if self.scheduler.waiting or self.cache.num_free <= len(running):
            return 0
        coming = sum(len(s.siblings) for s in self.slots.sequence if s is not None)
        return self.scheduler.max_running - len(running) - coming

    def step(self) -> tuple[list[int], list[Sequence]] | None:
        """Starts one step and takes in the results of the last one that is through (without a pipeline, the same): the
        slots that got a token and still run, and the sequences that finished; None when nothing is left to run.

        Raises NumericsError when logits are not finite.
        """
        step = self.scheduler.next_step()
        if step is None and not any(self._under_way):
            self._under_way.clear()
            return None
        self._under_way.append(self.runner.start(step, self.slots))
        if step is None:
            self.stats.idle_turns += 1
        else:
            self.scheduler.computed(step)
            self.stats.steps += 1
            self.stats.computed_tokens += step.num_tokens
            self.stats.preemptions = self.scheduler.num_preemptions
        if len(self._under_way) < self.runner.depth:
            return [], []
        return self._take_in(self._under_way.popleft())

    def drain(self) -> None:
        """Lets the steps under way end, whatever becomes of their tokens."""
        while any(self._under_way):
            self._under_way.append(self.runner.start(None, self.slots))
            if len(self._under_way) >= self.runner.depth and (flight := self._under_way.popleft()) is not None:
                flight.results()
        self._under_way.clear()

    def abort(self, request_id: int, prompt_index: int | None = None) -> list[Sequence]:
        """Ends the sequences of a request (of one of its prompts); they keep what was sampled."""

        def hit(sequence: Sequence) -> bool:
            return sequence.request_id == request_id and prompt_index in (None, sequence.prompt_index)

        running = [s for s in self.slots.order if hit(self.slots.sequence[s])]  # type: ignore[arg-type]
        ended = [self.scheduler.finish(slot) for slot in running]
        waiting = [s for s in self.scheduler.waiting if hit(s)]
        for sequence in waiting:
            self.scheduler.waiting.remove(sequence)
        ended += waiting
        ended += [sibling for sequence in ended for sibling in sequence.siblings]
        for sequence in ended:
            sequence.siblings = []
            sequence.finish_reason = "abort"
        return ended

    def _take_in(self, flight: Flight | None) -> tuple[list[int], list[Sequence]]:
        if flight is None or not len(flight.drawing):
            return [], []
        slots, step, drawn = self.slots, flight.step, flight.results()
        if drawn.tokens.min() < 0:
            self.drain()
            raise NumericsError(
                f"the logits of {int((drawn.tokens < 0).sum())} of {len(drawn.tokens)} rows are not finite, so no "
                "token can be sampled; check the weights (the last optimizer step, or the checkpoint) for NaN and "
                "infinity"
            )
        sampled, drawn = self._still_there(step, drawn)
        self.stats.sampled_tokens += len(sampled)
        if not len(sampled):
            return [], []
        slots.append(sampled, drawn.tokens, drawn.logprobs, drawn.kept_mass)
        for index, choices in drawn.alternatives.items():
            slots.sequence[sampled[index]].alternatives.append(choices)  # type: ignore[union-attr]
        finished = self._finish(sampled, drawn.tokens)
        return [slot for slot in sampled.tolist() if slots.sequence[slot] is not None], finished

    def _still_there(self, step: Step, drawn: Drawn) -> tuple[np.ndarray, Drawn]:
        """The slots whose sequences are still in them, and their tokens. A sequence that has left (preempted while its
        token was on the way) draws the same one when it is back."""
        here = self.slots.tenancy[step.sample_slots] == step.tenancy
        if here.all():
            return step.sample_slots, drawn
        places = np.cumsum(here) - 1
        alternatives = {int(places[i]): choices for i, choices in drawn.alternatives.items() if here[i]}
        kept = Drawn(drawn.tokens[here], drawn.logprobs[here], drawn.kept_mass[here], alternatives)
        return step.sample_slots[here], kept

    def _finish(self, sampled: np.ndarray, tokens: np.ndarray) -> list[Sequence]:
        slots = self.slots
        stopped = self._is_eos[tokens] & ~slots.ignore_eos[sampled]
        for index in np.flatnonzero(slots.watched[sampled] & ~stopped).tolist():
            stopped[index] = self._stops(int(sampled[index]), int(tokens[index]))
        full = slots.length[sampled] >= slots.max_length[sampled]
        finished = []
        for index in np.flatnonzero(stopped | full).tolist():
            sequence = self.scheduler.finish(int(sampled[index]))
            sequence.finish_reason = "stop" if stopped[index] else "length"
            self.stats.cached_tokens += sequence.num_cached_tokens or 0
            finished.append(sequence)
        return finished

    def _stops(self, slot: int, token: int) -> bool:
        sequence = self.slots.sequence[slot]
        assert sequence is not None
        if token in sequence.params.stop_token_ids:
            return True
        scanner = sequence.scanner
        if isinstance(scanner, StopScanner) and scanner.push(token):
            sequence.stop_text = scanner.text
            return True
        return False

    def clear(self) -> None:
        """Ends everything in flight and forgets what the cache holds."""
        self._under_way.clear()
        self.runner.clear()
        for slot in list(self.slots.order):
            self.scheduler.finish(slot)
        self.scheduler.waiting.clear()
        self.cache.forget()
