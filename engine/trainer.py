"""Gradient steps on the weights that the sampler reads: samples to lanes, lanes to micro-batches, and one forward and
one backward for each of these.

# T tokens of a micro-batch, N loss tokens of it, L tokens of a sample
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import EngineError, InputError, NumericsError, ParallelError
from engine.kernels.dtypes import wide_dtype
from engine.kernels.op import cpu_missing
from engine.losses import Loss, LossConfig, LossFunction, LossMetrics
from engine.micro_batches import MicroBatches, Totals, described
from engine.model import Transformer
from engine.optim import AdamW
from engine.packing import Packing, pack_at_least
from engine.parallel.collectives import all_gather_object, start_all_gather_pieces
from engine.parallel.data import GradientReducer, in_place
from engine.parallel.lanes import deal, rounds, sequence_cost
from engine.parallel.ownership import Shares, row_blocks
from engine.targets import Target, inverse_of, make_target, token_ids
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
class _Lane:
    """Samples whose gradients are summed by themselves before they join the others."""

    members: list[int]  # sample indices
    packing: Packing  # its bins hold indices into `members`

    def micro_batches(self, targets: list[Target]) -> list[list[Target]]:
        return [[targets[self.members[i]] for i in members] for members in self.packing.bins]


class Trainer:
    """Accumulates gradients over any number of `forward_backward`, then steps them with `optim_step`.

    The model's weights are the sampler's own: the step writes them in place and raises `weight_version`. Samples are
    dealt to `gradient_lanes` lanes, and these to the data-parallel replicas; every rank makes the same calls and gets
    the whole result.
    """

    def __init__(self, model: Transformer, config: EngineConfig) -> None:
        self.model = model
        self.config = config
        self.micro_batches = MicroBatches(model, config.parallel)
        self.dtype = wide_dtype(model.dtype)  # of log-probabilities, losses and what they are computed from
        self.weight_version = 0
        self.num_accumulated = 0  # forward_backward calls since the last step
        model.checkpointing = config.activation_checkpointing
        self._lanes = config.parallel.gradient_lanes or model.mesh.dp.size
        self._check_context_lanes(self.context_lanes)
        self.reducer = self._reducer()
        self.optimizer = AdamW(self.reducer.shares, config.optimizer)

    @property
    def gradient_lanes(self) -> int:
        """In how many lanes a gradient is summed. Lanes, not ranks, decide its bits, so a run that goes on with another
        number of replicas keeps them. Setting it raises EngineError while a gradient has been accumulated."""
        return self._lanes

    @gradient_lanes.setter
    def gradient_lanes(self, lanes: int) -> None:
        if lanes < 1:
            raise InputError(f"gradient_lanes is {lanes}; it must be at least 1")
        if self.num_accumulated:
            raise EngineError("gradient_lanes cannot change between forward_backward and optim_step; step first")
        self._lanes = lanes
        self.reducer = self._reducer()
        self.optimizer.shares = self.reducer.shares

    @property
    def context_lanes(self) -> int:
        """In how many lanes the tokens of a micro-batch are summed: for context parallelism what `gradient_lanes` is
        for data parallelism."""
        return self.micro_batches.context_lanes

    @context_lanes.setter
    def context_lanes(self, lanes: int) -> None:
        self._check_context_lanes(lanes)
        if self.num_accumulated:
            raise EngineError("context_lanes cannot change between forward_backward and optim_step; step first")
        self.micro_batches.context_lanes = lanes
        self.reducer = self._reducer()
        self.optimizer.shares = self.reducer.shares

    def _check_context_lanes(self, lanes: int) -> None:
        cp = self.model.mesh.cp.size
        if lanes < 1 or lanes % cp:
            raise InputError(f"context_lanes is {lanes}; it must be a multiple of the {cp} context-parallel ranks")

    def _reducer(self) -> GradientReducer:
        model, mesh, lanes = self.model, self.model.mesh, self._lanes
        each = self.context_lanes // mesh.cp.size
        blocks, groups, tied = row_blocks(model.parts()), model.gradient_buckets(), model.tied_weights
        shares = Shares(blocks, groups, mesh, in_place(mesh, lanes * each), tied)
        reducer = GradientReducer(shares, mesh, lanes, model.partial_gradients(), tied, each)
        model.backward_passed = None if reducer.in_place else reducer.backward_passed
        return reducer

    @_torch_on_one_thread()
    def forward_backward(self, samples: Sequence[Sample], loss: str | LossConfig | LossFunction) -> TrainStats:
        """Adds the gradient of the loss over all samples to what has been accumulated.

        The loss of every token is scaled by counts over all samples of the call, so the gradient does not depend on
        how they were dealt to lanes and packed into micro-batches, but for rounding, which depends on these alone and
        not on the number of ranks. Token i of a sample is predicted by row i - 1. `TrainStats.logprobs`
        holds, per sample, [L - 1] float32 on the CPU: entry i - 1 is log p(token i) at the sample's temperature where
        loss_mask[i] is 1, and NaN where it is 0. Samples without a loss token do not run.

        Raises InputError, ConfigError: nothing has run, what was accumulated stays. Raises NumericsError for a loss
        that is not finite; then, and after an interrupt or an error in a loss of one's own, gradients accumulated so
        far are dropped. What one replica raises, all raise; ParallelError for what is no EngineError.
        """
        ready = Loss(loss)
        if not samples:
            raise InputError("forward_backward got no samples; pass at least one")
        targets = [
            make_target(index, sample, ready, self.model.config, self.dtype) for index, sample in enumerate(samples)
        ]
        chosen = [index for index, target in enumerate(targets) if len(target.positions)]
        if not chosen:
            raise InputError(
                f"none of the {len(samples)} samples has a token with loss_mask 1; there is nothing to train"
            )
        totals = Totals(sum(len(targets[i].positions) for i in chosen), len(chosen), LossMetrics(), [])
        lanes = self._deal(targets, chosen)
        logprobs = [torch.full((len(sample.tokens) - 1,), math.nan, dtype=self.dtype) for sample in samples]
        try:
            for index, value in self._run_lanes(lanes, targets, ready, totals):
                logprobs[index][targets[index].positions - 1] = value
        except BaseException:
            self.zero_grad()
            raise
        self.num_accumulated += 1
        packings = [lane.packing for lane in lanes]
        num_tokens = sum(packing.num_tokens for packing in packings)
        metrics = totals.metrics.result()
        metrics["micro_batches"] = float(sum(len(packing.bins) for packing in packings))
        metrics["packing_fill"] = num_tokens / sum(packing.room for packing in packings)
        versions = [sample.weight_version for sample in samples if sample.weight_version is not None]
        if versions:
            metrics["max_staleness"] = float(self.weight_version - min(versions))
        return TrainStats(
            loss=math.fsum(totals.losses),  # correctly rounded: the order of samples does not show
            num_tokens=num_tokens,
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
        self.reducer.reset()
        self.num_accumulated = 0

    @_torch_on_one_thread()
    @torch.no_grad()
    def score(self, sequences: Sequence[list[int]], temperature: float = 1.0) -> list[Tensor]:
        """log p of each token after the first, [len - 1] float32 each, by the training forward, in micro-batches.

        Raises InputError.
        """
        inverse = inverse_of(temperature, "score")
        for index, tokens in enumerate(sequences):
            token_ids(f"sequence {index}", tokens, self.model.config)
        dp = self.model.mesh.dp
        empty = torch.empty(0, dtype=self.dtype)
        scored = [empty] * len(sequences)
        chosen = [index for index, tokens in enumerate(sequences) if len(tokens) > 1]
        lengths = [len(sequences[i]) - 1 for i in chosen]
        shares = self._lanes_of(lengths, dp.size)
        mine = shares[dp.index]
        batches = [[sequences[chosen[mine.members[i]]] for i in members] for members in mine.packing.bins]
        here = [empty] * len(mine.members)
        for members, values in zip(mine.packing.bins, self.micro_batches.score(batches, inverse), strict=True):
            for i, value in zip(members, values, strict=True):
                here[i] = value
        sizes = [share.packing.num_tokens for share in shares]
        everyone = start_all_gather_pieces(torch.cat([empty, *here]), dp, sizes).wait()
        order = [i for share in shares for i in share.members]
        for i, value in zip(order, everyone.split([lengths[i] for i in order]), strict=True):
            scored[chosen[i]] = value.clone()
        return scored

    def _deal(self, targets: list[Target], chosen: list[int]) -> list[_Lane]:
        """Every lane of a call: the same on every rank, and on any number of them."""
        lanes = self._lanes_of([len(targets[i].inputs) for i in chosen], self.gradient_lanes)
        return [_Lane([chosen[i] for i in lane.members], lane.packing) for lane in lanes]

    def _lanes_of(self, lengths: list[int], num_lanes: int) -> list[_Lane]:
        width, least = self.model.config.hidden_size, self.config.parallel.least_micro_batches
        lanes = []
        for members in deal([sequence_cost(length, width) for length in lengths], num_lanes):
            packing = pack_at_least([lengths[i] for i in members], self.config.train_batch_tokens, least)
            lanes.append(_Lane(members, packing))
        return lanes

    def _run_lanes(
        self, lanes: list[_Lane], targets: list[Target], loss: Loss, totals: Totals
    ) -> list[tuple[int, Tensor]]:
        """Runs this replica's lanes in their rounds and puts all gradients into the sum; what every replica saw is in
        `totals` then. Returns index and log-probabilities of each sample. A replica that fails goes on sending what
        the others wait for, and all raise when they have told each other."""
        dp, reducer = self.model.mesh.dp, self.reducer
        seen: list[Tensor] = []
        failure: Exception | None = None
        reducer.begin()
        for now in rounds(len(lanes), dp.size):
            here = lanes[now[dp.index]] if dp.index < len(now) else None
            live = [i < len(now) and bool(lanes[now[i]].members) for i in range(dp.size)]
            batches = here.micro_batches(targets) if here else []
            reducer.begin_lane(len(batches), live)
            if here and failure is None:
                try:
                    values = self.micro_batches.learn(batches, loss, totals)
                    by_member = dict(zip(itertools.chain(*here.packing.bins), itertools.chain(*values), strict=True))
                    seen += [by_member[i] for i in range(len(here.members))]
                except ParallelError:
                    raise  # the ranks are no longer in step: there is nobody to tell it
                except Exception as error:
                    failure = error
            reducer.finish_lane()
        reducer.finish()
        return self._exchange(lanes, targets, totals, seen, failure)

    def _exchange(
        self,
        lanes: list[_Lane],
        targets: list[Target],
        totals: Totals,
        seen: list[Tensor],
        failure: Exception | None,
    ) -> list[tuple[int, Tensor]]:
        """Tells the other replicas what was seen here, and learns what they saw: see `_run_lanes`."""
        dp = self.model.mesh.dp
        outcome = (
            totals,
            torch.cat([torch.empty(0, dtype=self.dtype), *seen]),
            failure and described(failure, f"in data-parallel replica {dp.index}"),
        )
        found: list[tuple[int, Tensor]] = []
        outcomes = all_gather_object(outcome, dp)
        if failure is not None:
            raise failure
        for _, _, other in outcomes:
            if other is not None:
                raise other
        for replica, (theirs, logprobs, _) in enumerate(outcomes):
            if replica != dp.index:
                totals.merge(theirs)
            indices = [i for lane in lanes[replica :: dp.size] for i in lane.members]
            found += zip(indices, logprobs.split([len(targets[i].positions) for i in indices]), strict=True)
        return found
