"""One sample of one prompt, from the waiting line to its completion."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.types import SamplingParams


@dataclass(eq=False)
class Sequence:
    """A sample in progress.

    While it runs, its tokens live in a row of `Slots`; while it waits (before it starts, or after it was preempted)
    they live here. `siblings` are the other samples of the same prompt that have not started: they fork off when the
    prompt has been computed, share its full pages, and sample their first token from the same logits.
    """

    request_id: int
    prompt_index: int
    sample_index: int
    params: SamplingParams
    prompt: np.ndarray  # int32 [P]
    seed: int
    max_length: int  # tokens, prompt included, at which it ends with "length"
    siblings: list[Sequence] = field(default_factory=list)

    tokens: np.ndarray = field(init=False)  # int32: the prompt and what has been sampled so far
    logprobs: np.ndarray = field(init=False)  # float32, one per sampled token
    kept_mass: np.ndarray = field(init=False)  # float32, one per sampled token
    alternatives: list[dict[int, float]] = field(default_factory=list)
    num_cached_tokens: int | None = None  # prompt tokens that needed no computing when it first started
    num_preemptions: int = 0
    finish_reason: str | None = None
    stop_text: str | None = None  # the text up to a stop string, once one has come
    reported: int = 0  # sampled tokens already handed to a stream
    scanner: object | None = None  # incremental detokenizer, where stop strings or a stream need text

    def __post_init__(self) -> None:
        self.tokens = self.prompt
        self.logprobs = np.empty(0, dtype=np.float32)
        self.kept_mass = np.empty(0, dtype=np.float32)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def output(self) -> np.ndarray:
        """Sampled tokens, once it has left its slot."""
        return self.tokens[len(self.prompt) :]
