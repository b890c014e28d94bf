"""Every benchmark runs on a tiny model and ends in one line of JSON. No figure is judged here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, peers, workloads
from benchmarks.__main__ import main as run_all
from benchmarks.compare import main as compare_engines
from benchmarks.table import Row, compare, peer_rows

QUICK = ["--model=tiny", "--quick"]


@pytest.fixture(autouse=True, scope="module")
def measured_once() -> Iterator[None]:
    """One measurement of the machine serves every test."""
    limits = machine.measure(quick=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "measure", lambda quick: limits)
        yield


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "first_cells"),
    [("decode", ["W1"]), ("rollout", ["W2", "W3", "W4"]), ("train_step", ["T1", "TR"]), ("grpo_step", ["R1"])],
)
def test_workload_benchmark_ends_in_json(name: str, first_cells: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import_module(f"benchmarks.{name}").main([*QUICK, "--peer=none"])
    result = last_line(capsys)
    assert result["benchmark"] == name and result["machine"]["read_memory"] > 0
    assert [row["workload"] for row in result["rows"]] == first_cells
    assert all(row["engine"] == "caduceus" and row["value"] > 0 and row["share_of_limit"] > 0 for row in result["rows"])


def test_grpo_step_reports_equal_logprobs(capsys: pytest.CaptureFixture[str]) -> None:
    import_module("benchmarks.grpo_step").main([*QUICK, "--peer=none"])
    assert last_line(capsys)["rows"][0]["max_abs_logprob_difference"] == 0.0


def test_peer_in_the_same_run_gets_a_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    import_module("benchmarks.decode").main(QUICK)
    ours, peer = last_line(capsys)["rows"]
    assert peer["engine"].startswith("transformers ")
    assert math.isclose(peer["ours_is_better_by"], ours["value"] / peer["value"])


def test_kernels_covers_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    # float32: where Triton is interpreted it serves e4m3 pages, and has no bf16 matrix products
    import_module("benchmarks.kernels").main([*QUICK, "--dtype=float32"])
    result = last_line(capsys)
    measured = {row["op"].split()[0].split("_grad")[0] for row in result["rows"]}
    from engine.kernels.op import OPS

    assert set(OPS) <= measured | {"rms_norm"}
    assert all(row["rate"] > 0 and row["torch_rate"] > 0 for row in result["rows"])
    assert not result["failed"]


def test_a_kernel_that_fails_is_named_and_the_others_are_measured() -> None:
    from benchmarks.case import Case
    from benchmarks.kernels import measure_all

    def broken() -> None:
        raise ValueError("planted")

    limits = machine.measure(quick=True)
    sound = Case("sound", "N=1", "flops", 1.0, lambda: None, None, peers={"good": lambda: None, "bad": broken})
    results, failed = measure_all([Case("one", "N=2", "flops", 1.0, broken, None), sound], limits, "float32", 1, 1e-4)
    assert failed == ["one, N=2: ValueError: planted"]
    assert [result["op"] for result in results] == ["sound"]
    assert results[0]["peers_that_failed"] == {"bad": "ValueError: planted"}
    assert list(results[0]["peer_rates"]) == ["good"]


def test_exactness_cost_covers_ops_and_whole_steps(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    import_module("benchmarks.exactness_cost").main(QUICK)
    rows = last_line(capsys)["rows"]
    assert {"linear", "attention prefill", "attention decode", "score", "training step", "rollout"} <= {
        row["what"] for row in rows
    }
    assert all(math.isclose(row["cost"], row["exact_s"] / row["inexact_s"] - 1) for row in rows)


def test_peers_driver_prints_a_line_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    peers.main(["--model=tiny", "--quick", "--workloads=W1,W2,T1,R1", "--repeats=2"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    metrics = ["decode_tok_s", "out_tok_s", "useful_tok_s", "step_s"]
    assert [line["metric"] for line in lines] == [metric for metric in metrics for _ in range(2)]
    assert all(line["peer"] == "project" and line["value"] > 0 and line["startup_s"] > 0 for line in lines)


def test_all_benchmarks_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.__main__.BENCHMARKS", {"decode": import_module("benchmarks.decode")})
    path = run_all(["--models=tiny", f"--results={tmp_path}", "--quick", "--peer=none"])
    assert "| W1 " in path.read_text() and '{"benchmark"' not in path.read_text()


def test_a_page_with_a_failure_is_written_and_ends_with_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        @staticmethod
        def main(arguments: list[str]) -> dict[str, Any]:
            print("a table\n{}")
            return {"failed": ["one kernel"]}

    monkeypatch.setattr("benchmarks.__main__.BENCHMARKS", {"kernels": Failing})
    with pytest.raises(SystemExit, match=r"failed in part: kernels \(tiny\)"):
        run_all(["--models=tiny", f"--results={tmp_path}"])
    assert "a table" in next(tmp_path.glob("*.md")).read_text()


def test_read_loop_is_found_out_when_its_sum_is_wrong() -> None:
    with pytest.raises(RuntimeError, match="summed to"):
        machine._check(41, 42)
    assert machine.read_bandwidth(1 << 20, repeats=1) > 0


def test_workload_is_a_function_of_its_name() -> None:
    model = workloads.MODELS["llama-110m"]
    first, again = workloads.generation("W4", model), workloads.generation("W4", model)
    assert first == again and len(first.prompts) == 64
    assert first.prompts[0] != workloads.generation("W2", model).prompts[0][: len(first.prompts[0])]
    assert all(workloads.FIRST_TOKEN <= t < model.vocab_size for prompt in first.prompts for t in prompt)


def test_least_work_of_one_token_is_its_multiply_adds() -> None:
    model = workloads.MODELS["tiny"]
    work = workloads.Generation("one", [[20]], 1, [1], 1.0)
    # 2 layers of q, k, v, out (64 x 64, 32, 32, 64) and gate, up, down (64 x 128), one key, a head of 256 x 64
    layers = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert workloads.generation_flops(model, work) == 2 * (layers + 2 * 2 * 64 + 256 * 64)


def test_peer_results_are_read_by_model_and_workload(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    lines = [
        {"peer": "other", "model": "tiny", "workload": "W2", "dtype": "bfloat16", "value": 10.0},
        {"peer": "other", "model": "tiny", "workload": "W2", "dtype": "bfloat16", "value": 30.0},
        {"peer": "other", "model": "tiny", "workload": "W3", "dtype": "bfloat16", "value": 1.0},
        {"peer": "third", "model": "tiny", "workload": "W2", "dtype": "autocast", "value": 5.0},
        {"peer": "third", "model": "tiny", "workload": "W2", "dtype": "bfloat16", "value": None},
        {"peer": "project", "model": "tiny", "workload": "W2", "dtype": "bfloat16", "value": 7.0},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    rows = peer_rows(path, "tiny", "W2", "tok/s", lambda value: (value / 100, "of it"))
    assert [(row.engine, row.value, row.share) for row in rows] == [
        ("other", 20.0, 0.2),
        ("third (autocast)", 5.0, 0.05),
    ]


def test_comparison_names_the_best_peer_and_the_share_of_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(peer: str, workload: str, metric: str, value: float, dtype: str = "bfloat16") -> dict[str, Any]:
        return {"peer": peer, "model": "llama-110m", "workload": workload, "metric": metric, "value": value,
                "dtype": dtype, "threads": 2}  # fmt: skip

    path = tmp_path / "results.jsonl"
    lines = [
        line("machine", "limit", "dram_read_gbs", 50.0, "-"),
        line("project", "W1", "decode_tok_s", 200.0),
        line("fast", "W1", "decode_tok_s", 100.0),
        line("slow", "W1", "decode_tok_s", 50.0),
        line("project", "R1", "step_s", 2.0),
        line("slow", "R1", "step_s", 8.0, "autocast"),
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    compare_engines([str(path), "--results", str(tmp_path)])
    r1, w1 = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| llama-110m")]
    # 100.1 million weights of 2 bytes, 200 times a second, are 40 GB/s
    assert "fast 100" in w1 and "2.00x" in w1 and "80% of memory reads" in w1 and "slow 50" in w1
    assert "slow autocast 8" in r1 and "4.00x" in r1
    assert "2.00x" in next(tmp_path.glob("*-peers.md")).read_text()


def test_ratio_says_how_many_times_better_ours_is() -> None:
    faster, slower = Row("W2", "ours", [40.0], "tok/s"), Row("W2", "peer", [20.0], "tok/s")
    compare([faster, slower])
    assert slower.ratio == 2.0
    quick, slow = Row("R1", "ours", [2.0], "s"), Row("R1", "peer", [6.0], "s")
    compare([quick, slow], lower_is_better=True)
    assert slow.ratio == 3.0


def test_scaling_measures_each_mesh_against_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    import_module("benchmarks.scaling").main([*QUICK, "--meshes=dp2"])
    result = last_line(capsys)
    (row,) = result["rows"]
    assert (result["benchmark"], row["mesh"], row["ranks"]) == ("scaling", "dp2", 2)
    for job in ("sampling", "training"):
        assert row[job]["tokens_per_second"] > 0 and row[job]["ceiling"] > 0
        assert 0.0 < row[job]["communication"] < 1.0 and row[job]["waiting"] == 0.0


@pytest.mark.parametrize(
    ("name", "shape"), [("dp2", (2, 1, 1, 1)), ("dp2xtp2", (2, 1, 1, 2)), ("tp2xpp4", (1, 4, 1, 2))]
)
def test_meshes_are_named_by_their_axes(name: str, shape: tuple[int, ...]) -> None:
    from benchmarks.scaling import mesh_config

    mesh = mesh_config(name)
    assert (mesh.dp, mesh.pp, mesh.cp, mesh.tp) == shape
    with pytest.raises(ValueError, match='"ep2"'):
        mesh_config(f"{name}xep2")
