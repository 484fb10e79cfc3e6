"""Cells on a Ray cluster: each still in a process of its own, placed by the cores and cards that its model declares.

Nodes need this project and the data at the same paths; results come back through Ray, so no shared folder is needed.
"""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from benchmarks.few_shot.executors import RUN_CELL, CellProcess, Limits, Outcome, read_reason, write_reason
from benchmarks.few_shot.files import write_bytes
from benchmarks.provenance import ROOT

WAIT = 0.5


def run_remotely(task: dict[str, Any], limits: Limits, command: Sequence[str]) -> dict[str, Any]:
    """Run a cell on a node and return how it ended and the files that it wrote.

    Args:
        task: What to run.
        limits: What it may use.
        command: Program that runs a task.

    Returns:
        ``kind`` and ``seconds`` of the outcome, and ``files``: base64 of each file by its name in the task.
    """
    with tempfile.TemporaryDirectory(prefix="few_shot_ray_") as folder:
        local = {name: str(Path(folder) / Path(path).name) for name, path in task["files"].items()}
        views = str(Path(folder) / "views.npz")
        process = CellProcess({**task, "files": local, "views": views}, limits, command)
        try:
            while (outcome := process.poll()) is None:
                time.sleep(0.2)
        finally:
            process.kill()
        written = {name: Path(path) for name, path in {**local, "views": views}.items() if Path(path).exists()}
        content = {name: base64.b64encode(path.read_bytes()).decode() for name, path in written.items()}
    return {"kind": outcome.kind, "seconds": outcome.seconds, "files": content}


class RayExecutor:
    """Cells on the Ray cluster that this process is connected to, or on a local one.

    Args:
        limits: What a cell may use.
        command: Program that runs a task.
        address: Address of the cluster; None takes ``RAY_ADDRESS`` or starts Ray on this machine.
    """

    def __init__(self, limits: Limits, command: Sequence[str] = RUN_CELL, address: str | None = None) -> None:
        self._limits, self._command = limits, tuple(command)
        self._owner = not ray.is_initialized()
        if self._owner:
            environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
            ray.init(address=address, runtime_env=environment, include_dashboard=False, log_to_driver=False)
        resources = ray.cluster_resources()
        # As many waiting cells as there are cores keep every node busy; Ray places them.
        self._most = max(1, int(2 * resources.get("CPU", 1)))
        self._running: dict[Any, dict[str, Any]] = {}

    def has_room(self) -> bool:
        """Whether another cell can be handed to Ray."""
        return len(self._running) < self._most

    def start(self, task: dict[str, Any]) -> None:
        """Hand a cell to Ray, with the cores and the share of a card that its model declares."""
        for name in ("error", "skipped"):
            Path(task["files"][name]).unlink(missing_ok=True)
        remote = ray.remote(num_cpus=task["model"]["cpus"], num_gpus=task["model"]["gpus"], max_retries=0)(run_remotely)
        self._running[remote.remote(task, self._limits, self._command)] = task

    def finished(self) -> list[Outcome]:
        """Cells that ended since the last call; waits a little when there are none."""
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=WAIT)
        return [self._collect(reference) for reference in ready]

    def stop(self) -> None:
        """End whatever still runs, and Ray if it was started here."""
        for reference in self._running:
            ray.cancel(reference, force=True)
        self._running = {}
        if self._owner:
            ray.shutdown()

    def _collect(self, reference: Any) -> Outcome:
        task = self._running.pop(reference)
        files = {**task["files"], "views": task["views"]}
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as error:
            write_reason(Path(files["error"]), task, f"Ray lost the cell: {error}")
            return Outcome(task, "failed", 0.0, read_reason(Path(files["error"])))
        # The result last: where it is, the cell counts as finished.
        for name in sorted(answer["files"], key=lambda name: name == "result"):
            write_bytes(Path(files[name]), base64.b64decode(answer["files"][name]))
        kind = answer["kind"]
        reason = "" if kind == "done" else read_reason(Path(files["skipped" if kind == "skipped" else "error"]))
        return Outcome(task, kind, answer["seconds"], reason)
