"""`python -m forge`, as a person meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forge.__main__ import main
from forge.nodes.arithmetic import is_held_out

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = str(ROOT / "examples" / "arithmetic_graph.toml")


@pytest.fixture(autouse=True)
def in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_example_writes_the_corpus_of_the_demo(capsys):
    assert main(["run", EXAMPLE, "records=400"]) == 0
    assert "400 records in runs/arithmetic/accepted.jsonl" in capsys.readouterr().out
    corpus = read("runs/arithmetic/accepted.jsonl")
    assert len(corpus) == 400 and {row["thinking"] for row in corpus} == {True, False}
    questions = set()
    for row in corpus:
        assert set(row) == {"messages", "thinking", "provenance"}
        question, answer = (message["content"] for message in row["messages"])
        left, right = map(int, question.rstrip("=").split("+"))
        assert answer.endswith(f"</think>{left + right}" if row["thinking"] else str(left + right))
        assert answer.startswith("<think>") == row["thinking"]
        assert not is_held_out(question), "a held-out problem is in the training corpus"
        questions.add(question)
    assert len(questions) == 400


def test_held_out_corpus_shares_no_problem_with_the_training_corpus(capsys):
    override = "nodes.sample_operands.parameters.split=held_out"
    assert main(["run", EXAMPLE, override, "records=50", "output=held_out"]) == 0
    for row in read("held_out/accepted.jsonl"):
        assert is_held_out(row["messages"][0]["content"])


def test_options_may_stand_before_and_after_overrides(capsys):
    assert main(["run", EXAMPLE, "--resume", "records=5", "output=a"]) == 0
    assert main(["run", EXAMPLE, "records=9", "output=a", "--resume"]) == 0
    assert len(read("a/accepted.jsonl")) == 9


def test_check_show_and_preview_write_nothing(capsys, tmp_path):
    assert main(["check", EXAMPLE]) == 0
    assert main(["show", EXAMPLE]) == 0
    assert main(["show", "--mermaid", EXAMPLE]) == 0
    assert main(["preview", "-n", "2", EXAMPLE]) == 0
    out = capsys.readouterr().out
    assert "is sound: 7 nodes, 9 edges" in out
    assert "think_in_columns (0.45) | think_at_a_glance (0.45) | answer_directly (0.1)" in out
    assert "flowchart LR" in out
    assert out.count("walk 0:") == 1 and out.count("walk 1:") == 1 and "walk 2:" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("record=5", 'no key "record" (did you mean "records"?)'),
        ("nodes.sample_operands.parameters.max_digit=3", 'no "max_digit" (did you mean "max_digits"?)'),
        ("nodes.sample_operand.parameters.max_digits=3", '"sample_operand" (did you mean "sample_operands"?)'),
        ("nodes.conclude.use=x:y", 'no "use" (did you mean "uses"?)'),
        ("nodes.conclude.uses=forge.nodes.arithmetic:concluded", 'no node "concluded" (did you mean "conclude"?)'),
        ("nodes.conclude.uses=forge.nodes.arithmetics:conclude", 'no module "forge.nodes.arithmetics"'),
        ("nodes.conclude.uses=conclude", 'write it as "module:function"'),
        ("nodes.conclude.graph=other.toml", 'has both "uses" and "graph"'),
        ("weights.sample_operands.think=1", 'which is no edge; from "sample_operands" there are'),
        ('goal=["message"]', '(did you mean "messages"?)'),
        ('unique=["lef"]', '(did you mean "left"?)'),
        ("records=0", "records is 0; it must be at least 1"),
        ("nodes.sample_operands.parameters.min_digits=9", "operands of 9 to 3 digits"),
        ("records", "not of the form key=value"),
        ("seed.first=1", '"seed" is a value, not a table'),
        ("nodes.conclude=1", "Expected `object`, got `int`"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(capsys, tmp_path, override, message):
    assert main(["run", EXAMPLE, override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_file_and_unknown_option(capsys):
    assert main(["check", "no.toml"]) == 2
    assert "no such configuration file: no.toml" in capsys.readouterr().err
    assert main(["check", "."]) == 2
    assert ". cannot be read: Is a directory" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["run", EXAMPLE, "--resum"])


def test_run_that_falls_short_says_why_and_fails(capsys):
    one_digit = "nodes.sample_operands.parameters={min_digits=1, max_digits=1}"
    there_are = sum(not is_held_out(f"{left}+{right}=") for left in range(10) for right in range(10))
    assert main(["run", EXAMPLE, one_digit, "records=101", "max_rejected_in_a_row=900"]) == 1
    captured = capsys.readouterr()
    assert f"{there_are} of 101 records, then 900 rows rejected in a row" in captured.err
    assert "left, right are those of walk" in captured.err
    assert len(read("runs/arithmetic/accepted.jsonl")) == there_are


def test_nested_graph_file(capsys):
    Path("columns.toml").write_text(
        'name = "columns"\ngiven = ["left", "right"]\ngoal = ["answer"]\n'
        '[nodes.think]\nuses = "forge.nodes.arithmetic:think_in_columns"\n'
        '[nodes.conclude]\nuses = "forge.nodes.arithmetic:conclude"\n'
    )
    Path("outer.toml").write_text(
        'name = "outer"\ngoal = ["verdict"]\n'
        '[nodes.sample]\nuses = "forge.nodes.arithmetic:sample_operands"\n'
        '[nodes.solve]\ngraph = "columns.toml"\n'
        '[nodes.check]\nuses = "forge.nodes.arithmetic:check_answer"\n'
    )
    assert main(["preview", "-n", "1", "outer.toml"]) == 0
    assert "sample -> solve/think -> solve/conclude -> check" in capsys.readouterr().out
    assert main(["run", "columns.toml"]) == 2
    Path("columns.toml").write_text('name = "c"\ngoal = ["x"]\n[nodes.self]\ngraph = "columns.toml"\n')
    assert main(["check", "columns.toml"]) == 2
    assert "nests itself" in capsys.readouterr().err


def test_killed_run_resumes_to_the_same_bytes():
    command = [sys.executable, "-m", "forge", "run", EXAMPLE, "records=20000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([*command, "output=killed"], env=environment, stdout=subprocess.DEVNULL)
    accepted = Path("killed/accepted.jsonl")
    deadline = time.monotonic() + 30
    while (not accepted.exists() or accepted.stat().st_size < 100_000) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with accepted.open("ab") as file:
        file.write(b'{"messages":[{"ro')
    assert main(["run", EXAMPLE, "records=3000", "output=whole"]) == 0
    kept = accepted.read_bytes().count(b"\n")
    assert 0 < kept < 20000, "the run was killed neither before its first row nor after its last"
    assert main(["run", EXAMPLE, f"records={kept + 500}", "output=killed", "--resume"]) == 0
    assert main(["run", EXAMPLE, f"records={kept + 500}", "output=whole"]) == 0
    for name in ("accepted.jsonl", "rejected.jsonl"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()


def test_graphs_need_no_torch():
    code = "import sys, forge, forge.nodes.arithmetic, forge.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
