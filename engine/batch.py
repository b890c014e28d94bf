"""What the forward receives: tokens packed end to end, and where their keys and values live.

# T tokens, S sequences, B pages per sequence at most, L layers
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVView:
    """Where keys and values of this batch go and are read from.

    `keys[l]` and `values[l]` hold the pages of layer l in the attention kernel's own layout.
    `block_tables[s, i]` is the page that holds positions [i * page_size, (i + 1) * page_size) of sequence s.
    `plan` is scratch of the attention kernel: its division of the batch into tasks, built once per batch and read
    by every layer.
    """

    keys: list[Tensor]
    values: list[Tensor]
    page_size: int
    block_tables: Tensor  # int32 [S, B]
    plan: Tensor | None = None


@dataclass
class TokenBatch:
    """Tokens of S sequences packed end to end, [T]. There is no padding and no batch dimension.

    Sequence s owns rows cu_seqlens[s] to cu_seqlens[s + 1]; its last row has position context_lens[s] - 1, so rows
    attend to keys 0 .. own position. Training and scoring leave `kv` as None: keys and values then live only as
    long as the layer needs them, and context_lens equals the sequence lengths.
    """

    tokens: Tensor  # int32 [T]
    positions: Tensor  # int32 [T]
    cu_seqlens: Tensor  # int32 [S + 1]
    context_lens: Tensor  # int32 [S]
    kv: KVView | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.context_lens.shape[0]

    @classmethod
    def packed(cls, sequences: list[list[int]], device: torch.device | str = "cpu") -> TokenBatch:
        """Whole sequences, positions from 0, no cache: what training and scoring use."""
        lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int32)
        cu_seqlens = torch.zeros(len(sequences) + 1, dtype=torch.int32)
        cu_seqlens[1:] = lengths.cumsum(0)
        tokens = torch.tensor([t for s in sequences for t in s], dtype=torch.int32)
        positions = torch.cat([torch.arange(len(s), dtype=torch.int32) for s in sequences])
        return cls(tokens.to(device), positions.to(device), cu_seqlens.to(device), lengths.to(device))
