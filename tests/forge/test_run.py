"""A run writes the same bytes however it is cut and whatever runs beside what."""

import json
import resource

import pytest

from engine import ConfigError
from forge import Graph, RunSettings, StoreError, has, preview, run_graph
from forge.node import parse_struct
from tests.forge.nodes_for_tests import draw_number, halve, make

GRAPH = Graph("numbers", [draw_number, halve], goal=[has("half")])


def settings(folder, **options):
    return RunSettings(**{"output": str(folder), "seed": 5, "records": 60, **options})


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def files(folder):
    return [(folder / name).read_bytes() for name in ("accepted.jsonl", "rejected.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_graph(GRAPH, settings(folder)).complete
    return folder


def test_rows_carry_fields_and_provenance(whole):
    accepted = rows(whole, "accepted.jsonl")
    assert len(accepted) == 60
    for row in accepted:
        assert set(row) == {"half", "provenance"}
        provenance = row["provenance"]
        assert (provenance["graph"], provenance["version"], provenance["seed"]) == ("numbers", GRAPH.version, 5)
        assert [(c["node"], c["version"], c["wrote"]) for c in provenance["calls"]] == [
            ("draw_number", 3, ["number"]),
            ("halve", 1, ["half"]),
        ]


def test_row_is_found_again_by_its_provenance(whole):
    for row in rows(whole, "accepted.jsonl")[:5]:
        walk = preview(GRAPH, settings(whole), row["provenance"]["walk"] + 1)[-1]
        assert walk.record["half"] == row["half"]


def test_rejected_rows_are_kept_with_their_reason(whole):
    rejected = rows(whole, "rejected.jsonl")
    assert {row["failure"]["kind"] for row in rejected} == {"rejected", "failed"}
    for row in rejected:
        number = row["record"]["number"]
        assert row["failure"]["node"] == "halve"
        assert row["failure"]["reason"] == (f"{number} is odd" if number % 2 else "OverflowError: fifty")
    walks = [row["provenance"]["walk"] for name in ("accepted.jsonl", "rejected.jsonl") for row in rows(whole, name)]
    assert sorted(walks) == list(range(len(walks)))


@pytest.mark.parametrize("concurrency", [1, 3, 500])
def test_bytes_do_not_depend_on_concurrency(whole, tmp_path, concurrency):
    run_graph(GRAPH, settings(tmp_path, concurrency=concurrency))
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("cuts", [(0, 0), (0.3, 0.9), (0.9, 0.3), (0.5, 0.5), (1, 1), (1, 0)])
def test_resume_after_a_torn_line_equals_the_uninterrupted_run(whole, tmp_path, cuts):
    run_graph(GRAPH, settings(tmp_path))
    for name, cut in zip(("accepted.jsonl", "rejected.jsonl"), cuts, strict=True):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: int(len(data) * cut)])
    result = run_graph(GRAPH, settings(tmp_path), resume=True)
    assert files(tmp_path) == files(whole)
    assert result.complete and (result.new_rows == 0) == (cuts == (1, 1))


@pytest.mark.parametrize("tail", [b'{"half": 3, "prov', b"\0\0\0\0\n", b'{"half": 3}\n'])
def test_last_line_that_is_no_row_is_dropped(whole, tmp_path, tail):
    run_graph(GRAPH, settings(tmp_path, records=20))
    with (tmp_path / "accepted.jsonl").open("ab") as file:
        file.write(tail)
    run_graph(GRAPH, settings(tmp_path), resume=True)
    assert files(tmp_path) == files(whole)


def test_resume_extends_a_finished_run(whole, tmp_path):
    run_graph(GRAPH, settings(tmp_path, records=7))
    result = run_graph(GRAPH, settings(tmp_path), resume=True)
    assert files(tmp_path) == files(whole)
    assert result.accepted == 60 and result.new_rows < 60 + sum(result.rejected.values())


def test_resume_finds_duplicates_of_earlier_rows(tmp_path):
    options = {"unique": ("number",), "fields": ("half",), "records": 30}
    run_graph(GRAPH, settings(tmp_path / "whole", **options))
    run_graph(GRAPH, settings(tmp_path / "cut", **{**options, "records": 11}))
    run_graph(GRAPH, settings(tmp_path / "cut", **options), resume=True)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    halves = [row["half"] for row in rows(tmp_path / "whole", "accepted.jsonl")]
    assert len(set(halves)) == 30
    first = next(r for r in rows(tmp_path / "whole", "rejected.jsonl") if r["failure"]["kind"] == "duplicate")
    assert first["failure"]["reason"].startswith("number are those of walk ")


