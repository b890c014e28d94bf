"""The command line: one clear line for every mistake, and both stages end to end at tiny size."""

import json
import re

import pytest

from engine import ConfigError, ParallelConfig, load_config
from rl.__main__ import main
from rl.config import TrainConfig
from rl.demo import demo
from rl.report import write_report

TINY = [
    "corpus.records=60", "sft.steps=3", "sft.schedule.warmup_steps=1", "sft.tokens_per_step=400",
    "sft.new_model.hidden_size=32", "sft.new_model.intermediate_size=32", "sft.new_model.num_hidden_layers=1",
    "sft.evaluation.problems=4", "sft.evaluation.every=3", "train.steps=2", "train.schedule.warmup_steps=1",
    "train.prompts_per_step=4",
    "train.max_tokens=6", "train.evaluation.problems=4", "train.evaluation.max_tokens=6", "train.evaluation.every=1",
    "train.keep_rollouts_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo_directory(tmp_path_factory):
    """A demo run twice in the same directory."""
    directory = tmp_path_factory.mktemp("runs") / "demo"
    for _ in range(2):
        assert demo(str(directory), overrides=TINY)
    return directory


def test_demo_leaves_a_summary_with_every_figure(demo_directory):
    summary = json.loads((demo_directory / "summary.json").read_text())
    for name in ("accuracy_think_before", "accuracy_think_after", "accuracy_direct_before", "accuracy_direct_after"):
        assert 0.0 <= summary[name] <= 1.0
    assert summary["max_abs_logprob_difference"] == 0.0 and summary["weight_bytes_moved"] == 0
    assert summary["checked_tokens"] > 0 and summary["rollout_tokens_per_second"] > 0 and summary["seconds"] > 0
    assert summary["rl_steps"] == 2 and summary["sft_steps"] == 3
    assert "train_tokens_per_second" in summary


def test_demo_leaves_a_checkpoint_that_transformers_loads(demo_directory):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_directory / "checkpoint")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_directory / "checkpoint")
    conversation = [{"role": "user", "content": "123+456="}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, thinking=True)
    assert text == "<|thinking|><|user|>123+456=<|end|><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids.shape == (1, 12) and model(ids).logits.shape == (1, 12, len(tokenizer))


def test_report_holds_the_run_and_needs_no_network(demo_directory):
    page = (demo_directory / "report.html").read_text()
    assert not re.search(r"(https?:)?//\w|<link|@import|url\(|\bsrc=", page)
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL).group(1))
    titles = {chart["title"] for section in data["sections"] for chart in section["charts"]}
    assert titles >= {"Reward", "Completion length", "Entropy", "Tokens per second", "Loss", "Held-out accuracy"}
    assert {part["label"] for part in data["time"]} >= {"rollout", "rewards", "evaluation"}
    assert {rollout["step"] for rollout in data["rollouts"]} == {0, 1}
    assert all(rollout["pieces"][0] == "<|thinking|>" for rollout in data["rollouts"])


def test_text_of_a_rollout_cannot_end_the_script(tmp_path):
    line = {"step": 0, "group": 0, "reward": 0.0, "pieces": ["</script><script>alert(1)"], "written": [1],
            "logprobs": [0.0], "advantages": [0.0], "failure": None}  # fmt: skip
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(line) + "\n")
    write_report(tmp_path / "report.html", tmp_path)
    assert "</script><script>alert(1)" not in (tmp_path / "report.html").read_text()


def test_resuming_a_complete_demo_repeats_nothing(demo_directory):
    before = (demo_directory / "checkpoint" / "model.safetensors").read_bytes()
    steps = (demo_directory / "metrics.jsonl").read_text()
    assert demo(str(demo_directory), resume=True, overrides=TINY)
    assert (demo_directory / "checkpoint" / "model.safetensors").read_bytes() == before
    assert (demo_directory / "metrics.jsonl").read_text() == steps


def test_evaluate_prints_both_modes(demo_directory, capsys):
    overrides = [f"model={demo_directory}/checkpoint", "evaluation.problems=4", "evaluation.max_tokens=4"]
    assert main(["evaluate", "examples/arithmetic.toml", *overrides]) == 0
    out = capsys.readouterr().out
    assert "thinking" in out and "direct" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.toml"], "no such configuration file"),
        (["train", "examples/arithmetic.toml", "advantge=grpo"], 'did you mean "advantage"'),
        (["train", "examples/arithmetic.toml", "advantage=ppo"], "there are grpo, dr_grpo, rloo, maxrl"),
        (["train", "examples/arithmetic.toml", "group_size=1"], "at least 2"),
        (["train", "examples/arithmetic.toml", "temperature=0.0"], "above 0"),
        (["train", "examples/arithmetic.toml", "model=nowhere"], "nowhere"),
        (["train", "examples/arithmetic.toml", "loss.name=dap"], 'did you mean "dapo"'),
        (["train", "examples/arithmetic.toml", "schedule.shape=linear"], "linear"),
        (["sft", "examples/arithmetic_sft.toml", "data=none.jsonl"], "none.jsonl cannot be read"),
        (["demo", "steps=3"], "names no stage"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_parallel_at_the_top_is_that_of_the_engine(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('run_dir = "r"\nmodel = "m"\nsteps = 1\n[env]\nname = "e"\n[schedule]\nlearning_rate = 1.0\n')
    config = load_config(TrainConfig, file, ["parallel.tp=4", "parallel.dp=2"])
    assert config.engine.parallel == config.parallel == ParallelConfig(tp=4, dp=2)
    assert load_config(TrainConfig, file, ["engine.parallel.pp=2"]).parallel == ParallelConfig(pp=2)
    with pytest.raises(ConfigError, match="both given, and differ"):
        load_config(TrainConfig, file, ["parallel.tp=4", "engine.parallel.tp=2"])
    with pytest.raises(ConfigError, match='no key "tpp"'):
        load_config(TrainConfig, file, ["parallel.tpp=4"])
