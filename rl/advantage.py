"""Advantages of a group: how much better each answer was than its siblings.

# G rollouts of one group
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-6  # far below any reward difference that means something; keeps 0 / 0 at 0


def grpo(rewards_G: Tensor) -> Tensor:
    """(R - mean) / std: GRPO (arXiv 2402.03300). The standard deviation is the sample's (G - 1)."""
    if len(rewards_G) < 2:
        return torch.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + EPSILON)


def dr_grpo(rewards_G: Tensor) -> Tensor:
    """R - mean: without the division, which favours problems that are nearly always right or wrong (2503.20783)."""
    return rewards_G - rewards_G.mean()


def rloo(rewards_G: Tensor) -> Tensor:
    """R minus the mean of the others: leave-one-out (2402.14740)."""
    others = len(rewards_G) - 1
    return torch.zeros_like(rewards_G) if others < 1 else rewards_G - (rewards_G.sum() - rewards_G) / others


def maxrl(rewards_G: Tensor) -> Tensor:
    """(R - mean) / mean: rare successes count most, as under maximum likelihood of a correct answer."""
    mean = rewards_G.mean()
    return (rewards_G - mean) / (mean + EPSILON) if mean > 0 else torch.zeros_like(rewards_G)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "maxrl": maxrl}


def advantages(name: str, rewards: list[list[float]], scale_by_batch_std: bool = False) -> list[list[float]]:
    """The advantage of each rollout of each group; groups may differ in size. float32.

    `scale_by_batch_std` divides them all by the standard deviation of all the batch's rewards.
    """
    groups = [ADVANTAGES[name](torch.tensor(group, dtype=torch.float32)) for group in rewards]
    if scale_by_batch_std:
        spread = torch.tensor([reward for group in rewards for reward in group]).std(correction=0) + EPSILON
        groups = [group / spread for group in groups]
    return [group.tolist() for group in groups]
