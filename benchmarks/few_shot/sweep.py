"""Runs the cells of a sweep that have no result yet, whatever happens to any of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.few_shot.cells import State, state
from benchmarks.few_shot.executors import Executor, Outcome, write_reason
from benchmarks.few_shot.progress import Progress

WHY_AGAIN = {
    State.FAILED: "failed before: tried again",
    State.SKIPPED: "skipped before: tried again",
    State.CHANGED: "have a result of another configuration: run anew",
}


def run_sweep(tasks: Iterable[dict[str, Any]], executor: Executor, progress: Progress) -> dict[str, int]:
    """Run what has no result yet.

    A model whose weights cannot be had is tried once; its other cells are then skipped for the same reason.

    Args:
        tasks: Tasks of all cells.
        executor: Where they run.
        progress: Told about everything that happens.

    Returns:
        How many cells are done (now or before), skipped and failed.
    """
    waiting: deque[dict[str, Any]] = deque()
    states: dict[State, int] = dict.fromkeys(State, 0)
    for task in tasks:
        found = state(task)
        states[found] += 1
        if found is not State.DONE:
            waiting.append(task)
    progress.begin(
        len(waiting), states[State.DONE], [f"{states[s]} {why}" for s, why in WHY_AGAIN.items() if states[s]]
    )
    counts = {"done": states[State.DONE], "skipped": 0, "failed": 0}
    unavailable: dict[str, str] = {}
    running = 0

    def ended(outcome: Outcome) -> None:
        counts[outcome.kind] += 1
        progress.ended(outcome)

    try:
        while waiting or running:
            while waiting and executor.has_room():
                task = waiting.popleft()
                reason = unavailable.get(task["cell"]["model"])
                if reason is not None:
                    Path(task["files"]["error"]).unlink(missing_ok=True)
                    write_reason(Path(task["files"]["skipped"]), task, reason)
                    ended(Outcome(task, "skipped", 0.0, reason))
                    continue
                executor.start(task)
                running += 1
                progress.started(task)
            for outcome in executor.finished() if running else []:
                running -= 1
                if outcome.kind == "skipped":
                    unavailable[outcome.task["cell"]["model"]] = outcome.reason
                ended(outcome)
            progress.tick()
    finally:
        executor.stop()
        progress.end(counts)
    return counts
