"""Runs a step on the model: packed tokens in, one sampled token per finished row out.

# T tokens of the step, R rows sampled from, U distinct rows among them, D model width, V vocabulary
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.batch import KVView, TokenBatch
from engine.kernels.attention import AttentionPlan, allocate_pages
from engine.kernels.graph import Graph
from engine.kernels.linear import linear
from engine.kernels.token_logprob import inverse_temperature
from engine.model import Transformer
from engine.parallel.vocabulary import vocabulary_sample, vocabulary_top
from engine.sampler.scheduler import Step
from engine.sampler.slots import Slots

LOGITS_BYTES = 64 << 20  # logits of at most this many bytes exist at once


class Runner:
    """Owns the KV pool and the recorded forward."""

    def __init__(self, model: Transformer, num_pages: int, page_size: int, max_batch_tokens: int) -> None:
        self.model = model
        self.page_size = page_size
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in model.layers:
            keys, values = allocate_pages(num_pages, page_size, layer.attention.spec, model.dtype)
            self.keys.append(keys)
            self.values.append(values)
        self._tokens = torch.zeros(max_batch_tokens, dtype=torch.int32)
        self._plan = AttentionPlan()
        self._graph: Graph | None = None
        self._hidden: Tensor | None = None

    @torch.no_grad()
    def run(self, step: Step, slots: Slots) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, dict[int, float]]]:
        """Computes the step and samples: tokens [R], log-probabilities [R], kept mass [R], and the most likely
        alternatives of the slots that asked for them."""
        hidden = self._forward(step, slots)
        if step.copies:
            source, target = (torch.tensor(pages) for pages in zip(*step.copies, strict=True))
            for pool in (*self.keys, *self.values):
                pool[target] = pool[source]
        return self._sample(hidden, step, slots)

    def _forward(self, step: Step, slots: Slots) -> Tensor:
        num_new = step.num_new
        total = step.num_tokens
        start = np.zeros(len(num_new) + 1, dtype=np.int32)
        np.cumsum(num_new, out=start[1:])
        computed = slots.computed[step.slots]
        owner = np.repeat(np.arange(len(num_new), dtype=np.int32), num_new)
        positions = computed[owner] + (np.arange(total, dtype=np.int32) - start[owner])
        self._tokens[:total] = torch.from_numpy(slots.tokens[step.slots[owner], positions])
        context = computed + num_new
        width = int(-(-context.max() // self.page_size))
        tables = np.ascontiguousarray(slots.block_tables[step.slots, :width])
        self._plan.build(start, context, positions, tables, self.page_size)
        if not self.model.recordable:
            return self.model.forward(self._batch(total))
        if self._graph is None:
            with Graph() as graph:
                self._hidden = self.model.forward(self._batch(len(self._tokens)))
            self._graph = graph
        self._graph.replay(total)
        assert self._hidden is not None
        return self._hidden

    def _batch(self, rows: int) -> TokenBatch:
        return TokenBatch(self._tokens[:rows], self._plan, KVView(self.keys, self.values))

    def _sample(
        self, hidden: Tensor, step: Step, slots: Slots
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, dict[int, float]]]:
        vocab_size, group = self.model.config.vocab_size, self.model.mesh.tp
        chunk = max(1, LOGITS_BYTES // (4 * vocab_size))
        count = len(step.sample_slots)
        tokens = np.empty(count, dtype=np.int32)
        logprobs, kept_mass = np.empty(count, dtype=np.float32), np.empty(count, dtype=np.float32)
        alternatives: dict[int, dict[int, float]] = {}
        for begin in range(0, count, chunk):
            part = slice(begin, begin + chunk)
            chosen = step.sample_slots[part]
            rows = step.sample_rows[part]
            if step.forked:
                rows, which = np.unique(rows, return_inverse=True)
            logits = linear(take_rows(hidden, rows), self.model.head, out_dtype=torch.float32)  # [U, this rank's V]
            if step.forked:
                logits = take_rows(logits, which)  # one row for each of R: siblings fork from one
            counter = (slots.length[chosen] - slots.prompt_length[chosen]).astype(np.int64)
            columns = (slots.temperature, slots.top_k, slots.top_p, slots.min_p, slots.seed)
            temperature, top_k, top_p, min_p, seed = (torch.from_numpy(c[chosen]) for c in columns)
            settings = (temperature, top_k, top_p, min_p, seed, torch.from_numpy(counter))
            drawn = vocabulary_sample(logits, *settings, vocab_size, group)
            tokens[part], logprobs[part], kept_mass[part] = (t.numpy() for t in drawn)
            for index in np.flatnonzero(slots.watched[chosen]).tolist():
                slot = int(chosen[index])
                if k := slots.sequence[slot].params.logprobs:  # type: ignore[union-attr]
                    heat = torch.tensor([inverse_temperature(float(slots.temperature[slot]))])
                    ids, values = vocabulary_top(logits[index : index + 1], k, heat, vocab_size, group)
                    alternatives[slot] = dict(zip(ids[0].tolist(), values[0].tolist(), strict=True))
        return tokens, logprobs, kept_mass, alternatives


def take_rows(x: Tensor, rows: np.ndarray) -> Tensor:
    """x[rows] on the calling thread: torch would wake a pool of its own, which competes with the kernels'."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows) and (np.diff(rows) == 1).all():
        return x[int(rows[0]) : int(rows[-1]) + 1]
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return torch.from_numpy(bits.numpy()[rows]).view(x.dtype)
