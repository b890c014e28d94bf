"""Draws one token per row, from a counter-based uniform number: what else runs in the batch changes nothing.

# R rows, V vocabulary
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.checks import address, check
from engine.kernels.graph import empty
from engine.kernels.op import Backend, Op, cpu_backend, extension, triton_backend
from engine.kernels.token_logprob import TOKEN_LOGPROB

_MASK = (1 << 64) - 1


def hash_seed(*values: int) -> int:
    """A 64-bit number, as a signed one, that depends on every value and on their order.

    The chain mix64(mix64(a) ^ b) ... of splitmix64's finaliser (Steele, Lea, Flood 2014; Vigna). The sampler's uniform
    number is the upper 53 bits of `hash_seed(seed, counter)`.
    """
    state = 0
    for value in values:
        state = ((state ^ value) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state - (1 << 64) if state >> 63 else state


def sample_token(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    counter: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row: logits float32 [R, V] -> (tokens int32 [R], logprobs float32 [R], kept_mass float32 [R]).

    Per row [R]: `temperature` float32, 0 taking the likeliest token (the smallest id of several); `top_k` int32, 0 off;
    `top_p` float32, 1 off; `min_p` float32, 0 off; `seed` and `counter` int64, of which the uniform number is a hash.
    The token is the first id whose cumulative kept probability exceeds that number. Filters apply as in vLLM: min_p
    against the largest probability, then top_k, then top_p of what is left (the token that crosses it is kept); among
    equal logits smaller ids come first. `logprobs` are of the full softmax at the temperature (at 1 where it is 0), by
    the function that `token_logprob` uses; `kept_mass` is the probability that the filters left in (1 without any, and
    for temperature 0, which ignores them). A row with a NaN or +inf gets token -1 and NaN.
    Raises InputError for a shape or dtype that does not fit.
    """
    rows = check("logits", logits, (None, None), torch.float32).shape[0]
    check("temperature", temperature, (rows,), torch.float32, logits.device)
    check("top_k", top_k, (rows,), torch.int32, logits.device)
    check("top_p", top_p, (rows,), torch.float32, logits.device)
    check("min_p", min_p, (rows,), torch.float32, logits.device)
    check("seed", seed, (rows,), torch.int64, logits.device)
    check("counter", counter, (rows,), torch.int64, logits.device)
    return SAMPLE_TOKEN["forward", logits](logits, temperature, top_k, top_p, min_p, seed, counter)


def top_logprobs(logits: Tensor, k: int, inv_temperature: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row, likeliest first: [R, V] -> (ids int32, logprobs float32) [R, k].

    The log-probabilities are those that `sample_token` and `token_logprob` report for the same tokens, bit for bit.
    Raises InputError for k outside [1, V].
    """
    rows, vocab = check("logits", logits, (None, None), torch.float32).shape
    if not 1 <= k <= vocab:
        raise InputError(f"k is {k}; it must be between 1 and the {vocab} ids of the vocabulary")
    if inv_temperature is not None:
        check("inv_temperature", inv_temperature, (rows,), torch.float32, logits.device)
    ids = logits.topk(k, dim=-1).indices.int()
    return ids, TOKEN_LOGPROB["forward", logits](logits, ids, inv_temperature)[0]


def _forward_cpu(logits: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    tokens = empty((rows,), torch.int32)
    logprobs, kept_mass = empty((rows,), torch.float32), empty((rows,), torch.float32)
    addresses = [address(tensor) for tensor in (logits, *parameters, tokens, logprobs, kept_mass)]
    extension().sample_token(*addresses, rows, vocab)
    return tokens, logprobs, kept_mass


def _forward_torch(logits: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in plain torch and Python, one row after the other, probabilities in float64."""
    settings: list[tuple[Any, ...]] = list(zip(*(parameter.tolist() for parameter in parameters), strict=True))
    drawn = [_draw(row, *setting) for row, setting in zip(logits, settings, strict=True)]
    tokens = torch.tensor([token for token, _ in drawn], dtype=torch.int32)
    kept_mass = torch.tensor([mass for _, mass in drawn], dtype=torch.float32)
    temperature = parameters[0]
    inverse = torch.where(temperature > 0, 1 / temperature, 1.0)
    logprobs = TOKEN_LOGPROB["forward", logits](logits, tokens.clamp_min(0)[:, None], inverse)[0][:, 0]
    return tokens, torch.where(tokens < 0, math.nan, logprobs), kept_mass


def _draw(
    row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, counter: int
) -> tuple[int, float]:
    z = row * (1 / torch.tensor(temperature)) if temperature else row
    p = torch.softmax(z.double(), dim=-1)
    if p.isnan().any():
        return -1, math.nan
    if not temperature:
        return int((z == z.max()).nonzero()[0]), 1.0
    order = torch.sort(z, descending=True, stable=True).indices  # stable: smaller ids first
    length = len(row)
    if min_p > 0.0:
        length = int((z.max() - z <= -math.log(min_p)).sum())
    if top_k > 0:
        length = min(length, top_k)
    if top_p < 1.0:
        mass = p[order[:length]].cumsum(0)
        length = min(length, int((mass < top_p * mass[-1]).sum()) + 1)
    kept = torch.zeros_like(p)
    kept[order[:length]] = p[order[:length]]
    cumulative = kept.cumsum(0)
    uniform = ((hash_seed(seed, counter) & _MASK) >> 11) * 2.0**-53
    above = (cumulative > uniform * cumulative[-1]).nonzero()
    token = int(above[0]) if len(above) else int(kept.nonzero()[-1])
    return token, min(1.0, float(cumulative[-1])) if length < len(row) else 1.0


SAMPLE_TOKEN = Op(
    "sample_token",
    [
        cpu_backend({"forward": _forward_cpu}),
        triton_backend("sample_token", "forward"),
        Backend("torch", {"forward": _forward_torch}, exact=False),
    ],
)
