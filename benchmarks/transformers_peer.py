"""Hugging Face transformers under the same workloads, in the same process: the peer that is measured in every run.

It is used as its documentation has it: `generate` on left-padded batches with a key/value cache, torch's SDPA, bf16
weights, fused AdamW. Ragged requests are sorted by length and run sixteen at a time.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.workloads import Generation
from engine.config import ModelConfig

BATCH = 16  # ragged requests run together


def available() -> bool:
    return find_spec("transformers") is not None


class TransformersPeer:
    """A transformers model of the same shape with random weights."""

    def __init__(self, model: ModelConfig, dtype: str = "bfloat16", device: str = "cpu") -> None:
        import transformers

        self.name = f"transformers {version('transformers')}"
        kinds = {"LlamaForCausalLM": transformers.LlamaConfig, "Qwen3ForCausalLM": transformers.Qwen3Config}
        rope = {"rope_theta": model.rope_theta, **(model.rope_scaling or {"rope_type": "default"})}
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "tie_word_embeddings", "rms_norm_eps",
                 "max_position_embeddings")  # fmt: skip
        config = kinds[model.architecture](
            rope_parameters=rope,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            **{n: getattr(model, n) for n in names},
        )
        torch.manual_seed(0)
        self.device = device
        self.model: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).to(device)
        self.model.generation_config.eos_token_id = None
        self._optimizer: torch.optim.Optimizer | None = None

    @torch.inference_mode()
    def generate(self, work: Generation, max_new: int | None = None) -> list[torch.Tensor]:
        """Runs the workload; log-probabilities of the sampled tokens are taken from the logits it returns."""
        order = sorted(range(len(work.prompts)), key=lambda i: (work.max_new[i], len(work.prompts[i])))
        uniform = len({(len(p), m) for p, m in zip(work.prompts, work.max_new, strict=True)}) == 1
        batch = len(order) if uniform else BATCH
        return [
            self._batch(work, [work.prompts[i] for i in chosen], max_new or max(work.max_new[i] for i in chosen))
            for chosen in (order[at : at + batch] for at in range(0, len(order), batch))
        ]

    def _batch(self, work: Generation, prompts: list[list[int]], new: int) -> torch.Tensor:
        longest = max(map(len, prompts))
        ids = torch.tensor([[2] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        sampling = {"do_sample": False} if work.temperature == 0 else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        out = self.model.eval().generate(
            ids, attention_mask=mask, max_new_tokens=new, num_return_sequences=work.n, pad_token_id=2,
            return_dict_in_generate=True, output_logits=work.temperature > 0, **sampling,
        )  # fmt: skip
        if out.logits is not None:
            for step, logits in enumerate(out.logits):
                logits.float().log_softmax(-1).gather(1, out.sequences[:, longest + step, None])
        return out.sequences

    def train_step(self, sequences: list[list[int]], batch: int = 8) -> float:
        """Forward, backward, AdamW; ragged sequences are sorted by length and padded, `batch` at a time. Returns the
        optimizer's seconds."""
        optimizer = self._start()
        ordered = sorted(sequences, key=len)
        chunks = [ordered[at : at + batch] for at in range(0, len(ordered), batch)]
        for chunk in chunks:
            ids, mask = self._padded(chunk)
            ragged = {} if mask.all() else {"attention_mask": mask}
            labels = ids.masked_fill(mask == 0, -100)
            (self.model(input_ids=ids, labels=labels, **ragged).loss / len(chunks)).backward()
        start = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - start

    def grpo_step(self, work: Generation) -> tuple[float, float]:
        """Rollout and training seconds of a plain loop: generate, one forward and backward over all samples, AdamW."""
        start = time.perf_counter()
        rows = self.generate(work)[0].clone()
        sampled = time.perf_counter()
        optimizer = self._start()
        prompt = len(work.prompts[0])
        rewards = (rows[:, prompt:] % 2 == 0).float().mean(1).view(-1, work.n)
        advantages = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        logits = self.model(input_ids=rows).logits[:, prompt - 1 : -1].float()
        logprobs = logits.log_softmax(-1).gather(2, rows[:, prompt:, None])[..., 0]
        (-((logprobs - logprobs.detach()).exp() * advantages).mean()).backward()
        optimizer.step()
        return sampled - start, time.perf_counter() - sampled

    def _start(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        return self._optimizer

    def _padded(self, sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [2] * (longest - len(s)) for s in sequences], device=self.device)
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=self.device)
        return ids, mask
