"""What each replica sampled, on every rank: completions as one block of bytes a replica, not as objects one by one.

# N completions of a replica
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from engine.errors import NumericsError
from engine.parallel.collectives import Group, all_gather_rows
from engine.sampler.output import Place
from engine.types import Completion

REASONS = ("stop", "length", "abort")
COLUMNS = 8  # of the table: prompt, sample, tokens, reason, cached tokens, bytes of text, of alternatives, kept mass?


def exchange(
    done: dict[Place, Completion],
    failure: NumericsError | None,
    prompts: Sequence[list[int]],
    version: int,
    group: Group,
) -> dict[Place, Completion]:
    """The completions of all replicas, from those of this one. Raises the failure of any of them on all."""
    if group.size == 1:
        if failure is not None:
            raise failure
        return done
    message = b"" if failure is None else str(failure).encode()
    mine = torch.from_numpy(np.frombuffer(_pack(done, message), dtype=np.uint8).copy())
    blocks = all_gather_rows(mine, group)
    everyone: dict[Place, Completion] = {}
    for index, block in enumerate(blocks):
        if index == group.index and failure is None:
            everyone |= done
        else:
            everyone |= _unpack(block.numpy().tobytes(), prompts, version)
    return everyone


def _pack(done: dict[Place, Completion], failure: bytes) -> bytes:
    """[N, bytes of the failure], the failure, the table, then all tokens, log-probabilities, kept masses, texts and
    alternatives, each in the table's order."""
    table = np.zeros((len(done), COLUMNS), dtype=np.int64)
    tokens, logprobs, kept, texts, choices = [], [], [], [], []
    for row, ((prompt, sample), each) in zip(table, done.items(), strict=True):
        text = each.text.encode("utf-8", "surrogatepass")
        alternatives = b"" if each.top_logprobs is None else msgspec.msgpack.encode(each.top_logprobs)
        row[:3] = prompt, sample, len(each.token_ids)
        row[3:5] = REASONS.index(each.finish_reason), each.num_cached_tokens
        row[5:] = len(text), len(alternatives), each.kept_mass is not None
        tokens.append(np.array(each.token_ids, dtype=np.int32).tobytes())
        logprobs.append(each.logprobs.numpy().tobytes())
        kept.append(b"" if each.kept_mass is None else each.kept_mass.numpy().tobytes())
        texts.append(text)
        choices.append(alternatives)
    head = np.array([len(done), len(failure)], dtype=np.int64).tobytes()
    return b"".join([head, failure, table.tobytes(), *tokens, *logprobs, *kept, *texts, *choices])


def _unpack(block: bytes, prompts: Sequence[list[int]], version: int) -> dict[Place, Completion]:
    """What was packed. Raises NumericsError when it is a failure."""
    at = 16

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return block[at - size : at]

    count, size = np.frombuffer(block, np.int64, 2).tolist()
    if size:
        raise NumericsError(take(size).decode())
    table = np.frombuffer(take(count * COLUMNS * 8), np.int64).reshape(count, COLUMNS).tolist()
    tokens = [np.frombuffer(take(4 * row[2]), np.int32).tolist() for row in table]
    logprobs = [_floats(take(4 * row[2])) for row in table]
    kept = [_floats(take(4 * row[2])) if row[7] else None for row in table]
    texts = [take(row[5]).decode("utf-8", "surrogatepass") for row in table]
    choices = [msgspec.msgpack.decode(take(row[6]), type=list[dict[int, float]]) if row[6] else None for row in table]
    return {
        (row[0], row[1]): Completion(
            token_ids=tokens[i],
            logprobs=logprobs[i],
            text=texts[i],
            finish_reason=REASONS[row[3]],
            weight_version=version,
            num_cached_tokens=row[4],
            prompt_token_ids=list(prompts[row[0]]),
            kept_mass=kept[i],
            top_logprobs=choices[i],
        )
        for i, row in enumerate(table)
    }


def _floats(values: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(values, np.float32).copy())
