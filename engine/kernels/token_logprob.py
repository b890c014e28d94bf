"""THE function for log p(token): the sampler and the trainer both end here, and equal logits give equal bits.

# T tokens, D model width, V vocabulary, R rows of logits
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.errors import InputError
from engine.kernels.checks import address, check, dtype_code
from engine.kernels.dtypes import KERNEL_DTYPES, TRITON_DTYPES, wide_dtype
from engine.kernels.graph import empty
from engine.kernels.linear import linear, linear_grad_input, linear_grad_weight_
from engine.kernels.op import Backend, Op, cpu_backend, extension, triton_backend
from engine.kernels.weight import Weight

LOGITS_ELEMENTS = 16 << 20  # of a chunk, 64 MiB: fewer rows and the head's gradient is read and written too often
GPU_LOGITS_ELEMENTS = 256 << 20  # 1 GiB: a GPU is bound by reading the head where a chunk has under some 1,000 rows


class Upstream(NamedTuple):
    """What the gradient of rows of logits is worked out from, [R] each: the targets, int32, of which -1 is in another
    shard of the vocabulary; the forward's temperature, `stats` [R, 2] and entropy; the gradients of its results."""

    targets: Tensor
    inv_temperature: Tensor | None
    stats: Tensor
    entropy: Tensor
    d_logprobs: Tensor
    d_entropy: Tensor


