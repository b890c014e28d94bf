"""From hidden states to tokens: the rows of a step that a token is sampled from, how each samples, what came out.

# R rows sampled from, U distinct rows among them, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.kernels.linear import linear
from engine.kernels.memory import upload
from engine.kernels.token_logprob import inverse_temperature
from engine.model import Transformer
from engine.parallel.vocabulary import vocabulary_sample, vocabulary_top
from engine.sampler.scheduler import Step
from engine.sampler.slots import Slots

LOGITS_BYTES = 64 << 20  # logits of at most this many bytes exist at once


@dataclass
class Drawn:
    """One token for each of R rows. `alternatives[i]` are the most likely tokens of row i, where it asked for them."""

    tokens: np.ndarray  # int32 [R]; -1 where the logits were not finite
    logprobs: np.ndarray  # float32 [R]
    kept_mass: np.ndarray  # float32 [R]
    alternatives: dict[int, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def empty(cls, count: int) -> Drawn:
        return cls(np.empty(count, np.int32), np.empty(count, np.float32), np.empty(count, np.float32))


class Drawing:
    """How the rows of one step sample: taken from the slots when the step is made, as these may change before its last
    hidden states are there."""

    def __init__(self, step: Step, slots: Slots) -> None:
        chosen = step.sample_slots
        self.rows, self.forked = step.sample_rows, step.forked
        counter = (slots.length[chosen] - slots.prompt_length[chosen]).astype(np.int64)
        columns = (slots.temperature, slots.top_k, slots.top_p, slots.min_p, slots.seed)
        self._settings = [*(torch.from_numpy(column[chosen]) for column in columns), torch.from_numpy(counter)]
        self.alternatives: dict[int, int] = {}  # of row i: how many
        for index in np.flatnonzero(slots.watched[chosen]).tolist():
            if k := slots.sequence[chosen[index]].params.logprobs:  # type: ignore[union-attr]
                self.alternatives[index] = k

    def __len__(self) -> int:
        return len(self.rows)

    def distinct_rows(self) -> np.ndarray:
        """The rows that are sampled from, each once, ascending; `draw` takes the hidden states of these alone then."""
        distinct, self.rows = np.unique(self.rows, return_inverse=True)
        return distinct

    def draw(self, hidden: Tensor, model: Transformer) -> Drawn:
        """Samples from the rows of `hidden` [T, D], after the last norm. The head runs on these rows and no others."""
        vocab_size, group = model.config.vocab_size, model.mesh.tp
        chunk = max(1, LOGITS_BYTES // (4 * vocab_size))
        settings = [upload(setting, hidden.device) for setting in self._settings]
        drawn: list[tuple[Tensor, ...]] = []
        alternatives: dict[int, tuple[Tensor, Tensor]] = {}
        for begin in range(0, len(self), chunk):
            part = slice(begin, begin + chunk)
            rows = self.rows[part]
            if self.forked:
                rows, which = np.unique(rows, return_inverse=True)
            logits = linear(take_rows(hidden, rows), model.head, out_dtype=torch.float32)  # [U, this rank's V]
            if self.forked:
                logits = take_rows(logits, which)  # one row for each of R: siblings fork from one
            temperature, top_k, top_p, min_p, seed, counter = (setting[part] for setting in settings)
            drawn.append(
                vocabulary_sample(
                    logits, temperature, top_k, top_p, min_p, seed, counter, vocab_size=vocab_size, group=group
                )
            )
            for index, k in self.alternatives.items():
                if begin <= index < begin + chunk:
                    heat = upload(torch.tensor([inverse_temperature(float(self._settings[0][index]))]), hidden.device)
                    row = logits[index - begin : index - begin + 1]
                    alternatives[index] = vocabulary_top(row, k, heat, vocab_size, group)
        tokens, logprobs, kept_mass = _on_host(drawn)
        choices = {
            index: dict(zip(ids[0].tolist(), values[0].tolist(), strict=True))
            for index, (ids, values) in alternatives.items()
        }
        return Drawn(tokens, logprobs, kept_mass, choices)

    # ---- the same as one message between the stages of a pipeline ----

    @property
    def message_size(self) -> int:
        """Elements of what `pack` makes: every stage knows it beforehand."""
        return 3 * len(self) + 2 * sum(self.alternatives.values())

    def pack(self, drawn: Drawn) -> Tensor:
        """int32 [message_size]."""
        pieces = [drawn.tokens, drawn.logprobs.view(np.int32), drawn.kept_mass.view(np.int32)]
        for index in self.alternatives:
            choices = drawn.alternatives[index]
            pieces += [np.array(list(choices), np.int32), np.array(list(choices.values()), np.float32).view(np.int32)]
        return torch.from_numpy(np.concatenate(pieces))

    def unpack(self, message: Tensor) -> Drawn:
        """What was packed."""
        numbers, count = message.numpy(), len(self)
        tokens, logprobs, kept_mass = numbers[: 3 * count].reshape(3, count)
        drawn = Drawn(tokens, logprobs.view(np.float32), kept_mass.view(np.float32))
        at = 3 * count
        for index, k in self.alternatives.items():
            ids, values = numbers[at : at + k], numbers[at + k : at + 2 * k].view(np.float32)
            drawn.alternatives[index] = dict(zip(ids.tolist(), values.tolist(), strict=True))
            at += 2 * k
        return drawn


def _on_host(drawn: list[tuple[Tensor, ...]]) -> list[np.ndarray]:
    """Tokens, log-probabilities and kept masses of chunks of rows, [R] each. Where they lie on a GPU, this is the one
    place where a step waits for it."""
    if not drawn[0][0].is_cpu:
        chunks = [torch.stack([column.view(torch.int32) for column in columns]) for columns in drawn]
        tokens, *others = torch.cat(chunks, 1).cpu()
        drawn = [(tokens, *(other.view(torch.float32) for other in others))]
    if len(drawn) == 1:
        return [column.numpy() for column in drawn[0]]
    return [np.concatenate([column.numpy() for column in columns]) for columns in zip(*drawn, strict=True)]


def take_rows(x: Tensor, rows: np.ndarray) -> Tensor:
    """x[rows] on the calling thread: torch would wake a pool of its own, which competes with the kernels'."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows) and (np.diff(rows) == 1).all():
        return x[int(rows[0]) : int(rows[-1]) + 1]
    if not x.is_cpu:
        return x.index_select(0, upload(torch.from_numpy(rows), x.device))
    bits = x.view(torch.int16 if x.element_size() == 2 else torch.int32)
    return torch.from_numpy(bits.numpy()[rows]).view(x.dtype)
