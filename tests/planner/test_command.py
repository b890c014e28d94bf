"""`python -m engine plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.__main__ import main
from engine.architectures import model_config_to_hf
from engine.planner.share import DTYPES
from tests.tiny import tiny_config


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A config.json and nothing else."""
    config = tiny_config("Qwen3ForCausalLM", num_hidden_layers=4)
    (tmp_path / "config.json").write_text(json.dumps(model_config_to_hf(config, DTYPES["bfloat16"])))
    return str(tmp_path)


def test_plan_prints_tables_and_the_step(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "tp=2,pp=2,dp=2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "= 8 ranks",
        "stage 1",
        "optimizer",
        "KV tokens that fit",
        "vendor",
        "assumed",
        "bubble:",
        "tokens/s",
    ):
        assert words in out


def test_plan_prints_one_line_of_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{model}/config.json", "tp=2,pp=2", "--json", "--micro-batches", "6"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["world_size"] == 4 and found["micro_batches"] == 6 and found["fits"] is True
    assert [sum(stage["bytes"].values()) for stage in found["stages"]] == [s["total_bytes"] for s in found["stages"]]
    assert sum(found["step_parts_seconds"].values()) == pytest.approx(found["step_seconds"])


def test_options_reach_the_plan(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--schedule", "interleaved", "--activation-checkpointing", "--step-tokens", "8192", "--memory", "2GB"]
    assert main(["plan", model, "pp=2,dp=2", "--micro-batch-tokens", "512", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["micro_batches"] == 8 and found["machine"]["memory_gb"] == 2.0
    assert found["activation_checkpointing"] and found["schedule"] == "interleaved"
    assert [len(stage["layers"]) for stage in found["stages"]] == [2, 2]


def test_cpu_has_no_peak_of_its_own_and_takes_one(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "dp=2", "--machine", "cpu"]) == 0
    assert "no time: the machine lacks peak_tflops, inter_gbps" in capsys.readouterr().out
    assert main(["plan", model, "dp=2", "--machine", "cpu", "--peak-tflops", "1", "--inter-gbps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_seconds"] > 0


def test_search_prints_meshes_the_fastest_first(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "--search", "4", "--top", "3", "--json", "--step-tokens", "65536"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 3 and {plan["world_size"] for plan in found} == {4}
    assert found[0]["tokens_per_second"] >= found[1]["tokens_per_second"] >= found[2]["tokens_per_second"]
    assert main(["plan", model, "--search", "4", "--step-tokens", "65536"]) == 0
    assert "fastest of" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "complaint"), [
    (["tp=3"], "tp is 3, but the model has 4 attention heads"),
    (["--machine", "h2"], "there is no machine"),
    (["--schedule", "1f2b"], 'did you mean "1f1b"'),
    (["tp=2", "--search", "8"], "leave out a mesh"),
    (["--search", "0"], "must be at least 1"),
    (["--step-tokens", "100"], "less than one micro-batch"),
    (["--micro-batches", "-1"], "must be above 0"),
    (["--micro-batches", "2", "--step-tokens", "16384"], "give one"),
    (["--memory", "lots"], "write it like 180GB"),
])  # fmt: skip
def test_what_cannot_be_planned_is_one_line(
    model: str, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", model, *options]) == 1
    assert complaint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "complaint"), [("{", "is not JSON"), ("[]", "no JSON object"), ("{}", "architecture")]
)
def test_file_that_is_no_model_is_refused(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.json").write_text(text)
    assert main(["plan", str(tmp_path / "model.json"), "tp=1"]) == 1
    assert complaint in capsys.readouterr().out
