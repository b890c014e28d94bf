"""What a run shows: plain lines without a terminal, on one as many figures as fit."""

import io

from rich.console import Console

from rl.progress import Progress

RECORD = {"reward": 0.5, "loss": 1.25, "max_abs_logprob_difference": 0.0, "entropy": 0.25, "held_out_accuracy": 0.75}


def shown(record, **console):
    out = io.StringIO()
    progress = Progress("train", Console(file=out, **console))
    progress.start(10)
    progress.advance(3, record)
    progress.stop()
    return out.getvalue()


def test_without_a_terminal_a_step_is_one_plain_line():
    expected = "train 3/10  reward 0.500  held out 75.0%  max |Δ log p| 0  loss 1.2500  entropy 0.250\n"
    assert shown(RECORD) == expected


def test_a_figure_that_a_step_lacks_is_left_out():
    assert "entropy" not in shown(RECORD | {"entropy": None})


def test_on_a_narrow_terminal_the_first_figures_stay_whole():
    narrow, wide = (shown(RECORD, force_terminal=True, width=width) for width in (70, 160))
    assert "reward 0.500" in narrow and "entropy" not in narrow
    assert "reward 0.500" in wide and "entropy 0.250" in wide