def token_logprob(
    hidden: Tensor, head: Weight, targets: Tensor, inv_temperature: Tensor | None = None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, softmax(inv_temperature * head @ hidden).

    `hidden` [T, D] and `head` [V, D] share a dtype; `targets` int32 [T] in [0, V); `inv_temperature` float32 [T],
    positive (`inverse_temperature` makes it), or None for ones. Returns float32 [T], float32 [T], in nats. Logits are
    float32 and exist for `chunk` rows at a time (by default `logits_rows`): the chunk changes no bit of the result.
    With float64 `hidden`, logits and results are float64. Where hidden requires grad, both outputs are differentiable:
    the backward computes the logits again, rounds their gradient to the model's dtype, and adds the head's gradient to
    `head.grad_buffer()`. A row whose logits are not finite has NaN for both. Raises InputError for a
    shape, dtype or target that does not fit; targets on a GPU are not read back, and one outside [0, V) gives NaN.
    """
    rows = hidden.shape[0]
    check("hidden", hidden, (None, head.shape[1]), head.dtype)
    check("head", head.data, tuple(head.data.shape), head.dtype, hidden.device)
    _check_targets(targets, (rows,), head.shape[0], hidden.device)
    if inv_temperature is not None:
        check("inv_temperature", inv_temperature, (rows,), torch.float32, hidden.device)
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}; it must be at least 1 row")
    chunk = chunk or logits_rows(head.shape[0], hidden.device)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _TokenLogprob.apply(hidden, head, targets, inv_temperature, chunk)
    logprobs, entropy, _ = _forward(hidden, head, targets, inv_temperature, chunk)
    return logprobs, entropy


def logits_logprob(logits: Tensor, targets: Tensor, inv_temperature: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `token_logprob` does once the logits are there: float32 [R, V], int32 [R] -> float32 [R], float32 [R].

    float64 logits give float64. Carries no gradient. Raises InputError for logits that require one, and for what does
    not fit.
    """
    check("logits", logits, (None, None), wide_dtype(logits.dtype))
    if torch.is_grad_enabled() and logits.requires_grad:
        raise InputError("logits require grad, which logits_logprob does not carry; use token_logprob or detach them")
    _check_targets(targets, (logits.shape[0],), logits.shape[1], logits.device)
    if inv_temperature is not None:
        check("inv_temperature", inv_temperature, (logits.shape[0],), torch.float32, logits.device)
    logprobs, entropy, _ = TOKEN_LOGPROB["forward", logits](logits, targets[:, None], inv_temperature)
    return logprobs[:, 0], entropy


def inverse_temperature(temperature: float) -> float:
    """1 / temperature as the sampler divides: both are rounded to float32 first. 0 (greedy) counts as 1.

    1 / 0.7 in float64 and then rounded is another number, and its log-probabilities would be too.
    """
    return float(torch.ones(()) / torch.tensor(temperature, dtype=torch.float32)) if temperature else 1.0


def logits_logprob_reference(logits: Tensor, targets: Tensor, inv_temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition in plain torch, for targets [R, n]."""
    z = logits if inv_temperature is None else logits * inv_temperature[:, None]
    logp = torch.log_softmax(z, dim=-1)
    p = logp.exp()
    return logp.gather(-1, targets.long()), -torch.where(p > 0, p * logp, p).sum(-1)


def logits_rows(vocab: int, device: torch.device) -> int:
    """Rows of logits that exist at a time by default: as make 16 Mi logits, on a GPU 256 Mi, and at least 16."""
    return max(16, (LOGITS_ELEMENTS if device.type == "cpu" else GPU_LOGITS_ELEMENTS) // vocab)


def _check_targets(targets: Tensor, shape: tuple[int, ...], vocab: int, device: torch.device) -> None:
    check("targets", targets, shape, torch.int32, device)
    if targets.is_cpu and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        wrong = ((targets < 0) | (targets >= vocab)).nonzero()[0]
        raise InputError(
            f"target {int(targets[tuple(wrong)])} at index {int(wrong[0])} is outside the vocabulary of {vocab} ids; "
            f"pass ids in [0, {vocab})"
        )


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Weight, targets: Tensor, inv_temperature: Tensor | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        ctx.backend, ctx.head, ctx.chunk = TOKEN_LOGPROB.serving(hidden), head, chunk
        ctx.set_materialize_grads(False)
        logprobs, entropy, stats = _forward(hidden, head, targets, inv_temperature, chunk)
        ctx.save_for_backward(hidden, targets, inv_temperature, stats, entropy)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        hidden, targets, inv_temperature, stats, entropy = ctx.saved_tensors
        zeros = torch.zeros_like(entropy)
        d_logprobs = zeros if d_logprobs is None else d_logprobs.contiguous()
        d_entropy = zeros if d_entropy is None else d_entropy.contiguous()
        d_hidden = empty(tuple(hidden.shape), hidden.dtype, hidden.device)
        for part in row_chunks(hidden.shape[0], ctx.chunk):
            x, inverse = hidden[part], None if inv_temperature is None else inv_temperature[part]
            logits = linear(x, ctx.head, out_dtype=wide_dtype(x.dtype))  # [c, V]
            given = Upstream(targets[part], inverse, stats[part], entropy[part], d_logprobs[part], d_entropy[part])
            d_logits = ctx.backend.functions["backward"](logits, given, x.dtype)
            d_hidden[part] = linear_grad_input(d_logits, ctx.head)  # [c, V] -> [c, D]
            linear_grad_weight_(d_logits, x, ctx.head)
        return d_hidden, None, None, None, None


def row_chunks(rows: int, chunk: int) -> list[slice]:
    """Rows [0, rows) in pieces of `chunk`."""
    return [slice(begin, min(rows, begin + chunk)) for begin in range(0, rows, chunk)]


def _forward(
    hidden: Tensor, head: Weight, targets: Tensor, inv_temperature: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [T], entropy [T] and what the backward needs [T, 2]."""
    rows, dtype = hidden.shape[0], wide_dtype(hidden.dtype)
    logprobs, entropy, stats = (
        torch.empty(shape, dtype=dtype, device=hidden.device) for shape in ((rows,), (rows,), (rows, 2))
    )
    for part in row_chunks(rows, chunk):
        logits = linear(hidden[part].detach(), head, out_dtype=dtype)  # [c, D] -> [c, V]
        inverse = None if inv_temperature is None else inv_temperature[part]
        forward = TOKEN_LOGPROB["forward", logits]
        column, entropy[part], stats[part] = forward(logits, targets[part, None], inverse)
        logprobs[part] = column[:, 0]
    return logprobs, entropy, stats


def _forward_cpu(logits: Tensor, targets: Tensor, inv_temperature: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = logits.shape
    logprobs, entropy, stats = torch.empty(targets.shape), torch.empty(rows), torch.empty(rows, 2)
    inputs = [address(tensor) for tensor in (logits, targets, inv_temperature)]
    outputs = [address(tensor) for tensor in (logprobs, entropy, stats)]
    extension().logits_logprob(*inputs, *outputs, rows, vocab, targets.shape[1])
    return logprobs, entropy, stats


def logits_gradient_cpu(logits: Tensor, given: Upstream, dtype: torch.dtype) -> Tensor:
    """Of a row's logits, or of a shard of them."""
    d_logits = logits if dtype == logits.dtype else empty(tuple(logits.shape), dtype)
    inputs = [address(tensor) for tensor in (logits, *given, d_logits)]
    extension().logits_logprob_backward(dtype_code(dtype), *inputs, *logits.shape)
    return d_logits


def _forward_torch(logits: Tensor, targets: Tensor, inv_temperature: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, entropy = logits_logprob_reference(logits, targets, inv_temperature)
    return logprobs, entropy, logits.new_zeros(logits.shape[0], 2)


def _backward_torch(logits: Tensor, given: Upstream, dtype: torch.dtype) -> Tensor:
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        outputs = logits_logprob_reference(logits, given.targets[:, None], given.inv_temperature)
        return torch.autograd.grad(outputs, logits, (given.d_logprobs[:, None], given.d_entropy))[0].to(dtype)


TOKEN_LOGPROB = Op(
    "token_logprob",
    [
        cpu_backend({"forward": _forward_cpu, "backward": logits_gradient_cpu}, KERNEL_DTYPES),
        triton_backend("token_logprob", "forward", "backward", dtypes=TRITON_DTYPES),
        # torch does not promise one order of summation for every number of rows
        Backend("torch", {"forward": _forward_torch, "backward": _backward_torch}, exact=False),
    ],
)
