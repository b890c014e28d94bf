"""The command behind `make test-gpu`, on files for whose tests no GPU is needed."""

from __future__ import annotations

import sys

from tests import on_gpu


def test_every_file_runs_in_a_process_of_its_own_and_one_failure_is_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_first.py").write_text("def test_it():\n    assert True\n")
    (tmp_path / "test_second.py").write_text("def test_it():\n    assert 'planted' == 'fault'\n")
    monkeypatch.setattr(sys, "argv", ["on_gpu", str(tmp_path), "--processes", "1"])
    assert on_gpu.main() == 1
    said = capsys.readouterr().out
    assert "test_first.py: passed" in said
    assert "planted" in said and "test_second.py: FAILED" in said
    assert f"1 of 2 files failed: {tmp_path / 'test_second.py'}" in said


def test_a_file_that_takes_too_long_is_ended(tmp_path):
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\n\n\ndef test_it():\n    time.sleep(60)\n")
    status, seconds, output = on_gpu.run(str(slow), seconds=2.0)
    assert status == 1
    assert seconds < 30
    assert "ended after 2 s" in output
