"""python -m engine: each command runs on a real directory, and errors are one line."""

import io

import pytest

from engine import __main__ as cli
from engine.kernels.op import cpu_missing
from tests.tiny import save_hf_tiny, save_tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_hf_tiny(directory)
    save_tiny_tokenizer(directory)
    return str(directory)


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


def test_generate_prints_what_the_seed_says(model, capsys):
    arguments = ("generate", model, "think of", "--max-tokens", "12", "--seed", "3", "--kv-tokens", "512")
    assert run(*arguments) == 0
    first = capsys.readouterr().out
    assert run(*arguments) == 0
    assert capsys.readouterr().out == first != "\n"


@pytest.mark.parametrize("switch", ["--think", "--no-think"])
def test_chat_answers_each_line_and_ends_at_an_empty_one(model, capsys, monkeypatch, switch):
    monkeypatch.setattr("sys.stdin", io.StringIO("12 + 34\n56 + 78\n\nnever read\n"))
    assert run("chat", model, switch, "--max-tokens", "8", "--seed", "1", "--kv-tokens", "512") == 0
    out = capsys.readouterr().out
    assert f"thinking {'on' if switch == '--think' else 'off'}" in " ".join(out.split())


def test_score_lists_every_token_after_the_first(model, capsys):
    from engine import Tokenizer

    assert run("score", model, "the sum") == 0
    out = capsys.readouterr().out
    for token in Tokenizer.from_pretrained(model).encode("the sum")[1:]:
        assert str(token) in out


def test_ops_names_every_op_and_its_backends(capsys):
    assert run("ops") == 0
    out = capsys.readouterr().out
    for word in ("linear", "attention", "token_logprob", "cpu", "torch"):
        assert word in out


def test_an_error_is_one_line_and_exit_code_one(capsys, tmp_path):
    assert run("generate", str(tmp_path / "nowhere"), "hello") == 1
    assert capsys.readouterr().out.startswith("error: ")


def test_a_model_without_a_tokenizer_is_refused(capsys, tmp_path):
    save_hf_tiny(tmp_path)
    assert run("generate", str(tmp_path), "hello", "--kv-tokens", "512") == 1
    assert "tokenizer.json" in capsys.readouterr().out


@pytest.mark.skipif(bool(cpu_missing()), reason="no kernels are built")
def test_ops_for_float64_says_why_no_kernel_runs(capsys, monkeypatch):
    monkeypatch.setattr(cli.console, "width", 200)
    assert run("ops", "--dtype", "float64") == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["attention", "cpu", "", "yes", "yes", "it computes in float32 and bfloat16, not in float64"] in rows
    assert ["attention", "torch", "yes", "no", "yes", ""] in rows
