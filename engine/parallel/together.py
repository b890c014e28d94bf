"""Errors that all ranks raise alike: a rank that went on alone would wait for the others for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import EngineError, ParallelError
from engine.parallel.collectives import Group, all_gather_object


@contextmanager
def together(group: Group) -> Iterator[None]:
    """`with together(group):` a block that every rank runs; what fails on one rank is raised on all of them.

    The ranks wait for one another at its end. All raise the error of the lowest rank that had one, naming the rank
    unless all had the same; an error that is none of ours is a ParallelError on the ranks that did not meet it.
    Collectives within the block must not be left out by a rank that fails: a ParallelError of theirs is raised as it
    is, without asking the others.
    """
    if group.size == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except ParallelError:
        raise
    except Exception as error:
        failure = error
    reports = all_gather_object(None if failure is None else _report(failure), group)
    failed = [place for place, report in enumerate(reports) if report is not None]
    if not failed:
        return
    if failure is not None and not isinstance(failure, EngineError):
        raise failure
    kind, text = reports[failed[0]] or (ParallelError, "")
    if any(report != reports[0] for report in reports):
        text = f"on rank {group.ranks[failed[0]]}: {text}"
    raise kind(text) from failure


def _report(failure: Exception) -> tuple[type[EngineError], str]:
    if isinstance(failure, EngineError):
        return type(failure), str(failure)
    return ParallelError, f"{type(failure).__name__}: {failure}"
