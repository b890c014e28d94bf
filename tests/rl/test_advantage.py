"""Advantages against their definitions."""

import pytest
import torch

from rl.advantage import ADVANTAGES, advantages

REWARDS = [0.0, 1.0, 1.0, 0.5]


def test_grpo_has_zero_mean_and_unit_deviation():
    values = torch.tensor(advantages("grpo", [REWARDS])[0])
    assert values.mean().abs() < 1e-6
    assert values.std().item() == pytest.approx(1.0, abs=1e-4)


def test_dr_grpo_is_the_reward_less_the_mean():
    assert advantages("dr_grpo", [REWARDS])[0] == pytest.approx([-0.625, 0.375, 0.375, -0.125])


def test_rloo_leaves_each_out_of_its_own_baseline():
    expected = [r - (sum(REWARDS) - r) / 3 for r in REWARDS]
    assert advantages("rloo", [REWARDS])[0] == pytest.approx(expected)


def test_maxrl_divides_by_the_mean_so_that_rare_successes_count_more():
    assert advantages("maxrl", [REWARDS])[0] == pytest.approx([(r - 0.625) / 0.625 for r in REWARDS], abs=1e-5)
    rare, common = advantages("maxrl", [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    assert rare[0] > common[0] > 0


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("group", [[0.0] * 4, [1.0] * 4, [0.7]])
def test_equal_rewards_and_lone_rollouts_have_no_advantage(name, group):
    assert advantages(name, [group])[0] == pytest.approx([0.0] * len(group), abs=1e-6)


def test_batch_scaling_divides_every_group_by_one_deviation():
    plain = advantages("dr_grpo", [[0.0, 1.0], [0.0, 4.0, 2.0]])
    scaled = advantages("dr_grpo", [[0.0, 1.0], [0.0, 4.0, 2.0]], scale_by_batch_std=True)
    spread = torch.tensor([0.0, 1.0, 0.0, 4.0, 2.0]).std(correction=0).item()
    for before, after in zip(plain, scaled, strict=True):
        assert after == pytest.approx([value / spread for value in before], rel=1e-4)
