"""A directory is wholly there or not there at all."""

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from engine.atomic import atomic_directory, recover
from engine.errors import CheckpointError


def write(path, text):
    with atomic_directory(path) as tmp:
        (tmp / "value").write_text(text)


def test_new_directory_appears_whole(tmp_path):
    write(tmp_path / "deep" / "state", "one")
    assert (tmp_path / "deep" / "state" / "value").read_text() == "one"
    assert os.listdir(tmp_path / "deep") == ["state"]


def test_replacing_leaves_only_the_new_one(tmp_path):
    write(tmp_path / "state", "one")
    (tmp_path / "state" / "of_the_first_only").write_text("")
    write(tmp_path / "state", "two")
    assert os.listdir(tmp_path) == ["state"]
    assert os.listdir(tmp_path / "state") == ["value"]
    assert (tmp_path / "state" / "value").read_text() == "two"


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt()])
def test_failing_block_leaves_the_old_one_and_its_own_error(tmp_path, failure):
    write(tmp_path / "state", "one")
    with pytest.raises(type(failure)), atomic_directory(tmp_path / "state") as tmp:
        (tmp / "value").write_text("half")
        raise failure
    assert os.listdir(tmp_path) == ["state"]
    assert (tmp_path / "state" / "value").read_text() == "one"


def test_full_disk_leaves_the_old_one_and_says_what_to_do(tmp_path):
    write(tmp_path / "state", "one")
    with (
        pytest.raises(CheckpointError, match=r"bytes free.*free some space"),
        atomic_directory(tmp_path / "state") as tmp,
    ):
        (tmp / "value").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == ["state"]
    assert (tmp_path / "state" / "value").read_text() == "one"


@pytest.mark.parametrize("renames_done", [0, 1, 2])
def test_killed_at_any_rename_a_complete_directory_is_found(tmp_path, renames_done):
    """SIGKILL right before, between and after the two renames, in a process of its own."""
    write(tmp_path / "state", "one")
    script = textwrap.dedent(f"""
        import os, signal
        from engine.atomic import atomic_directory
        done, rename = [], os.rename
        def counting(a, b):
            if len(done) == {renames_done}:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(a, b)
            done.append(b)
        os.rename = counting
        with atomic_directory({str(tmp_path / "state")!r}) as tmp:
            (tmp / "value").write_text("two")
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert killed.returncode == -signal.SIGKILL
    recover(tmp_path / "state")
    assert (tmp_path / "state" / "value").read_text() == ("two" if renames_done == 2 else "one")
    write(tmp_path / "state", "three")
    assert os.listdir(tmp_path) == ["state"], "what the killed writer left was cleaned up"
    assert (tmp_path / "state" / "value").read_text() == "three"


def test_foreign_file_is_not_deleted(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"), atomic_directory(tmp_path, owns=("*.json",)):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(CheckpointError, match="is a file"), atomic_directory(tmp_path / "state"):
        pass


def test_link_to_a_directory_stays_a_link(tmp_path):
    write(tmp_path / "step1", "one")
    (tmp_path / "latest").symlink_to("step1")
    write(tmp_path / "latest", "two")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "step1" / "value").read_text() == "two"