def test_resume_refuses_another_run(tmp_path):
    run_graph(GRAPH, settings(tmp_path, records=3))
    with pytest.raises(StoreError, match="holds a run with seed 5, not 6"):
        run_graph(GRAPH, settings(tmp_path, seed=6), resume=True)
    changed = Graph("numbers", [draw_number, halve.bind("halve", {"by": 2})], goal=[has("half")])
    with pytest.raises(StoreError, match="holds a run with version"):
        run_graph(changed, settings(tmp_path), resume=True)


def test_damaged_line_in_the_middle_is_not_passed_over(tmp_path):
    run_graph(GRAPH, settings(tmp_path, records=5))
    lines = (tmp_path / "accepted.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "accepted.jsonl").write_bytes(b"".join([lines[0], b"{}\n", *lines[2:]]))
    with pytest.raises(StoreError, match=r"line 2 of .*accepted\.jsonl is damaged"):
        run_graph(GRAPH, settings(tmp_path), resume=True)


def test_fresh_run_keeps_the_files_of_the_one_before(whole, tmp_path):
    run_graph(GRAPH, settings(tmp_path, records=4, seed=1))
    before = (tmp_path / "accepted.jsonl").read_bytes()
    run_graph(GRAPH, settings(tmp_path))
    assert files(tmp_path) == files(whole)
    assert (tmp_path / "accepted.jsonl.previous").read_bytes() == before


def test_one_bad_row_never_stops_a_run_but_only_bad_rows_do(tmp_path):
    def broken(record, draws):
        raise ZeroDivisionError("always")

    graph = Graph("broken", [make("broken", "", "out", run=broken)], goal=[has("out")])
    result = run_graph(graph, settings(tmp_path, max_rejected_in_a_row=25))
    assert not result.complete and result.rejected == {"failed": 25}
    assert result.last_failure is not None and result.last_failure.reason == "ZeroDivisionError: always"
    again = run_graph(graph, settings(tmp_path, max_rejected_in_a_row=25), resume=True)
    assert again.new_rows == 0 and not again.complete


def test_exhausted_problems_end_the_run(tmp_path):
    result = run_graph(GRAPH, settings(tmp_path, records=51, unique=("number",), max_rejected_in_a_row=400))
    assert not result.complete and result.accepted == 49  # even numbers below 100, without fifty


def test_fields_must_be_in_every_finished_record(tmp_path):
    with pytest.raises(ConfigError, match=r'fields names "halves" \(did you mean "half"\?\)'):
        run_graph(GRAPH, settings(tmp_path, fields=("halves",)))
    with pytest.raises(ConfigError, match='unique names "z"'):
        run_graph(GRAPH, settings(tmp_path, unique=("z",)))
    assert not list(tmp_path.iterdir())


def test_graph_with_given_fields_cannot_run_by_itself(tmp_path):
    graph = Graph("inner", [make("a", "seed", "out")], goal=[has("out")], given=[has("seed")])
    with pytest.raises(ConfigError, match=r'starts from has\("seed"\).*nest it'):
        run_graph(graph, settings(tmp_path))


@pytest.mark.parametrize("key", ["records", "concurrency", "max_rejected_in_a_row"])
def test_settings_below_their_limit_are_refused(key):
    with pytest.raises(ConfigError, match=f"{key} is 0; it must be at least 1"):
        parse_struct(RunSettings, {key: 0}, "settings")


def test_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*file"):
        run_graph(GRAPH, settings(tmp_path / "file"))


def test_run_cut_by_a_full_disk_resumes_to_the_same_bytes(whole, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_007, limits[1]))  # no file grows past it
    try:
        with pytest.raises(StoreError, match=r"cannot write .*make room.*continue with --resume"):
            run_graph(GRAPH, settings(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert max(map(len, files(tmp_path))) == 10_007
    run_graph(GRAPH, settings(tmp_path), resume=True)
    assert files(tmp_path) == files(whole)
