"""What runs in the next step: every decoding sequence one token, prompts in chunks within the token budget.

Continuous batching with chunked prefill (as in arXiv 2403.02310): decodes first, then prompts under way, then prompts
from the waiting line. When pages run out the youngest sequence gives its own back and is computed again later.

Over a pipeline of `depth` stages the results of a step are known `depth` steps later. What waits for its token is in no
step until then, and a step takes at most its share of the running sequences, so that there are some for each of them.

# T tokens of the step, R rows that a token is sampled from
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from engine.sampler.kv_cache import KVCache
from engine.sampler.request import Sequence
from engine.sampler.slots import Slots


@dataclass
class Step:
    """One forward over the slots in `slots` (siblings that fork in this step are not among them)."""

    slots: np.ndarray  # int32 [S]
    num_new: np.ndarray  # int32 [S] tokens of each slot in this step
    sample_slots: np.ndarray  # int32 [R] whose next token is sampled
    tenancy: np.ndarray  # int64 [R] of those slots: a sequence that leaves before the token comes will not see it
    sample_rows: np.ndarray  # int32 [R] from which row of the hidden states; forked siblings share their leader's
    copies: list[tuple[int, int]]  # pages (from, to) to copy after the forward, for siblings
    num_decode: int  # leading entries of `slots` that decode
    forked: bool = False  # some rows are sampled from more than once; else `sample_rows` are distinct and ascending

    @property
    def num_tokens(self) -> int:
        return int(self.num_new.sum())


class Scheduler:
    """Owns the waiting line, the slots and the cache's pages."""

    def __init__(self, cache: KVCache, slots: Slots, max_batch_tokens: int, max_seqs: int, depth: int = 1) -> None:
        self.cache = cache
        self.slots = slots
        self.waiting: deque[Sequence] = deque()
        self.max_batch_tokens = max_batch_tokens
        self.max_running = min(max_seqs, max_batch_tokens)
        self.depth = depth
        self.num_preemptions = 0

    def next_step(self) -> Step | None:
        """Chooses the next step and gives it its pages; None when there is nothing to run now."""
        decodes = self._give_pages(self._due())
        slots = self.slots
        order = np.array(slots.order, dtype=np.int32)
        pending = slots.length[order] - slots.computed[order]
        budget = self.max_batch_tokens - len(decodes)
        chunks: list[tuple[int, int]] = []
        for slot in order[pending > 1].tolist():
            size = min(budget, int(slots.length[slot] - slots.computed[slot]))
            if size > 0:
                chunks.append((slot, size))
                budget -= size
        while budget > 0 and self.waiting and (slot := self._admit()) is not None:
            size = min(budget, int(slots.length[slot] - slots.computed[slot]))
            chunks.append((slot, size))
            budget -= size
        if not len(decodes) and not chunks:
            return None
        return self._build(decodes, chunks)

    def _build(self, decodes: np.ndarray, chunks: list[tuple[int, int]]) -> Step:
        slots = self.slots
        running = np.concatenate([decodes, np.array([slot for slot, _ in chunks], dtype=np.int32)])
        num_new = np.concatenate([np.ones(len(decodes), np.int32), np.array([n for _, n in chunks], np.int32)])
        complete = slots.computed[running] + num_new == slots.length[running]
        last_row = np.cumsum(num_new, dtype=np.int32) - 1
        sample_slots, sample_rows = running[complete], last_row[complete]
        copies: list[tuple[int, int]] = []
        forks = [
            (slot, row)
            for slot, row in zip(sample_slots.tolist(), sample_rows.tolist(), strict=True)
            if slots.sequence[slot].siblings
        ]  # type: ignore[union-attr]
        if forks:
            forked = [(new, row) for slot, row in forks for new in self._fork(slot, copies)]
            sample_slots = np.concatenate([sample_slots, np.array([s for s, _ in forked], dtype=np.int32)])
            sample_rows = np.concatenate([sample_rows, np.array([r for _, r in forked], dtype=np.int32)])
        tenancy = slots.tenancy[sample_slots]
        return Step(running, num_new, sample_slots, tenancy, sample_rows, copies, len(decodes), bool(forks))

    def computed(self, step: Step) -> None:
        """Notes that the step's keys and values are in the cache (of every stage, before it runs another step), and
        makes its full pages findable."""
        slots, size = self.slots, self.cache.page_size
        slots.computed[step.slots] += step.num_new
        if not self.cache.prefix_caching:
            return
        for slot in step.slots[slots.computed[step.slots] // size > slots.registered[step.slots]].tolist():
            self._register(slot)

    def finish(self, slot: int) -> Sequence:
        """Gives back the slot and its pages."""
        self.cache.release(self.slots.pages(slot))
        return self.slots.remove(slot)

    def _register(self, slot: int) -> None:
        slots, cache = self.slots, self.cache
        node, table = int(slots.node[slot]), slots.block_tables[slot]
        full = int(slots.computed[slot]) // cache.page_size
        for index in range(int(slots.registered[slot]), full):
            node = cache.register(node, slots.tokens[slot], index, int(table[index]))
        slots.node[slot], slots.registered[slot] = node, full

    def _due(self) -> np.ndarray:
        """Slots that decode in this step: those that have a token to go on from, the oldest first, up to the share."""
        slots = self.slots
        order = np.array(slots.order, dtype=np.int32)
        return order[slots.length[order] - slots.computed[order] == 1][: -(-len(order) // self.depth)]

    def _give_pages(self, decodes: np.ndarray) -> np.ndarray:
        """Those of the slots that still run when each has a page for its next token."""
        slots, size, preempted = self.slots, self.cache.page_size, self.num_preemptions
        for slot in decodes[slots.computed[decodes] // size >= slots.num_pages[decodes]].tolist():
            while slots.sequence[slot] is not None:
                page = self.cache.allocate(1)
                if page is not None:
                    slots.add_pages(slot, page)
                    break
                self._preempt(slots.order[-1])
        if preempted == self.num_preemptions:
            return decodes
        return np.array([slot for slot in decodes.tolist() if slots.sequence[slot] is not None], dtype=np.int32)

    def _preempt(self, slot: int) -> None:
        sequence = self.finish(slot)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self) -> int | None:
        """Moves the head of the waiting line into a slot if it and its pages fit; returns the slot."""
        slots, cache = self.slots, self.cache
        if len(slots.order) >= self.max_running:
            return None
        sequence = self.waiting[0]
        cached, node = cache.match(sequence.tokens)
        cache.share(cached)
        needed = -(-len(sequence.tokens) // cache.page_size) - len(cached)
        # Everyone that runs will want another page soon; an admission that starves them would be undone at once.
        reserve = len(slots.order) + len(sequence.siblings) if slots.order else 0
        pages = cache.allocate(needed) if needed + reserve <= cache.num_free else None
        if pages is None:
            cache.release(cached)
            return None
        self.waiting.popleft()
        slot = slots.insert(sequence)
        slots.add_pages(slot, cached + pages)
        slots.computed[slot] = len(cached) * cache.page_size
        slots.registered[slot], slots.node[slot] = len(cached), node
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(len(cached) * cache.page_size, sequence.num_prompt_tokens)
        return slot

    def _fork(self, leader: int, copies: list[tuple[int, int]]) -> list[int]:
        """Starts the leader's siblings on its prompt: full pages are shared, a partly filled one is copied.

        Those for which there is no slot or no page go to the head of the waiting line.
        """
        slots, cache = self.slots, self.cache
        sequence = slots.sequence[leader]
        assert sequence is not None
        siblings, sequence.siblings = sequence.siblings, []
        length = int(slots.length[leader])
        full = length // cache.page_size
        started: list[int] = []
        behind = leader
        while siblings and len(slots.order) < self.max_running:
            own = cache.allocate(1) if length % cache.page_size else []
            if own is None:
                break
            sibling = siblings.pop(0)
            shared = slots.pages(leader)[:full]
            cache.share(shared)
            behind = slots.insert(sibling, after=behind)
            slots.add_pages(behind, shared + own)
            copies.extend((int(slots.block_tables[leader, full]), page) for page in own)
            slots.computed[behind] = length
            slots.registered[behind], slots.node[behind] = slots.registered[leader], slots.node[leader]
            sibling.num_cached_tokens = length
            started.append(behind)
        if siblings:
            siblings[0].siblings = siblings[1:]
            self.waiting.appendleft(siblings[0])
        return started
