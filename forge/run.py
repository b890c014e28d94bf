"""A run: walks side by side, written in order, until enough records are accepted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from hashlib import sha256
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from engine import ConfigError
from forge.condition import has
from forge.graph import Graph
from forge.node import nearest
from forge.store import Header, Provenance, Store, StoreError, Tally
from forge.walk import Failure, Walk, take_walk

FLUSH_SECONDS = 0.5


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a graph is run.

    Walks are taken until `records` rows are accepted. Each accepted row holds `fields` of the record (by default those
    of the goal); a row whose `unique` fields equal those of an earlier row is rejected. At most `concurrency` walks are
    under way at a time. A node that raises is called up to `retries` times again. After `max_rejected_in_a_row` the run
    stops: nothing more is to be had.
    """

    output: str = "runs/forge"
    seed: int = 0
    records: int = 1000
    fields: tuple[str, ...] = ()
    unique: tuple[str, ...] = ()
    concurrency: int = 32
    retries: int = 0
    max_rejected_in_a_row: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("records", 1), ("concurrency", 1), ("retries", 0), ("max_rejected_in_a_row", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")


class RunResult(msgspec.Struct, frozen=True):
    """How a run ended: rows in the store (accepted, and rejected by kind), those new in this run, its seconds.

    `complete` is whether the wanted number of records is there; where it is not, `last_failure` says what came last.
    """

    folder: Path
    accepted: int
    rejected: dict[str, int]
    new_rows: int
    seconds: float
    complete: bool
    last_failure: Failure | None = None


def check_settings(graph: Graph, settings: RunSettings) -> RunSettings:
    """The settings with their default fields. Raises ConfigError when the graph cannot run by them."""
    if graph.given:
        conditions = ", ".join(map(str, graph.given.values()))
        raise ConfigError(
            f'graph "{graph.name}" starts from {conditions}, which nothing establishes before it; nest it in a graph '
            "that does"
        )
    finals = [state.knowledge for state in graph.states if state.final]
    for key in ("fields", "unique"):
        for name in getattr(settings, key):
            if not all(name in known and known[name].implies(has(name)) for known in finals):
                always = [f for f in finals[0] if all(f in k and k[f].implies(has(f)) for k in finals)]
                raise ConfigError(
                    f'{key} names "{name}"{nearest(name, always)}, which not every finished record of graph '
                    f'"{graph.name}" has; they all have {", ".join(always)}'
                )
    return msgspec.structs.replace(settings, fields=settings.fields or tuple(graph.goal))


def run_graph(
    graph: Graph,
    settings: RunSettings,
    *,
    resume: bool = False,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> RunResult:
    """Runs the graph into the folder `settings.output`; `progress` is called now and then with what is written.

    The files' bytes are a function of the graph and the settings without `concurrency`, whether or not the run was cut
    short and resumed. Raises ConfigError or StoreError before the first walk, and StoreError when a row cannot be
    written. What a node does never stops the run.
    """
    settings = check_settings(graph, settings)
    header = Header(graph.name, graph.version, settings.seed, settings.fields, settings.unique, settings.retries)
    started = perf_counter()
    with Store(settings.output, header, resume=resume) as store:
        before = store.tally.next_walk
        last_failure = asyncio.run(_run(graph, settings, store, progress))
        tally = store.tally
        progress(tally)
    return RunResult(
        folder=store.folder,
        accepted=tally.accepted,
        rejected=dict(tally.reasons),
        new_rows=tally.next_walk - before,
        seconds=perf_counter() - started,
        complete=tally.accepted >= settings.records,
        last_failure=last_failure,
    )


def preview(graph: Graph, settings: RunSettings, walks: int) -> list[Walk]:
    """The first walks of a run, nothing written."""
    check_settings(graph, settings)

    async def take() -> list[Walk]:
        return [await take_walk(graph, settings.seed, index, settings.retries) for index in range(walks)]

    return asyncio.run(take())


async def _run(graph: Graph, settings: RunSettings, store: Store, progress: Callable[[Tally], None]) -> Failure | None:
    """Keeps walks under way and commits them in order; the reason of the last row if that one failed."""
    tally, failure = store.tally, None
    gate = asyncio.Semaphore(settings.concurrency)

    async def take(index: int) -> Walk:
        async with gate:
            return await take_walk(graph, settings.seed, index, settings.retries)

    indices = count(tally.next_walk)
    # A slow walk holds back the rows behind it, not the work: walks up to four windows ahead go on.
    ahead: deque[asyncio.Task[Walk]] = deque()
    flushed = perf_counter()
    try:
        while tally.accepted < settings.records:
            if tally.next_walk - tally.last_accepted - 1 >= settings.max_rejected_in_a_row:
                return failure or Failure("rejected", "", "as the run before it left off")
            while len(ahead) < 4 * settings.concurrency:
                ahead.append(asyncio.create_task(take(next(indices))))
            if not ahead[0].done():
                store.flush()
            failure = _commit(graph, settings, store, await ahead.popleft())
            if perf_counter() - flushed > FLUSH_SECONDS:
                store.flush()
                progress(tally)
                flushed = perf_counter()
    finally:
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)
    return failure


def _commit(graph: Graph, settings: RunSettings, store: Store, walk: Walk) -> Failure | None:
    failure, key = walk.failure, ""
    if failure is None and settings.unique:
        values = [walk.record[name] for name in settings.unique]
        key = sha256(msgspec.json.encode(values)).hexdigest()[:16]
        first = store.tally.keys.get(key)
        if first is not None:
            failure = Failure("duplicate", "", f"{', '.join(settings.unique)} are those of walk {first}")
            key = ""
    provenance = Provenance(graph.name, graph.version, settings.seed, walk.index, walk.calls, key)
    fields: dict[str, Any] = walk.record if failure else {name: walk.record[name] for name in settings.fields}
    store.add(provenance, fields, failure)
    return failure


__all__ = ["RunResult", "RunSettings", "StoreError", "check_settings", "preview", "run_graph"]
