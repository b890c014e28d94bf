"""Gradient steps on the weights that the sampler reads: samples to micro-batches to one forward and one backward each.

# T tokens of a micro-batch, N loss tokens of it, L tokens of a sample
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.batch import TokenBatch
from engine.config import EngineConfig
from engine.errors import EngineError, InputError, NumericsError
from engine.kernels.dtypes import wide_dtype
from engine.kernels.op import cpu_missing
from engine.kernels.token_logprob import inverse_temperature
from engine.losses import Loss, LossBatch, LossConfig, LossFunction, LossMetrics
from engine.model import Transformer
from engine.optim import AdamW
from engine.packing import pack
from engine.types import Sample, StepStats, TrainStats


@contextmanager
def _torch_on_one_thread() -> Iterator[None]:
    """Leaves the cores to the kernels' own threads.

    Threads of torch's pool spin between the few small operations that training leaves to torch, on the cores that the
    kernels want: on two busy cores a step of a tiny model took 4 times the processor time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(before if cpu_missing() else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Target:
    """The loss tokens of one sample: what they are, which rows predict them, what the loss wants to know of them."""

    sample: Sample
    inputs: list[int]  # the tokens up to the last row that predicts a loss token; later ones cannot matter to the loss
    positions: Tensor  # [N] int64: index of each loss token; row positions - 1 predicts it
    tokens: Tensor  # [N] int32
    advantages: Tensor  # [N] float32, or float64 with such a model
    old_logprobs: Tensor  # [N] likewise, NaN where not given
    ref_logprobs: Tensor  # [N] likewise, NaN where not given
    inv_temperature: float


@dataclass
class _Totals:
    """What one `forward_backward` gathers over its micro-batches."""

    num_loss_tokens: int
    num_loss_samples: int
    metrics: LossMetrics
    losses: list[float]
    max_difference: float | None = None


class Trainer:
    """Accumulates gradients over any number of `forward_backward`, then steps them with `optim_step`.

    The model's weights are the sampler's own: the step writes them in place and raises `weight_version`.
    """

    def __init__(self, model: Transformer, config: EngineConfig) -> None:
        self.model = model
        self.config = config
        self.dtype = wide_dtype(model.dtype)  # of log-probabilities, losses and what they are computed from
        self.optimizer = AdamW(model.weights(), config.optimizer)
        self.weight_version = 0
        self.num_accumulated = 0  # forward_backward calls since the last step
        model.checkpointing = config.activation_checkpointing

    @_torch_on_one_thread()
    def forward_backward(self, samples: Sequence[Sample], loss: str | LossConfig | LossFunction) -> TrainStats:
        """Adds the gradient of the loss over all samples to what has been accumulated.

        The loss of every token is scaled by counts over all samples of the call, so the gradient does not depend on
        how they were packed into micro-batches. Token i of a sample is predicted by row i - 1. `TrainStats.logprobs`
        holds, per sample, [L - 1] float32 on the CPU: entry i - 1 is log p(token i) at the sample's temperature where
        loss_mask[i] is 1, and NaN where it is 0. Samples without a loss token do not run.

        Raises InputError, ConfigError: nothing has run, what was accumulated stays. Raises NumericsError for a loss
        that is not finite; then, and after an interrupt or an error in a loss of one's own, gradients accumulated so
        far are dropped.
        """
        ready = Loss(loss)
        if not samples:
            raise InputError("forward_backward got no samples; pass at least one")
        targets = [self._target(index, sample, ready) for index, sample in enumerate(samples)]
        chosen = [index for index, target in enumerate(targets) if len(target.positions)]
        if not chosen:
            raise InputError(
                f"none of the {len(samples)} samples has a token with loss_mask 1; there is nothing to train"
            )
        totals = _Totals(sum(len(targets[i].positions) for i in chosen), len(chosen), LossMetrics(), [])
        packing = pack([len(targets[i].inputs) for i in chosen], self.config.train_batch_tokens)
        logprobs = [torch.full((len(sample.tokens) - 1,), math.nan, dtype=self.dtype) for sample in samples]
        try:
            for members in packing.bins:
                batch = [chosen[i] for i in members]
                values = self._micro_batch([targets[i] for i in batch], ready, totals)
                for index, value in zip(batch, values, strict=True):
                    logprobs[index][targets[index].positions - 1] = value
        except BaseException:
            self.zero_grad()
            raise
        self.num_accumulated += 1
        metrics = totals.metrics.result()
        metrics |= {"micro_batches": float(len(packing.bins)), "packing_fill": packing.fill}
        versions = [sample.weight_version for sample in samples if sample.weight_version is not None]
        if versions:
            metrics["max_staleness"] = float(self.weight_version - min(versions))
        return TrainStats(
            loss=math.fsum(totals.losses),  # correctly rounded: the order of samples does not show
            num_tokens=packing.num_tokens,
            num_loss_tokens=totals.num_loss_tokens,
            max_abs_logprob_difference=totals.max_difference,
            metrics=metrics,
            logprobs=logprobs,
        )

    @_torch_on_one_thread()
    def optim_step(self, learning_rate: float) -> StepStats:
        """Clips, steps AdamW, writes the compute weights in place, raises `weight_version`, zeroes the gradients.

        Raises InputError when there is no gradient or the rate cannot be used, NumericsError when the gradient is not
        finite (no step is taken, the gradients are dropped), EngineError after a step that was interrupted.
        """
        if self.optimizer.interrupted:
            raise EngineError("the last optimizer step was interrupted half-way; load a saved state")
        if not self.num_accumulated:
            raise InputError("there is no gradient to step with; call forward_backward first")
        try:
            norm = self.optimizer.step(learning_rate)
        except NumericsError:
            self.num_accumulated = 0
            raise
        self.num_accumulated = 0
        self.weight_version += 1
        return StepStats(norm, learning_rate, self.weight_version)

    def zero_grad(self) -> None:
        """Drops what has been accumulated."""
        self.optimizer.zero_grad()
        self.num_accumulated = 0

    @_torch_on_one_thread()
    @torch.no_grad()
    def score(self, sequences: Sequence[list[int]], temperature: float = 1.0) -> list[Tensor]:
        """log p of each token after the first, [len - 1] float32 each, by the training forward, in micro-batches.

        Raises InputError.
        """
        inverse = _inverse(temperature, "score")
        for index, tokens in enumerate(sequences):
            self._token_ids(f"sequence {index}", tokens)
        scored = [torch.empty(0, dtype=self.dtype)] * len(sequences)
        chosen = [index for index, tokens in enumerate(sequences) if len(tokens) > 1]
        packing = pack([len(sequences[i]) - 1 for i in chosen], self.config.train_batch_tokens)
        for members in packing.bins:
            batch = [sequences[chosen[i]] for i in members]
            hidden = self.model.forward(self._packed([tokens[:-1] for tokens in batch]))  # [T, D]
            targets = torch.tensor([token for tokens in batch for token in tokens[1:]], dtype=torch.int32)
            logprobs, _ = self.model.token_logprob(hidden, targets, _temperatures([inverse], [len(targets)]))
            pieces = logprobs.split([len(tokens) - 1 for tokens in batch])
            for i, piece in zip(members, pieces, strict=True):
                scored[chosen[i]] = piece.clone()
        return scored

    def _micro_batch(self, targets: list[_Target], loss: Loss, totals: _Totals) -> list[Tensor]:
        """Forward and backward of samples that share a micro-batch; the log-probability of each loss token."""
        counts = [len(target.positions) for target in targets]
        with torch.inference_mode(False), torch.enable_grad():
            hidden = self.model.forward(self._packed([target.inputs for target in targets]))  # [T, D]
            starts = torch.tensor([0] + [len(target.inputs) for target in targets]).cumsum(0)
            rows = torch.cat([start + t.positions - 1 for start, t in zip(starts, targets, strict=False)])  # [N]
            if len(rows) < hidden.shape[0]:
                hidden = hidden.index_select(0, rows)  # [T, D] -> [N, D]
            inverse = _temperatures([target.inv_temperature for target in targets], counts)
            tokens = torch.cat([target.tokens for target in targets])
            logprobs, entropy = self.model.token_logprob(hidden, tokens, inverse)
            batch = LossBatch(
                logprobs=logprobs,
                entropy=entropy,
                advantages=torch.cat([target.advantages for target in targets]),
                old_logprobs=torch.cat([target.old_logprobs for target in targets]),
                ref_logprobs=torch.cat([target.ref_logprobs for target in targets]),
                positions=torch.cat([target.positions for target in targets]),
                sequence_ids=torch.repeat_interleave(torch.tensor(counts)),
                cu_seqlens=torch.tensor([0, *counts]).cumsum(0),
                samples=[target.sample for target in targets],
                num_loss_tokens=totals.num_loss_tokens,
                num_loss_samples=totals.num_loss_samples,
            )
            losses, cut = loss.per_token(batch)  # [N]
            weights = loss.token_weights(batch)  # [N]
            if not losses.isfinite().all():
                raise NumericsError(_describe_not_finite(batch, losses))
            (losses * weights.to(losses.dtype)).sum().backward()
        totals.losses += (losses.detach().double() * weights).tolist()
        totals.metrics.add(batch, cut)
        difference = (logprobs.detach() - batch.old_logprobs).abs()
        difference = difference[~difference.isnan()]
        if len(difference):
            totals.max_difference = max(totals.max_difference or 0.0, float(difference.max()))
        return list(logprobs.detach().split(counts))

    def _packed(self, sequences: list[list[int]]) -> TokenBatch:
        return TokenBatch.packed(sequences, scattered=self.model.placement.sequence_parallel)

    def _target(self, index: int, sample: Sample, loss: Loss) -> _Target:
        where = f"sample {index}"
        tokens = self._token_ids(where, sample.tokens)
        length = len(tokens)
        mask = _vector(where, "loss_mask", sample.loss_mask, length)
        if not ((mask == 0) | (mask == 1)).all():
            raise InputError(f"{where}: loss_mask holds values other than 0 and 1; put weights into advantages")
        if mask[0]:
            raise InputError(f"{where}: loss_mask[0] is 1, but nothing predicts the first token; it must be 0")
        positions = mask.nonzero().flatten()
        if isinstance(sample.advantages, int | float):
            advantages = torch.full((len(positions),), float(sample.advantages), dtype=self.dtype)
        else:
            advantages = _vector(where, "advantages", sample.advantages, length, self.dtype)[positions]
        _finite(where, "advantages", advantages, positions)
        rest = (positions, length, self.dtype, loss)
        old = _logprobs(where, "old_logprobs", sample.old_logprobs, *rest, needed=loss.needs_old_logprobs)
        ref = _logprobs(where, "ref_logprobs", sample.ref_logprobs, *rest, needed=loss.needs_ref_logprobs)
        return _Target(
            sample=sample,
            inputs=sample.tokens[: int(positions[-1])] if len(positions) else [],
            positions=positions,
            tokens=tokens[positions].int(),
            advantages=advantages,
            old_logprobs=old,
            ref_logprobs=ref,
            inv_temperature=_inverse(sample.temperature, where),
        )

    def _token_ids(self, where: str, tokens: list[int]) -> Tensor:
        if len(tokens) == 0:
            raise InputError(f"{where} has no tokens; it needs at least one")
        ids = _vector(where, "tokens", tokens, len(tokens))
        if ids.is_floating_point():
            raise InputError(f"{where}: tokens are {ids.dtype}; token ids are whole numbers")
        low, high, limit = int(ids.min()), int(ids.max()), self.model.config.vocab_size
        if low < 0 or high >= limit:
            raise InputError(f"{where} holds token id {low if low < 0 else high}; the vocabulary is 0 to {limit - 1}")
        if len(tokens) > self.model.config.max_position_embeddings:
            raise InputError(
                f"{where} has {len(tokens)} tokens; the model's context is {self.model.config.max_position_embeddings}:"
                " shorten it, or drop it"
            )
        return ids


def _vector(where: str, name: str, values: Any, length: int, dtype: torch.dtype | None = None) -> Tensor:
    try:
        vector = torch.as_tensor(values, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{where}: {name} is not a list of numbers ({error})") from None
    if tuple(vector.shape) != (length,):
        raise InputError(f"{where}: {name} has shape {tuple(vector.shape)}, but there are {length} tokens")
    return vector.detach()


def _finite(where: str, name: str, values: Tensor, positions: Tensor) -> None:
    if not values.isfinite().all():
        at = int((~values.isfinite()).nonzero()[0])
        raise InputError(f"{where}: {name}[{int(positions[at])}] is {float(values[at])}; it must be finite")


def _logprobs(
    where: str, name: str, values: Any, positions: Tensor, length: int, dtype: torch.dtype, loss: Loss, *, needed: bool
) -> Tensor:
    """Log-probabilities of the loss tokens, [N] of `dtype`; NaN where the sample has none and the loss needs none."""
    if values is None:
        if needed and len(positions):
            remedy = "pass Completion.logprobs" if name == "old_logprobs" else "score the tokens with the reference"
            raise InputError(f'{where} has no {name}, which the loss "{loss.name}" needs; {remedy}')
        return torch.full((len(positions),), math.nan, dtype=dtype)
    vector = _vector(where, name, values, length, dtype)[positions]
    _finite(where, name, vector, positions)
    if len(vector) and vector.max() > 1e-3:  # a softmax may round to just above 0; a placeholder is far above
        at = int(vector.argmax())
        raise InputError(
            f"{where}: {name}[{int(positions[at])}] is {float(vector[at])}; a log-probability is at most 0"
        )
    return vector


def _inverse(temperature: float, where: str) -> float:
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise InputError(f"{where}: temperature is {temperature}; it must be finite and 0 (which counts as 1) or more")
    return inverse_temperature(temperature)


def _temperatures(inverses: list[float], counts: list[int]) -> Tensor | None:
    """1 / temperature of every row, [N] float32; None when all are 1."""
    if all(inverse == 1.0 for inverse in inverses):
        return None
    return torch.repeat_interleave(torch.tensor(inverses, dtype=torch.float32), torch.tensor(counts))


def _describe_not_finite(batch: LossBatch, losses: Tensor) -> str:
    row = int((~losses.isfinite()).nonzero()[0])
    return (
        f"the loss of token {int(batch.positions[row])} of a sample is {losses[row].item()} (log-probability "
        f"{batch.logprobs[row].item()}, advantage {float(batch.advantages[row])}, old log-probability "
        f"{float(batch.old_logprobs[row])}); gradients were dropped: check the weights for NaN and infinity"
    )
