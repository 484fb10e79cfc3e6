"""Shows how a sweep goes: a live table on a terminal, one line an event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from benchmarks.few_shot.executors import Outcome

STYLES = {"done": "green", "skipped": "yellow", "failed": "red"}
SHOWN = 8


class Progress:
    """Progress of a sweep.

    Args:
        console: Where to show it; None for standard output.
        jobs: How many cells run at a time, for the estimate of the time left.
    """

    def __init__(self, console: Console | None = None, jobs: int = 1) -> None:
        self.console = console or Console(file=sys.stdout, soft_wrap=True)
        self._jobs = max(1, jobs)
        self._running: dict[str, float] = {}
        self._ended: list[Outcome] = []
        self._total = 0
        self._live: Live | None = None

    def begin(self, total: int, done: int, notes: Sequence[str] = ()) -> None:
        """Say what there is to do.

        Args:
            total: Cells to run.
            done: Cells that have a result already.
            notes: Why others are run again.
        """
        self._total = total
        self.console.print(f"{total} cells to run, {done} have a result already.", highlight=False)
        for note in notes:
            self.console.print(f"  {note}", highlight=False)
        if self.console.is_terminal and total:
            self._live = Live(self._table(), console=self.console, refresh_per_second=2)
            self._live.start()

    def started(self, task: dict[str, Any]) -> None:
        """A cell has started."""
        self._running[_id(task)] = time.monotonic()

    def ended(self, outcome: Outcome) -> None:
        """A cell has ended."""
        self._running.pop(_id(outcome.task), None)
        self._ended.append(outcome)
        if self._live is None or outcome.kind != "done":
            self.console.print(self._line(outcome), highlight=False, markup=False)

    def tick(self) -> None:
        """Redraw the live table, if there is one."""
        if self._live is not None:
            self._live.update(self._table())

    def end(self, counts: dict[str, int]) -> None:
        """Say how the sweep ended."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        self.console.print(f"Sweep ended: {summary}.", highlight=False)

    def seconds_left(self) -> float | None:
        """Estimate from the mean time of the cells that ran, or None before the first has ended."""
        seconds = [outcome.seconds for outcome in self._ended if outcome.seconds > 0]
        left = self._total - len(self._ended)
        return None if not seconds else left * sum(seconds) / len(seconds) / self._jobs

    def _line(self, outcome: Outcome) -> str:
        text = f"[{len(self._ended)}/{self._total}] {outcome.kind} {_id(outcome.task)} in {outcome.seconds:.0f} s"
        if outcome.reason:
            text += f": {outcome.reason}"
        return f"{text} ({_duration(self.seconds_left())} left)"

    def _table(self) -> Group:
        counts = {kind: sum(outcome.kind == kind for outcome in self._ended) for kind in STYLES}
        head = ", ".join(f"[{style}]{counts[kind]} {kind}[/]" for kind, style in STYLES.items())
        table = Table(title=f"{len(self._ended)} of {self._total} cells: {head}", title_justify="left")
        for column in ("cell", "state", "time"):
            table.add_column(column)
        for outcome in self._ended[-SHOWN:]:
            style = STYLES[outcome.kind]
            table.add_row(_id(outcome.task), f"[{style}]{outcome.kind}[/]", _duration(outcome.seconds))
        now = time.monotonic()
        for cell, begin in self._running.items():
            table.add_row(cell, "running", _duration(now - begin))
        return Group(table, f"about {_duration(self.seconds_left())} left")


def _id(task: dict[str, Any]) -> str:
    cell = task["cell"]
    return f"{cell['dataset']}/{cell['category']}/{cell['model']}/k{cell['k']}_seed{cell['seed']}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown time"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
