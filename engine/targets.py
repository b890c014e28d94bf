"""What training asks of a sample, checked: its loss tokens, the rows that predict them, what the loss wants to know.

# N loss tokens of a sample, L tokens of it
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import InputError
from engine.kernels.token_logprob import inverse_temperature
from engine.losses import Loss
from engine.types import Sample


@dataclass
class Target:
    """The loss tokens of one sample: what they are, which rows predict them, what the loss wants to know of them."""

    sample: Sample
    inputs: list[int]  # the tokens up to the last row that predicts a loss token; later ones cannot matter to the loss
    positions: Tensor  # [N] int64: index of each loss token; row positions - 1 predicts it
    tokens: Tensor  # [N] int32
    advantages: Tensor  # [N] float32, or float64 with such a model
    old_logprobs: Tensor  # [N] likewise, NaN where not given
    ref_logprobs: Tensor  # [N] likewise, NaN where not given
    inv_temperature: float


def make_target(index: int, sample: Sample, loss: Loss, config: ModelConfig, dtype: torch.dtype) -> Target:
    """What a sample asks of the model. Raises InputError, which names the sample by its index."""
    where = f"sample {index}"
    tokens = token_ids(where, sample.tokens, config)
    length = len(tokens)
    mask = _vector(where, "loss_mask", sample.loss_mask, length)
    if not ((mask == 0) | (mask == 1)).all():
        raise InputError(f"{where}: loss_mask holds values other than 0 and 1; put weights into advantages")
    if mask[0]:
        raise InputError(f"{where}: loss_mask[0] is 1, but nothing predicts the first token; it must be 0")
    positions = mask.nonzero().flatten()
    if isinstance(sample.advantages, int | float):
        advantages = torch.full((len(positions),), float(sample.advantages), dtype=dtype)
    else:
        advantages = _vector(where, "advantages", sample.advantages, length, dtype)[positions]
    _finite(where, "advantages", advantages, positions)
    rest = (positions, length, dtype, loss)
    old = _logprobs(where, "old_logprobs", sample.old_logprobs, *rest, needed=loss.needs_old_logprobs)
    ref = _logprobs(where, "ref_logprobs", sample.ref_logprobs, *rest, needed=loss.needs_ref_logprobs)
    return Target(
        sample=sample,
        inputs=sample.tokens[: int(positions[-1])] if len(positions) else [],
        positions=positions,
        tokens=tokens[positions].int(),
        advantages=advantages,
        old_logprobs=old,
        ref_logprobs=ref,
        inv_temperature=inverse_of(sample.temperature, where),
    )


def token_ids(where: str, tokens: list[int], config: ModelConfig) -> Tensor:
    """Tokens as a vector, [L]. Raises InputError for ids outside the vocabulary and for more than the context holds."""
    if len(tokens) == 0:
        raise InputError(f"{where} has no tokens; it needs at least one")
    ids = _vector(where, "tokens", tokens, len(tokens))
    if ids.is_floating_point():
        raise InputError(f"{where}: tokens are {ids.dtype}; token ids are whole numbers")
    low, high, limit = int(ids.min()), int(ids.max()), config.vocab_size
    if low < 0 or high >= limit:
        raise InputError(f"{where} holds token id {low if low < 0 else high}; the vocabulary is 0 to {limit - 1}")
    if len(tokens) > config.max_position_embeddings:
        raise InputError(
            f"{where} has {len(tokens)} tokens; the model's context is {config.max_position_embeddings}:"
            " shorten it, or drop it"
        )
    return ids


def inverse_of(temperature: float, where: str) -> float:
    """1 / temperature, 1 for 0. Raises InputError."""
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise InputError(f"{where}: temperature is {temperature}; it must be finite and 0 (which counts as 1) or more")
    return inverse_temperature(temperature)


def temperatures(inverses: list[float], counts: list[int]) -> Tensor | None:
    """1 / temperature of every row, [N] float32; None when all are 1."""
    if all(inverse == 1.0 for inverse in inverses):
        return None
    return torch.repeat_interleave(torch.tensor(inverses, dtype=torch.float32), torch.tensor(counts))


def _vector(where: str, name: str, values: Any, length: int, dtype: torch.dtype | None = None) -> Tensor:
    try:
        vector = torch.as_tensor(values, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{where}: {name} is not a list of numbers ({error})") from None
    if tuple(vector.shape) != (length,):
        raise InputError(f"{where}: {name} has shape {tuple(vector.shape)}, but there are {length} tokens")
    return vector.detach().cpu()


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
