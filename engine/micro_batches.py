"""Micro-batches through the stages of the pipeline (one stage is a pipeline too): forwards, losses, backwards.

Every rank of a replica knows all samples. The last stage sees the hidden states, and tells the others what came out.

# T tokens of a micro-batch, N loss tokens of it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.batch import TokenBatch
from engine.config import ParallelConfig
from engine.errors import EngineError, NumericsError, ParallelError
from engine.kernels.memory import read_vectors, upload
from engine.losses import Loss, LossBatch, LossMetrics
from engine.model import Transformer
from engine.parallel.collectives import broadcast_object
from engine.parallel.context import choose_rows
from engine.parallel.pipeline import run_pipeline
from engine.parallel.schedule import forwards_only, schedule
from engine.side_by_side import SideBySide
from engine.targets import Target, temperatures

T = TypeVar("T")


@dataclass
class Totals:
    """What one `forward_backward` gathers over its micro-batches. The two counts are of the whole call, the rest is of
    what ran here until `merge` brings the other replicas'."""

    num_loss_tokens: int
    num_loss_samples: int
    metrics: LossMetrics
    losses: list[float]
    max_difference: float | None = None

    def saw(self, difference: float | None) -> None:
        """Of differences to old log-probabilities, the largest counts."""
        if difference is not None:
            self.max_difference = max(self.max_difference or 0.0, difference)

    def merge(self, other: Totals) -> None:
        self.metrics.merge(other.metrics)
        self.losses += other.losses
        self.saw(other.max_difference)


