"""Several lanes of one batch through the model side by side: what `Transformer` offers for one.

    lane 0   start | layer 0 | layer 1 | ... | end      a lane is what a context-parallel rank would have: its rows, and
    lane 1   start | layer 0 | layer 1 | ... | end      a gradient of its own for every weight (`Weight.lane`)
                   keys go across, in every layer

The forward does not care, since a row's bits do not depend on the rows beside it; sums over tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from engine.batch import TokenBatch
from engine.kernels.weight import Weight
from engine.layers import Attention, FeedForward, Layer, Linear
from engine.model import HEAD_BUCKET, Chunk, Transformer
from engine.parallel.context import share_keys

T = TypeVar("T")


class SideBySide:
    """A model for batches in up to `num_lanes` lanes; one lane is the model as it is. All rows of a batch are those of
    its lanes, lane after lane."""

    def __init__(self, model: Transformer, num_lanes: int) -> None:
        self.model = model
        self.num_lanes = num_lanes
        self._twins = [_twin_model(model, number) for number in range(num_lanes)]

    def forward(self, lanes: Sequence[TokenBatch], stream: Tensor | None, chunk: int) -> Tensor:
        """See `Transformer.forward`; the backward adds what it has for a weight from lane i to `Weight.lane(i)`."""
        if len(lanes) == 1:
            return self.model.forward(lanes[0], stream, chunk)
        here = [model.chunks[chunk] for model in self._twins]
        parts: Sequence[Tensor | None] = [None] * len(lanes)
        if stream is not None:
            parts = stream.split([self.model.stream_shape(lane)[0] for lane in lanes])
        begun = zip(self._twins, here, lanes, parts, strict=True)
        x = [model.start(own, lane, part) for model, own, lane, part in begun]
        delta: list[Tensor | None] = [None] * len(lanes)
        for layers in zip(*(own.layers for own in here), strict=True):
            x, delta = self.model.run(layers[0].place, partial(_through, layers, lanes), *x, *delta)
        ends = zip(self._twins, here, lanes, x, delta, strict=True)
        return torch.cat([model.end(own, lane, left, right) for model, own, lane, left, right in ends])

    def stream_shape(self, lanes: Sequence[TokenBatch]) -> tuple[int, int]:
        """See `Transformer.stream_shape`."""
        return sum(self.model.stream_shape(lane)[0] for lane in lanes), self.model.config.hidden_size

    def token_logprob(
        self, hidden: Tensor, targets: Tensor, inv_temperature: Tensor | None, lane_rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """See `Transformer.token_logprob`; `lane_rows`: how many of the N rows are of each lane."""
        if len(lane_rows) == 1:
            return self.model.token_logprob(hidden, targets, inv_temperature)
        (hidden,) = self.model.told(HEAD_BUCKET, hidden)
        sizes = list(lane_rows)
        inverse = [None] * len(sizes) if inv_temperature is None else inv_temperature.split(sizes)
        lanes = zip(self._twins, hidden.split(sizes), targets.split(sizes), inverse, strict=True)
        logprobs, entropy = zip(*(model.token_logprob(*rows) for model, *rows in lanes), strict=True)
        return torch.cat(logprobs), torch.cat(entropy)


def _through(
    layers: Sequence[Layer], lanes: Sequence[TokenBatch], *streams: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """All lanes through their twins of one layer: x of each lane and then, of each, what is to be added to it."""
    count, shard = len(lanes), lanes[0].context
    assert shard is not None, "lanes are parts of one shard"
    begun = zip(layers, streams[:count], streams[count:], lanes, strict=True)
    started = [layer.start(x, delta, lane) for layer, x, delta, lane in begun]
    x, qkv = [x for x, _ in started], [qkv for _, qkv in started]
    del started
    qkv, kv = share_keys(qkv, layers[0].attention.spec, shard)
    # What is through is let go: a lane's qkv does not wait for its feed-forward part.
    pairs = list(zip(layers, lanes, strict=True))
    mixed = [layer.attention(qkv.pop(0), kv.pop(0), lane, layer.place) for layer, lane in pairs]
    ended = [layer.end(x.pop(0), mixed.pop(0), lane) for layer, lane in pairs]
    return [x for x, _ in ended], [delta for _, delta in ended]


def _twin_model(model: Transformer, number: int) -> Transformer:
    """The same model, its weights' gradients those of a lane; nothing counts its backwards."""
    twin = _twin(model, number)
    twin.backward_passed = None
    twin.layers = [_twin(layer, number) for layer in model.layers]
    at = 0
    twin.chunks = []
    for chunk in model.chunks:
        twin.chunks.append(Chunk(twin.layers[at : at + len(chunk.layers)], chunk.first, chunk.last))
        at += len(chunk.layers)
    return twin


def _twin(part: T, number: int) -> T:
    """A copy of a part of the model with other gradients; everything else is shared."""
    twin = copy(part)
    for name, value in vars(part).items():
        if isinstance(value, Weight):
            setattr(twin, name, value.lane(number))
        elif isinstance(value, Attention | FeedForward | Linear):
            setattr(twin, name, _twin(value, number))
    return twin
