"""`python -m forge run|check|show|preview graph.toml [key=value ...]`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine import ConfigError, EngineError
from forge.config import load_graph
from forge.graph import Graph
from forge.run import RunResult, RunSettings, check_settings, preview, run_graph
from forge.store import Tally


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 the run fell short or could not write, 2 bad arguments or graph, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m forge", description="Make data by random walks on a graph.")
    commands = parser.add_subparsers(dest="command", required=True)
    graph_file = argparse.ArgumentParser(add_help=False)
    graph_file.add_argument("graph", help="graph file (TOML)")
    graph_file.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the file")
    run = commands.add_parser(
        "run", allow_abbrev=False, parents=[graph_file], help="run the graph and write its records"
    )
    run.add_argument("--resume", action="store_true", help="continue the run that the output folder holds")
    commands.add_parser("check", parents=[graph_file], help="check the graph, run nothing")
    show = commands.add_parser("show", allow_abbrev=False, parents=[graph_file], help="print the graph")
    show.add_argument("--mermaid", action="store_true", help="as a Mermaid flow chart")
    look = commands.add_parser("preview", parents=[graph_file], help="print the first walks, write nothing")
    look.add_argument("-n", type=int, default=3, metavar="WALKS", help="how many (3)")
    options, rest = parser.parse_known_args(arguments)
    if any(text.startswith("-") for text in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        graph, settings = load_graph(options.graph, [*options.overrides, *rest])
        if options.command == "run":
            return _run(graph, settings, options.resume)
        if options.command == "check":
            check_settings(graph, settings)
            edges = sum(map(len, graph.edges.values()))
            print(f"{options.graph}: graph {graph.name} is sound: {len(graph.nodes)} nodes, {edges} edges")
        elif options.command == "show":
            print(graph.describe("mermaid" if options.mermaid else "text"))
        else:
            _preview(graph, settings, options.n)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, continue with --resume", file=sys.stderr)
        return 130
    return 0


def _run(graph: Graph, settings: RunSettings, resume: bool) -> int:
    with _progress(settings.records) as progress:
        result = run_graph(graph, settings, resume=resume, progress=progress)
    print(_summary(result))
    if result.complete:
        return 0
    reason = result.last_failure.reason if result.last_failure else ""
    print(
        f"error: {result.accepted} of {settings.records} records, then {settings.max_rejected_in_a_row} rows rejected "
        f"in a row, the last because: {reason}; ask for fewer records or let the graph make more",
        file=sys.stderr,
    )
    return 1


def _summary(result: RunResult) -> str:
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(result.rejected.items()))
    rate = result.new_rows / max(result.seconds, 1e-9)
    return (
        f"{result.accepted} records in {result.folder}/accepted.jsonl, {sum(result.rejected.values())} rows in "
        f"rejected.jsonl{f' ({kinds})' if kinds else ''}; {result.new_rows} new rows in {result.seconds:.2f} s, "
        f"{rate:,.0f} rows/s"
    )


@contextmanager
def _progress(records: int) -> Iterator[Callable[[Tally], None]]:
    """A live count on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda tally: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("records", total=records)
        yield lambda tally: bar.update(
            task, completed=tally.accepted, description=f"records ({tally.rejected} rows rejected)"
        )


def _preview(graph: Graph, settings: RunSettings, walks: int) -> None:
    for walk in preview(graph, settings, walks):
        print(f"walk {walk.index}: {' -> '.join(call.node for call in walk.calls)}")
        for name, value in walk.record.items():
            print(f"  {name:<12} {msgspec.json.encode(value).decode()}")
        if walk.failure:
            print(f"  {walk.failure.kind} by {walk.failure.node}: {walk.failure.reason}")


if __name__ == "__main__":
    sys.exit(main())
