"""Machines by name, from files, with figures replaced, and where each figure is from."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.planner.machine import FIGURES, MACHINES, Machine, load_machine, parse_bytes


@pytest.mark.parametrize("name", MACHINES)
def test_every_figure_of_a_named_machine_says_where_it_is_from(name: str) -> None:
    machine = load_machine(name)
    assert all(machine.source(figure) in ("vendor", "assumed", "unknown") for figure in FIGURES)
    assert all((machine.source(figure) == "unknown") == (not getattr(machine, figure)) for figure in FIGURES)


def test_unknown_machine_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'"h20".*did you mean "h200".*FILE\.toml'):
        load_machine("h20")


def test_given_figures_replace_those_of_the_machine() -> None:
    machine = load_machine("h200", memory_gb=80.0, inter_gbps=None)
    assert (machine.memory_gb, machine.source("memory_gb")) == (80.0, "given")
    assert machine.source("inter_gbps") == "assumed" and MACHINES["h200"].memory_gb == 141.0


def test_machine_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("peak_tflops = 2.5\nintra_gbps = 12.0\n")
    machine = load_machine(str(tmp_path / "mine.toml"))
    assert (machine.name, machine.peak_tflops, machine.source("peak_tflops")) == ("mine", 2.5, "given")
    assert machine.flops == pytest.approx(2.5e12 * machine.achieved_fraction)


def test_file_with_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("peak_tflop = 2.5\n")
    with pytest.raises(ConfigError, match='did you mean "peak_tflops"'):
        load_machine(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(("figure", "value"), [
    ("peak_tflops", -1.0),
    ("inter_gbps", float("inf")),
    ("memory_gb", float("nan")),
    ("ranks_per_node", 0),
    ("achieved_fraction", 0.0),
    ("achieved_fraction", 1.1),
])  # fmt: skip
def test_figure_that_cannot_be_is_refused_by_name(figure: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"Machine.{figure} is {value}"):
        Machine(**{figure: value})


@pytest.mark.parametrize(("text", "expected"), [
    ("180GB", 180_000_000_000),
    ("64 GiB", 64 << 30),
    ("1.5kb", 1500),
    ("123", 123),
])  # fmt: skip
def test_bytes_are_read_with_their_unit(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 PB", "1e9"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like 180GB"):
        parse_bytes(text)
