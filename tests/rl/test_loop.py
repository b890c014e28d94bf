"""The loop: it learns, it is exact or stops, and a run that was killed ends with the weights of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine import ChatTemplate, Engine, EngineError, ExactnessError, load_config
from rl.batch import Batch, require_progress
from rl.config import TrainConfig
from rl.loop import train
from rl.metrics import read_lines
from rl.run import Run

ROOT = Path(__file__).resolve().parents[2]


def weights(directory):
    return {file.name: file.read_bytes() for file in sorted((directory / "checkpoint").glob("*.safetensors"))}


def test_reward_rises_on_a_task_that_can_be_learnt(train_config):
    with Run(train_config(steps=20, prompts_per_step=4, group_size=8)) as run:
        train(run)
    rewards = [line["reward"] for line in read_lines(run.directory / "metrics.jsonl")]
    assert sum(rewards[:3]) / 3 < 0.1 and sum(rewards[-3:]) / 3 > 0.5


def test_every_step_reports_exactness_and_accounts_for_every_rollout(train_config):
    with Run(train_config()) as run:
        train(run)
    for line in read_lines(run.directory / "metrics.jsonl"):
        assert line["max_abs_logprob_difference"] == 0.0 and line["weight_bytes_moved"] == 0
        assert line["checked_tokens"] == line["rollout_tokens"] > 0
        assert line["trained"] + line["filtered"] + line["errored"] + line["stale"] == line["launched"] == 16


def plant_fault(engine, row):
    """The engine samples as before but reports one log-probability a single bit off."""
    generate = engine.generate

    def faulty(prompts, params):
        results = generate(prompts, params)
        logprobs = results[0][0].logprobs
        logprobs[row] = torch.nextafter(logprobs[row], torch.tensor(0.0))
        return results

    engine.generate = faulty


def test_one_wrong_bit_stops_the_run_before_the_weights_change(train_config):
    with Run(train_config()) as run:
        plant_fault(run.engine, row=1)
        before = {weight.name: weight.data.clone() for weight in run.engine.model.weights()}
        prompt = len(run.collector.template.encode(run.env.problem(0, 0).messages, add_generation_prompt=True))
        with pytest.raises(ExactnessError, match=rf"token {prompt + 1} \(id \d+\) of rollout 0 was sampled at"):
            train(run)
        assert run.engine.weight_version == 0
        assert all(torch.equal(before[weight.name], weight.data) for weight in run.engine.model.weights())


def test_one_wrong_bit_in_a_filtered_rollout_is_found(train_config, monkeypatch):
    with Run(train_config(max_tokens=1, group_size=2, prompts_per_step=1)) as run:
        plant_fault(run.engine, row=0)
        monkeypatch.setattr(run.env, "score", constant_reward)
        with pytest.raises(ExactnessError, match="of rollout 0"):
            train(run)


async def constant_reward(problem, action):
    return 1.0


def test_a_step_whose_rollouts_all_fail_stops_the_run(train_config):
    config = train_config(max_prompt_tokens=1)
    with Run(config) as run, pytest.raises(EngineError, match=r"all 16 rollouts of the step failed.*prompt boundary"):
        train(run)


def test_a_step_with_some_rollouts_left_goes_on():
    require_progress(Batch(filtered=[None], errored=[None]))


def test_dynamic_sampling_tries_new_problems_for_groups_that_teach_nothing(train_config, monkeypatch):
    with Run(train_config(steps=1, resample_rounds=2)) as run:
        monkeypatch.setattr(run.env, "score", constant_reward)
        train(run)
    (line,) = read_lines(run.directory / "metrics.jsonl")
    assert line["launched"] == line["filtered"] == 3 * 16 and line["trained"] == 0


def test_interrupted_and_resumed_run_equals_one_that_ran_through(train_config, tmp_path):
    whole, parts = (train_config(steps=6, run_dir=str(tmp_path / name)) for name in ("whole", "parts"))
    with Run(whole) as run:
        train(run)
    with Run(parts) as run:
        advance = run.progress.advance
        run.progress.advance = lambda step, record: (advance(step, record), step == 2 and signal.raise_signal(2))
        train(run)
    assert run.step == 2 and not (tmp_path / "parts" / "checkpoint").exists()
    with Run(parts, resume=True) as run:
        assert run.step == 2
        train(run)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert [line["step"] for line in read_lines(tmp_path / "parts" / "metrics.jsonl")] == list(range(6))


def test_killed_and_resumed_run_equals_one_that_ran_through(model, tmp_path):
    """SIGKILL at whatever point three lines of metrics are there; saved every step."""
    (tmp_path / "letters.toml").write_text(
        f'model = "{model}"\nsteps = 12\nprompts_per_step = 4\ngroup_size = 4\nmax_tokens = 6\nsave_every = 1\n'
        f'run_dir = "{tmp_path}/killed"\n[env]\nname = "tests.rl.toy:Letters"\n[schedule]\nlearning_rate = 1e-2\n'
        "[engine]\nkv_tokens = 4096\nthreads = 1\n"
    )
    command = [sys.executable, "-m", "rl", "train", str(tmp_path / "letters.toml")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while len(read_lines(metrics)) < 3:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or never began"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "checkpoint").exists(), "killed too late to be of use"
    subprocess.run([*command, "--resume"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with Run(load_config(TrainConfig, tmp_path / "letters.toml", [f"run_dir={tmp_path}/whole"])) as run:
        train(run)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_a_new_run_replaces_an_old_one(train_config):
    for _ in range(2):
        with Run(train_config(steps=2)) as run:
            train(run)
    assert [line["step"] for line in read_lines(run.directory / "metrics.jsonl")] == [0, 1]


def test_the_result_is_a_checkpoint_that_samples_and_chats(train_config):
    with Run(train_config(steps=1)) as run:
        train(run)
    engine = Engine.from_pretrained(run.directory / "checkpoint")
    template = ChatTemplate.from_pretrained(run.directory / "checkpoint")
    prompt = template.encode([{"role": "user", "content": "1+1="}], add_generation_prompt=True, thinking=True)
    assert len(engine.generate([prompt])[0][0].token_ids) > 0


def test_kept_rollouts_show_each_token_with_its_logprob_and_advantage(train_config):
    with Run(train_config(steps=2, keep_rollouts_every=1)) as run:
        train(run)
    kept = [json.loads(line) for line in (run.directory / "rollouts.jsonl").read_text().splitlines()]
    assert {line["step"] for line in kept} == {0, 1}
    for line in kept:
        assert len({len(line[key]) for key in ("pieces", "written", "logprobs", "advantages")}) == 1
