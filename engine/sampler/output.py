"""From sequences to what the caller sees: completions, and events of a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from engine.sampler.request import Sequence
from engine.tokenizer import StreamDecoder, Tokenizer
from engine.types import Completion, StreamEvent

Place = tuple[int, int]  # prompt index, sample index


class Inbox:
    """The results of one request, as far as it has been started here."""

    def __init__(self, counts: list[int], tokenizer: Tokenizer | None, weight_version: int, streaming: bool) -> None:
        self.streaming = streaming
        self.closed = False
        self.weight_version = weight_version
        self._counts = counts
        self._tokenizer = tokenizer
        self._done: dict[Place, Completion] = {}
        self.missing = 0  # samples that have been started and have not ended
        self._events: list[StreamEvent] = []
        self._decoders: dict[Place, StreamDecoder] = {}

    def expect(self, prompt_index: int) -> None:
        """The samples of this prompt have been started."""
        self.missing += self._counts[prompt_index]

    @property
    def complete(self) -> bool:
        """Whether all that was started has ended."""
        return self.missing == 0

    @property
    def done(self) -> dict[Place, Completion]:
        """What has ended so far."""
        return self._done

    def take(self) -> list[StreamEvent]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def progress(self, sequence: Sequence, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Tokens of a sequence that still runs."""
        sequence.reported += len(tokens)
        ids = tokens.tolist()
        self._events.append(
            StreamEvent(
                sequence.prompt_index,
                sequence.sample_index,
                ids,
                torch.from_numpy(logprobs.copy()),
                self._text(sequence, ids),
            )
        )

    def finish(self, sequence: Sequence) -> None:
        """A sequence that has ended, for whatever reason."""
        completion = self._completion(sequence)
        self._done[sequence.prompt_index, sequence.sample_index] = completion
        self.missing -= 1
        if self.streaming:
            rest = completion.token_ids[sequence.reported :]
            self._events.append(
                StreamEvent(
                    sequence.prompt_index,
                    sequence.sample_index,
                    rest,
                    completion.logprobs[sequence.reported :],
                    self._text(sequence, rest, last=True),
                    completion,
                )
            )

    def _completion(self, sequence: Sequence) -> Completion:
        params, ids = sequence.params, sequence.output.tolist()
        if sequence.stop_text is not None:
            text = sequence.stop_text
        else:
            text = self._tokenizer.decode(ids) if self._tokenizer else ""
        filtered = params.top_k or params.top_p < 1 or params.min_p
        return Completion(
            token_ids=ids,
            logprobs=torch.from_numpy(sequence.logprobs),
            text=text,
            finish_reason=sequence.finish_reason or "abort",
            weight_version=self.weight_version,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            prompt_token_ids=sequence.prompt.tolist(),
            kept_mass=torch.from_numpy(sequence.kept_mass) if filtered else None,
            top_logprobs=sequence.alternatives if params.logprobs else None,
        )

    def _text(self, sequence: Sequence, ids: list[int], last: bool = False) -> str:
        if self._tokenizer is None:
            return ""
        key = (sequence.prompt_index, sequence.sample_index)
        if key not in self._decoders:
            self._decoders[key] = StreamDecoder(self._tokenizer)
        decoder = self._decoders[key]
        return decoder.push(ids) + (decoder.finish() if last else "")


class Stream:
    """The events of one request as they come. Iterating drives the sampler; closing or dropping the stream ends what
    still runs of it."""

    def __init__(
        self,
        inbox: Inbox,
        step: Callable[[], None],
        abort: Callable[[int | None], None],
        close: Callable[[], None],
    ) -> None:
        self._inbox = inbox
        self._step, self._abort, self._close = step, abort, close
        self._waiting: deque[StreamEvent] = deque()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StreamEvent:
        """Raises what a failed step raises, after closing the stream."""
        while not self._waiting:
            self._waiting.extend(self._inbox.take())
            if not self._waiting:
                if self._inbox.complete or self._inbox.closed:
                    self.close()
                    raise StopIteration
                try:
                    self._step()
                except BaseException:
                    self.close()
                    raise
        return self._waiting.popleft()

    def abort(self, prompt_index: int | None = None) -> None:
        """Ends one prompt, or all: their completions come with the finish reason "abort" and the tokens so far."""
        self._abort(prompt_index)

    def close(self) -> None:
        """Ends what still runs; no more events come. Safe to call twice."""
        self._inbox.closed = True
        self._waiting.clear()
        self._close()

    def __del__(self) -> None:
        self.close()
