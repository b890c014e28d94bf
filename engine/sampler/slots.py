"""The running sequences as columns of arrays: a step of decoding is a few numpy calls, whatever the batch.

# S slots, C token capacity, B pages per sequence at most
"""

from __future__ import annotations

import numpy as np

from engine.sampler.request import Sequence


class Slots:
    """A table of running sequences; `order` lists the occupied rows, oldest first, siblings side by side."""

    def __init__(self, num_slots: int, max_pages: int) -> None:
        self.sequence: list[Sequence | None] = [None] * num_slots
        self.order: list[int] = []
        self._free = list(range(num_slots - 1, -1, -1))
        self.length = np.zeros(num_slots, dtype=np.int32)  # tokens known: prompt and sampled
        self.computed = np.zeros(num_slots, dtype=np.int32)  # tokens whose keys and values are in the cache
        self.prompt_length = np.zeros(num_slots, dtype=np.int32)
        self.max_length = np.zeros(num_slots, dtype=np.int32)
        self.num_pages = np.zeros(num_slots, dtype=np.int32)
        self.registered = np.zeros(num_slots, dtype=np.int32)  # leading pages that can be found by their tokens
        self.node = np.zeros(num_slots, dtype=np.int64)  # the cache's node of the last of those
        self.tenancy = np.zeros(num_slots, dtype=np.int64)  # counts who was here: results may come when one has left
        self.block_tables = np.zeros((num_slots, max_pages), dtype=np.int32)
        self.tokens = np.zeros((num_slots, 64), dtype=np.int32)  # [S, C]
        self.logprobs = np.zeros((num_slots, 64), dtype=np.float32)  # [S, C], at the sampled token's index
        self.kept_mass = np.zeros((num_slots, 64), dtype=np.float32)
        self.temperature = np.zeros(num_slots, dtype=np.float32)
        self.top_k = np.zeros(num_slots, dtype=np.int32)
        self.top_p = np.zeros(num_slots, dtype=np.float32)
        self.min_p = np.zeros(num_slots, dtype=np.float32)
        self.seed = np.zeros(num_slots, dtype=np.int64)
        self.ignore_eos = np.zeros(num_slots, dtype=bool)
        self.watched = np.zeros(num_slots, dtype=bool)  # stop strings, stop ids or alternatives: looked at one by one

    @property
    def num_free(self) -> int:
        return len(self._free)

    def insert(self, sequence: Sequence, after: int | None = None) -> int:
        """Gives the sequence a slot, last in order or right behind slot `after`; returns it."""
        slot = self._free.pop()
        self.sequence[slot] = sequence
        self.order.insert(len(self.order) if after is None else self.order.index(after) + 1, slot)
        size, prompt = len(sequence.tokens), sequence.num_prompt_tokens
        self._reserve(min(sequence.max_length, max(2 * size, size + 256)))
        self.tokens[slot, :size] = sequence.tokens
        self.logprobs[slot, prompt:size] = sequence.logprobs
        self.kept_mass[slot, prompt:size] = sequence.kept_mass
        self.length[slot], self.prompt_length[slot] = size, prompt
        self.max_length[slot] = sequence.max_length
        self.computed[slot] = self.num_pages[slot] = self.registered[slot] = self.node[slot] = 0
        params = sequence.params
        self.temperature[slot], self.seed[slot] = params.temperature, sequence.seed
        self.top_k[slot], self.top_p[slot], self.min_p[slot] = params.top_k, params.top_p, params.min_p
        self.ignore_eos[slot] = params.ignore_eos
        self.watched[slot] = bool(params.stop or params.stop_token_ids or params.logprobs)
        return slot

    def remove(self, slot: int) -> Sequence:
        """Frees the slot; the sequence takes its tokens along."""
        sequence = self.sequence[slot]
        assert sequence is not None, f"slot {slot} is empty"
        size, prompt = int(self.length[slot]), sequence.num_prompt_tokens
        sequence.tokens = self.tokens[slot, :size].copy()
        sequence.logprobs = self.logprobs[slot, prompt:size].copy()
        sequence.kept_mass = self.kept_mass[slot, prompt:size].copy()
        self.sequence[slot] = None
        self.tenancy[slot] += 1
        self.order.remove(slot)
        self._free.append(slot)
        return sequence

    def pages(self, slot: int) -> list[int]:
        return self.block_tables[slot, : self.num_pages[slot]].tolist()

    def add_pages(self, slot: int, pages: list[int]) -> None:
        start = self.num_pages[slot]
        self.block_tables[slot, start : start + len(pages)] = pages
        self.num_pages[slot] += len(pages)

    def append(self, slots: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, kept_mass: np.ndarray) -> None:
        """One sampled token per slot."""
        at = self.length[slots]
        self._reserve(int(at.max()) + 1)
        self.tokens[slots, at] = tokens
        self.logprobs[slots, at] = logprobs
        self.kept_mass[slots, at] = kept_mass
        self.length[slots] += 1

    def _reserve(self, capacity: int) -> None:
        have = self.tokens.shape[1]
        if capacity > have:
            more = max(capacity, 2 * have) - have
            self.tokens = np.pad(self.tokens, ((0, 0), (0, more)))
            self.logprobs = np.pad(self.logprobs, ((0, 0), (0, more)))
            self.kept_mass = np.pad(self.kept_mass, ((0, 0), (0, more)))
