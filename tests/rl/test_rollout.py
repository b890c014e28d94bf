"""Rollouts: the ids sampled are the ids trained on, every failure has a boundary, every rollout is counted."""

import pytest
import torch

from engine import ChatTemplate, SamplingParams
from rl.batch import select, to_sample
from rl.env import Boundary
from tests.rl.toy import Broken, Dialogue, Letters

PARAMS = SamplingParams(max_tokens=6)


def run(collector, count=3, group_size=4, seed=5, params=PARAMS):
    problems = [collector.env.problem(index, 0) for index in range(count)]
    return collector.collect(problems, group_size, params, seed)


def test_rollouts_are_a_function_of_weights_and_seed(collector):
    first, again, other = (run(collector(Letters()), seed=seed) for seed in (5, 5, 6))
    tokens = [[[r.tokens for r in group] for group in groups] for groups in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_rollouts_of_a_group_share_the_prompt_and_differ_after_it(collector):
    (group,) = run(collector(Letters()), count=1, group_size=8)
    prompts = {tuple(t for t, m in zip(r.tokens, r.loss_mask, strict=True) if not m) for r in group}
    assert len(prompts) == 1 and len({tuple(r.tokens) for r in group}) > 1


def test_a_sample_carries_ids_mask_and_the_sampled_logprobs(collector):
    collect = collector(Letters())
    rollout = run(collect, count=1)[0][0]
    rollout.advantage = 0.5
    sample = to_sample(rollout, temperature=1.0)
    scored = collect.engine.score([sample.tokens])[0]
    mask = torch.tensor(sample.loss_mask, dtype=torch.bool)
    assert torch.equal(torch.tensor(sample.old_logprobs)[mask], scored[mask[1:]])
    assert sample.advantages == 0.5 and sample.weight_version == 0


def test_turns_are_extended_and_never_rendered_again(collector):
    collect = collector(Dialogue())
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    collect.template = ChatTemplate(collect.tokenizer, source)
    groups = run(collect, count=1, group_size=32, params=SamplingParams(max_tokens=60))
    rollout = next(r for r in groups[0] if r.turns == 2)  # its first turn ended by itself, which random weights may do
    first, second = rollout.episode.heard
    written = [token for token, mask in zip(rollout.tokens, rollout.loss_mask, strict=True) if mask]
    assert written == first.token_ids + second.token_ids
    start = rollout.loss_mask.index(1) + len(first.token_ids)
    between = rollout.tokens[start : len(rollout.tokens) - len(second.token_ids)]
    text = collect.tokenizer.decode(between, skip_special_tokens=False)
    assert text == "<|user|>go on<|end|><|assistant|>"  # the end of the first turn is the model's own
    assert rollout.reward == 2.0 and rollout.info == {"turns": 2.0}


def test_a_template_that_drops_the_turn_fails_the_rollout(collector):
    (group,) = run(collector(Dialogue()), count=1, group_size=32, params=SamplingParams(max_tokens=60))
    (reason,) = {r.failure.reason for r in group if r.failure}
    assert "drops earlier turns" in reason


def test_failures_are_data_with_the_boundary_they_crossed(collector):
    raised, hung, no_message, fine = run(collector(Broken()), count=4, group_size=2)
    assert {(r.failure.boundary, r.failure.reason) for r in raised} == {
        (Boundary.ENVIRONMENT, "ValueError: no such sum")
    }
    assert {(r.failure.boundary, r.failure.reason) for r in hung} == {(Boundary.ENVIRONMENT, "no answer within 0.05 s")}
    assert {r.failure.boundary for r in no_message} == {Boundary.PROMPT}
    assert all(r.failure is None and r.reward > 0 for r in fine)


def test_a_prompt_that_is_too_long_fails_alone(collector):
    (group,) = run(collector(Letters(), max_prompt_tokens=3), count=1, group_size=2)
    assert {r.failure.boundary for r in group} == {Boundary.PROMPT}
    assert "it takes 1 to 3" in group[0].failure.reason


def test_a_conversation_that_outgrows_the_context_fails_alone(collector):
    collect = collector(Dialogue(), max_turns=2)
    collect.max_prompt_tokens = 10  # the first prompt fits, the second does not
    collect.template = ChatTemplate(collect.tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    (group,) = run(collect, count=1, group_size=32, params=SamplingParams(max_tokens=60))
    failed = [r for r in group if r.failure]
    assert failed and all(r.failure.boundary is Boundary.PROMPT and r.turns == 1 for r in failed)


def test_every_rollout_is_counted_once(collector, train_config):
    groups = run(collector(Broken()), count=8, group_size=4)
    groups[3][0].weight_version = -1  # as if sampled before an update
    counts = select(groups, train_config(), weight_version=0).counts()
    assert counts["errored"] == 24 and counts["stale"] == 1 and counts["launched"] == 32
    assert counts["trained"] + counts["filtered"] + counts["errored"] + counts["stale"] == counts["launched"]


def test_a_group_goes_on_without_its_failed_rollout(collector, train_config):
    groups = run(collector(Letters()), count=1, group_size=4)
    for rollout, reward in zip(groups[0], (0.0, 1.0, 1.0, 0.0), strict=True):
        rollout.reward = reward
    groups[0][3].fail(Boundary.SAMPLING, "the completion was aborted")
    batch = select(groups, train_config(advantage="dr_grpo"), weight_version=0)
    assert [r.advantage for r in batch.trained] == pytest.approx([-2 / 3, 1 / 3, 1 / 3])


def test_groups_with_equal_rewards_are_filtered(collector, train_config):
    groups = run(collector(Letters()), count=2, group_size=2)
    for rollout in (*groups[0], *groups[1]):
        rollout.reward = 1.0
    groups[1][0].reward = 0.0
    counts = select(groups, train_config(), weight_version=0).counts()
    assert (counts["trained"], counts["filtered"]) == (2, 2)


def test_advantages_of_the_environment_win_over_those_of_the_group(collector, train_config):
    groups = run(collector(Dialogue(), max_turns=1), count=1, group_size=2)
    batch = select(groups, train_config(), weight_version=0)
    sample = to_sample(batch.trained[0], 1.0)
    expected = [float(mask) for mask in sample.loss_mask]  # 1 on the first turn, 0 on the prompt
    assert sample.advantages == expected


def test_overlong_answers_lose_reward_linearly(collector, train_config):
    groups = run(collector(Letters()), count=1, group_size=3)
    config = train_config(overlong_tokens=4)  # of 6: free up to 2, then a quarter a token
    for rollout, count in zip(groups[0], (2, 4, 6), strict=True):
        rollout.reward = 1.0
        rollout.loss_mask = [0, *[1] * count]
    batch = select(groups, config, weight_version=0)
    mean = (1.0 + 0.5 + 0.0) / 3
    assert [r.advantage for r in batch.trained] == pytest.approx([1.0 - mean, 0.5 - mean, 0.0 - mean])