class MicroBatches:
    """Runs lists of micro-batches on this replica; every rank of it makes the same calls and gets the whole result."""

    def __init__(self, model: Transformer, config: ParallelConfig) -> None:
        self.model = model
        self.config = config
        self.lanes = SideBySide(model, (config.context_lanes or model.mesh.cp.size) // model.mesh.cp.size)

    @property
    def context_lanes(self) -> int:
        """In how many lanes gradients are summed, on all context-parallel ranks together."""
        return self.lanes.num_lanes * self.model.mesh.cp.size

    @context_lanes.setter
    def context_lanes(self, num_lanes: int) -> None:
        self.lanes = SideBySide(self.model, num_lanes // self.model.mesh.cp.size)

    def learn(self, batches: list[list[Target]], loss: Loss, totals: Totals) -> list[list[Tensor]]:
        """Forwards and backwards; the log-probabilities of each sample's loss tokens, for each micro-batch. Adds what
        was seen to `totals`.

        Raises NumericsError for a loss that is not finite and what a loss of one's own raises, after all stages have
        gone through all micro-batches: those that see no loss raise it too, as an EngineError that describes it.
        """
        seen = Totals(totals.num_loss_tokens, totals.num_loss_samples, LossMetrics(), [])
        values: dict[int, list[Tensor]] = {}
        failure: Exception | None = None

        def finish(number: int, hidden: Tensor) -> Tensor:
            nonlocal failure
            if failure is None:
                try:
                    total, values[number] = self._loss(packed[number], hidden, batches[number], loss, seen)
                    return total
                except Exception as error:
                    if self.model.mesh.pp.size == 1:
                        raise
                    failure = error
            return hidden.sum() * 0.0  # the stages before wait for a gradient

        with torch.inference_mode(False):
            packed = [self._packed([target.inputs for target in targets], self.lanes.num_lanes) for targets in batches]
            self._run(packed, finish, learns=True)
        outcome = (seen, values, failure and described(failure, "on the last pipeline stage"))
        seen, values, told = self._from_last_stage(outcome)
        if told is not None:
            raise failure or told
        totals.merge(seen)
        return [values[number] for number in range(len(batches))]

    def score(self, batches: list[list[list[int]]], inverse_temperature: float) -> list[list[Tensor]]:
        """log p of each token after the first, for each sequence of each micro-batch. Call it without grad."""
        scored: dict[int, list[Tensor]] = {}

        def finish(number: int, hidden: Tensor) -> Tensor:
            tokens = torch.tensor([token for s in batches[number] for token in s[1:]], dtype=torch.int32)
            inverse = temperatures([inverse_temperature], [len(tokens)])
            logprobs, _ = self._predictions(packed[number], hidden, torch.arange(len(tokens)), tokens, inverse)
            scored[number] = list(logprobs.cpu().split([len(s) - 1 for s in batches[number]]))
            return logprobs

        packed = [self._packed([s[:-1] for s in sequences], 1) for sequences in batches]
        self._run(packed, finish, learns=False)
        scored = self._from_last_stage(scored)
        return [scored[number] for number in range(len(batches))]

    def _run(self, batches: list[list[TokenBatch]], finish: Callable[[int, Tensor], Tensor], learns: bool) -> None:
        """Micro-batches through the stages of the pipeline, and back where there is something to learn.
        `finish(number, hidden)` makes a loss of the hidden states, on the last stage."""
        if not batches:
            return
        model, stages = self.model, self.model.mesh.pp.size
        alone = stages == len(model.chunks) == 1
        name = "1f1b" if alone else self.config.schedule  # alone, schedules differ in memory only
        plan = schedule(name, stages, len(batches), len(model.chunks))

        def forward(number: int, chunk: int, stream: Tensor | None) -> Tensor:
            out = self.lanes.forward(batches[number], stream, chunk)
            return finish(number, out) if model.chunks[chunk].last else out

        shapes = [self.lanes.stream_shape(batch) for batch in batches]
        plan = plan if learns else forwards_only(plan)
        run_pipeline(plan, model.mesh.links, forward, shapes, model.dtype, model.device)

    def _loss(
        self, packed: list[TokenBatch], hidden: Tensor, targets: list[Target], loss: Loss, totals: Totals
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss of samples that share a micro-batch, from its hidden states [T, D], and the log-probabilities of
        their loss tokens."""
        counts = [len(target.positions) for target in targets]
        starts = torch.tensor([0] + [len(target.inputs) for target in targets]).cumsum(0)
        rows = torch.cat([start + t.positions - 1 for start, t in zip(starts, targets, strict=False)])  # [N]
        inverse = temperatures([target.inv_temperature for target in targets], counts)
        tokens = torch.cat([target.tokens for target in targets])
        logprobs, entropy = self._predictions(packed, hidden, rows, tokens, inverse)
        facts: dict[str, Any] = {  # on the CPU
            "advantages": torch.cat([target.advantages for target in targets]),
            "old_logprobs": torch.cat([target.old_logprobs for target in targets]),
            "ref_logprobs": torch.cat([target.ref_logprobs for target in targets]),
            "positions": torch.cat([target.positions for target in targets]),
            "sequence_ids": torch.repeat_interleave(torch.tensor(counts)),
            "cu_seqlens": torch.tensor([0, *counts]).cumsum(0),
        }
        there: dict[str, Any] = {name: upload(values, self.model.device) for name, values in facts.items()}
        rest: dict[str, Any] = {
            "samples": [target.sample for target in targets],
            "num_loss_tokens": totals.num_loss_tokens,
            "num_loss_samples": totals.num_loss_samples,
        }
        batch = LossBatch(logprobs=logprobs, entropy=entropy, **there, **rest)
        losses, cut = loss.per_token(batch)  # [N]
        total = (losses * loss.token_weights(batch).to(losses.dtype)).sum()
        logprobs, entropy, losses, *flags = read_vectors([logprobs, entropy, losses, *([] if cut is None else [cut])])
        batch = LossBatch(logprobs=logprobs, entropy=entropy, **facts, **rest)
        if not losses.isfinite().all():
            raise NumericsError(_describe_not_finite(batch, losses))
        totals.losses += (losses.double() * loss.token_weights(batch)).tolist()
        totals.metrics.add(batch, flags[0] if flags else None)
        difference = (logprobs - batch.old_logprobs).abs()
        difference = difference[~difference.isnan()]
        totals.saw(float(difference.max()) if len(difference) else None)
        return total, list(logprobs.split(counts))

    def _predictions(
        self, packed: list[TokenBatch], hidden: Tensor, rows: Tensor, tokens: Tensor, inverse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [N] of `tokens` [N], which the micro-batch's `rows` [N] predict, from the hidden
        states of the rows that are here."""
        choice = choose_rows(rows, packed[0].context)
        hidden = choice.take(hidden)  # [T, D] -> [rows of the N that are here, D]
        mine, device = choice.mine, self.model.device
        inverse = None if inverse is None else upload(inverse[mine], device)
        return choice.whole(*self.lanes.token_logprob(hidden, upload(tokens[mine], device), inverse, choice.counts))

    def _packed(self, sequences: list[list[int]], num_lanes: int) -> list[TokenBatch]:
        """What this rank computes of the sequences, in lanes."""
        model = self.model
        return TokenBatch.lanes(sequences, model.placement.sequence_parallel, model.mesh.cp, num_lanes, model.device)

    def _from_last_stage(self, value: T) -> T:
        return broadcast_object(value, self.model.mesh.pp, self.model.mesh.pp.size - 1)


def described(failure: Exception, where: str) -> EngineError:
    """What the other ranks raise."""
    if isinstance(failure, EngineError):
        return type(failure)(f"{failure} ({where})")
    return ParallelError(f"{type(failure).__name__} {where} ({failure}); gradients were dropped on all ranks")


def _describe_not_finite(batch: LossBatch, losses: Tensor) -> str:
    row = int((~losses.isfinite()).nonzero()[0])
    return (
        f"the loss of token {int(batch.positions[row])} of a sample is {losses[row].item()} (log-probability "
        f"{batch.logprobs[row].item()}, advantage {float(batch.advantages[row])}, old log-probability "
        f"{float(batch.old_logprobs[row])}); gradients were dropped: check the weights for NaN and infinity"
    )
