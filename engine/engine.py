"""The facade: one process, one copy of the weights; sample from them, score with them, train them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.atomic import recover
from engine.checkpoint import load_weights, read_config, save_pretrained
from engine.config import EngineConfig, ModelConfig
from engine.errors import CapacityError, ConfigError, EngineError, InputError
from engine.kernels.device import check_kernels, choose_device
from engine.kernels.dtypes import KV_DTYPES, MODEL_DTYPES
from engine.kernels.op import cpu_missing, extension, triton_missing
from engine.kernels.table import rows as op_rows
from engine.log import logger
from engine.model import Transformer
from engine.parallel.collectives import all_gather_object, broadcast_object
from engine.parallel.launch import connects_gpus, local_rank, ranks_on_this_machine
from engine.parallel.mesh import Mesh, make_mesh
from engine.parallel.ranks import Ranks
from engine.parallel.shards import Placement
from engine.parallel.together import together
from engine.sampler.output import Stream
from engine.sampler.sampler import Sampler
from engine.sampler.service import Call, Service
from engine.saver import StateSaver
from engine.state import load_state
from engine.tokenizer import Tokenizer
from engine.trainer import Trainer
from engine.types import Completion, Prompt, Sample, SamplingParams, StepStats, TrainStats


class Engine:
    """A model that samples and learns.

    `generate`, `stream`, `score` and `forward_backward` run the same forward on the same weights, so
    `Completion.logprobs` equals what `score` returns and what the first `forward_backward` after it sees, to the bit.
    Inside `torch.inference_mode()` it works as outside: what it makes may be written to by a later call anywhere.
    Not thread-safe: call it from one thread. Under torchrun every rank makes the same calls with the same arguments
    and gets the whole result; `EngineConfig.parallel` says how they share the work.
    """

    def __init__(self, model: Transformer, config: EngineConfig, tokenizer: Tokenizer | None = None) -> None:
        self.mesh = model.mesh
        if not cpu_missing():
            _set_threads(config.threads)
        if missing := cpu_missing() if model.device.type == "cpu" else triton_missing():
            logger.warning("%s: the engine runs on plain torch, slowly and not exactly", missing)
        elif model.device.type == "cuda" and any(row.chosen and not row.proven for row in op_rows(model.dtype, "cuda")):
            logger.warning("no run on a GPU has proven the kernels in use yet; python -m engine ops names them")
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        model.checkpointing = config.activation_checkpointing
        self._sampler: Sampler | None = None
        self._trainer: Trainer | None = None
        self._saver: StateSaver | None = None
        self._service: Service | None = None

    # ---- making one ----

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(cls, path: str | Path, config: EngineConfig | None = None, mesh: Mesh | None = None) -> Engine:
        """A Hugging Face directory: `config.json`, one or many `.safetensors`, and `tokenizer.json` if there is one.

        Each rank reads its part. `mesh` is made from `config.parallel` unless one is given. Raises CheckpointError,
        ConfigError, ParallelError.
        """
        config = config or EngineConfig()
        placement = _placement(config, mesh)
        device = _device(config, placement.mesh)
        with together(placement.mesh.world):
            model = _model(read_config(path), config, placement, device)
            has_tokenizer = (Path(path) / "tokenizer.json").exists()
            tokenizer = Tokenizer.from_pretrained(path) if has_tokenizer else None
        load_weights(path, model)
        return cls(model, config, tokenizer)

    @classmethod
    @torch.inference_mode(False)
    def from_config(
        cls,
        model_config: ModelConfig,
        config: EngineConfig | None = None,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
    ) -> Engine:
        """Random weights, a function of `seed`: those of one model on any mesh. Raises ConfigError, ParallelError."""
        config = config or EngineConfig()
        placement = _placement(config, mesh)
        device = _device(config, placement.mesh)
        with together(placement.mesh.world):
            model = _model(model_config, config, placement, device)
        model.initialize(seed)
        return cls(model, config, tokenizer)

    def close(self) -> None:
        """Waits for saves under way and ends this engine's part in the group of ranks; every rank calls it. The engine
        is not used after it. Raises CheckpointError when a save failed."""
        try:
            if self._saver is not None:
                self._saver.close()
        finally:
            self.mesh.close()

    # ---- sampling ----

    @torch.inference_mode(False)
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[list[Completion]]:
        """`params.n` completions of each prompt, [P][n]. Prompts are text or token ids; `params` is one for all or one
        for each.

        Replicas take prompts from one queue as they run dry. Each completion is the one that a single rank would give,
        but for `num_cached_tokens`, which says what this run found in the cache. Raises InputError, CapacityError,
        NumericsError, on every rank; the engine stays usable.
        """
        call = self._call("generate", prompts, params)
        return self.service.generate(call)

    @torch.inference_mode(False)
    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Stream:
        """The same, as tokens come: iterate over it. `stream.abort(prompt_index)` ends one prompt; closing the stream,
        or dropping it, ends what still runs. Every replica runs all prompts, so that every rank sees all events.

        Raises InputError, CapacityError.
        """
        call = self._call("stream", prompts, params)
        return self.service.stream(call)

    def abort(self) -> None:
        """Ends everything in flight: the completions come with the finish reason "abort" and the tokens so far."""
        if self._service is not None:
            self._service.abort_all()

    # ---- training ----

    @torch.inference_mode(False)
    def score(self, sequences: Sequence[Prompt], temperature: float = 1.0) -> list[torch.Tensor]:
        """log p of each token after the first, by the training forward: float32 [len - 1] each (float64 where
        the engine computes in it).

        Raises InputError.
        """
        self.mesh.agree("score", list(sequences), temperature)
        return self.trainer.score([self._encode(s, i, whole=True) for i, s in enumerate(sequences)], temperature)

    @torch.inference_mode(False)
    def forward_backward(self, samples: Sequence[Sample], loss: str | Callable[..., Any] | Any = "sft") -> TrainStats:
        """Adds the gradient of the loss over all samples; call it several times to accumulate.

        Raises InputError, ConfigError; gradients accumulated before are kept.
        """
        samples = list(samples)
        self.mesh.agree("forward_backward", samples, loss)
        return self.trainer.forward_backward(samples, loss)

    @torch.inference_mode(False)
    def optim_step(self, learning_rate: float) -> StepStats:
        """Clips, steps AdamW, writes the compute weights in place, raises `weight_version`.

        Raises NumericsError when the gradient is not finite (no step is taken), EngineError while something streams.
        """
        if self._sampler is not None and self._sampler.num_unfinished:
            raise EngineError(
                f"{self._sampler.num_unfinished} sequences are still being sampled from these weights; exhaust or "
                "close the stream before the optimizer changes them"
            )
        self.mesh.agree("optim_step", learning_rate)
        stats = self.trainer.optim_step(learning_rate)
        if self._sampler is not None:
            self._sampler.cache.forget()
        return stats

    # ---- keeping ----

    def save_pretrained(self, path: str | Path) -> None:
        """A Hugging Face directory that transformers, and `from_pretrained`, load: the same bytes whatever the mesh is.
        Atomic. Raises CheckpointError on every rank."""
        self.wait_for_saves()
        save_pretrained(path, self.model, self.tokenizer)

    def save_state(self, path: str | Path, extra: dict[str, Any] | None = None, wait: bool = True) -> None:
        """All that training needs to go on bit for bit, on this mesh or another, with `extra` beside it. Atomic.

        With `wait=False` it returns once the state is copied in memory and writes it while training goes on; what goes
        wrong then is raised by the next save, load, `wait_for_saves` or `close`. Raises CheckpointError on every rank.
        """
        self.saver.save(path, extra, wait)

    def wait_for_saves(self) -> None:
        """Returns when the state that `save_state(wait=False)` took is on the disk. Raises CheckpointError."""
        if self._saver is not None:
            self._saver.wait()

    @staticmethod
    def has_state(path: str | Path) -> bool:
        """Whether there is a complete state at `path` for `load_state`. One rank asks at a time."""
        recover(path)
        return (Path(path) / "state.json").exists()

    @torch.inference_mode(False)
    def load_state(self, path: str | Path) -> dict[str, Any]:
        """Restores what `save_state` wrote, on any mesh; returns its `extra`. Raises CheckpointError on every rank."""
        self.wait_for_saves()
        extra = load_state(path, self.trainer)
        if self._sampler is not None:
            self._sampler.clear()
        return extra

    # ---- looking ----

    @property
    def ranks(self) -> Ranks:
        """All ranks, for a program that has to tell them something."""
        return Ranks(self.mesh.world)

    @property
    def weight_version(self) -> int:
        """How many optimizer steps these weights have seen."""
        return self._trainer.weight_version if self._trainer else 0

    @property
    def trainer(self) -> Trainer:
        """Made at first use: an engine that only samples has no optimizer state."""
        if self._trainer is None:
            self._trainer = Trainer(self.model, self.config)
        return self._trainer

    @property
    def saver(self) -> StateSaver:
        """Made at first use, for the trainer."""
        if self._saver is None:
            self._saver = StateSaver(self.trainer)
        return self._saver

    @property
    def sampler(self) -> Sampler:
        """Made at first use: an engine that only trains has no KV pool."""
        if self._sampler is None:
            self._sampler = Sampler(self.model, self.config, self.tokenizer)
        return self._sampler

    @property
    def service(self) -> Service:
        """Made at first use."""
        if self._service is None:
            self._service = Service(self.sampler, self.tokenizer, self.mesh)
        return self._service

    def weight_addresses(self) -> dict[str, tuple[int, int]]:
        """Where each compute weight lies and how many bytes it has: the same before and after every rollout and every
        optimizer step, because nothing is copied or sent between sampling and training."""
        return {weight.name: (weight.data.data_ptr(), weight.nbytes) for weight in self.model.weights()}

    # ---- inside ----

    def _call(
        self, name: str, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Call:
        """The request as the sampler takes it, when it is good and the same on every rank."""
        if isinstance(prompts, str):
            raise InputError("prompts is one string; pass a list of prompts")
        self.mesh.agree(name, list(prompts), params)
        ids = [self._encode(prompt, index) for index, prompt in enumerate(prompts)]
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(ids)
        else:
            each = list(params)
            if len(each) != len(ids):
                raise InputError(f"{len(each)} SamplingParams for {len(ids)} prompts; pass one, or one for each")
        if self.tokenizer is None and any(p.stop for p in each):
            raise InputError("SamplingParams.stop needs a tokenizer, and this engine has none; use stop_token_ids")
        vocab = self.model.config.vocab_size
        if any(p.logprobs > vocab for p in each):
            raise InputError(f"SamplingParams.logprobs is {max(p.logprobs for p in each)}; there are {vocab} tokens")
        fresh = broadcast_object(secrets.randbits(62), self.mesh.world, 0)
        seeds = [fresh if p.seed is None else p.seed for p in each]
        return Call(f"{name}/{fresh}", ids, each, seeds, self.weight_version)

    def _encode(self, prompt: Prompt, index: int, whole: bool = False) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError(f"prompt {index} is text and this engine has no tokenizer; pass token ids")
            prompt = self.tokenizer.encode(prompt)
        prompt = list(prompt)
        if not prompt:
            raise InputError(f"prompt {index} is empty; it needs at least one token")
        vocab = self.model.config.vocab_size
        if min(prompt) < 0 or max(prompt) >= vocab:
            bad = next(t for t in prompt if not 0 <= t < vocab)
            raise InputError(f"prompt {index} holds token id {bad}; the vocabulary is 0 to {vocab - 1}")
        context = self.model.config.max_position_embeddings
        if len(prompt) > context - (not whole):
            raise InputError(
                f"prompt {index} has {len(prompt)} tokens; the model's context is {context}, and at least "
                "one must be left to sample: shorten the prompt"
            )
        if not whole and len(prompt) > (pool := self.config.kv_tokens // self.config.page_size * self.config.page_size):
            raise CapacityError(
                f"prompt {index} has {len(prompt)} tokens; the KV pool holds {pool}: raise "
                "EngineConfig.kv_tokens or shorten the prompt"
            )
        return prompt


def _placement(config: EngineConfig, mesh: Mesh | None) -> Placement:
    parallel = config.parallel
    mesh = mesh or make_mesh(parallel)
    return Placement(mesh, parallel.chunks_per_stage, parallel.sequence_parallel and mesh.tp.size > 1)


def _device(config: EngineConfig, mesh: Mesh) -> torch.device:
    """This rank's device, and the ranks' GPUs connected. Raises ConfigError on every rank."""
    dtype, kv_dtype = MODEL_DTYPES[config.dtype], KV_DTYPES[config.kv_dtype]
    with together(mesh.world):
        device = choose_device(config.device, dtype, local_rank())
        check_kernels(device, dtype, kv_dtype)
        if device.type == "cuda" and mesh.world.size > 1 and not connects_gpus():
            raise ConfigError(
                "the program has connected the ranks without NCCL, by which the memory of GPUs travels; leave that to "
                'the engine, or init_process_group("cpu:gloo,cuda:nccl")'
            )
    kinds = all_gather_object(device.type, mesh.world)
    if len(set(kinds)) > 1:
        listed = ", ".join(f"rank {rank} on {kind}" for rank, kind in enumerate(kinds))
        raise ConfigError(f'the ranks are on devices of different kinds ({listed}); set EngineConfig.device to "cpu"')
    if device.type == "cuda":
        mesh.links.connect(device)
    return device


def _model(model_config: ModelConfig, config: EngineConfig, placement: Placement, device: torch.device) -> Transformer:
    with device:
        return Transformer(model_config, MODEL_DTYPES[config.dtype], placement, KV_DTYPES[config.kv_dtype])


def _set_threads(threads: int) -> None:
    """As many as asked for; else the kernels' own default, shared with the other ranks of this machine."""
    if threads or ranks_on_this_machine() > 1:
        share = len(os.sched_getaffinity(0)) // ranks_on_this_machine()
        extension().set_num_threads(threads or max(1, share))
