"""Where cells run: each in a process of its own, with a time limit, so that none can harm another.

On this machine the processes are forked off a server that has imported all libraries once, for importing them takes
longer than many a cell. The server has a single thread and has computed nothing, so that a fork of it is like a fresh
interpreter. Cells end with the sweep, and the server with the last of them.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from benchmarks.provenance import ROOT, write_json

RUN_CELL = (sys.executable, "-m", "benchmarks.few_shot.run_cell")
# What the server imports before it forks. Names that are missing are left to the cell, which says what it lacks.
PRELOAD = (
    "benchmarks.few_shot.__main__",
    "benchmarks.few_shot.collector",
    "benchmarks.few_shot.encoder_baselines",
    "benchmarks.few_shot.measure",
    "benchmarks.few_shot.pictures",
    "benchmarks.few_shot.run_cell",
    "benchmarks.few_shot.scores",
    "benchmarks.few_shot.window_clip",
    "anomalib.callbacks.checkpoint",
    "anomalib.engine",
    "anomalib_vtfusion.lightning_model",
)
SKIPPED_EXIT = 3
TAIL = 4000


@dataclass(frozen=True)
class Limits:
    """What a cell may use.

    Attributes:
        seconds: Time from the start of its process, or None.
        gigabytes: Resident memory of its process, or None.
    """

    seconds: float | None = None
    gigabytes: float | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a limit is not positive, or memory cannot be watched on this system.
        """
        if any(limit is not None and limit <= 0 for limit in (self.seconds, self.gigabytes)):
            raise ValueError(f"Limits must be positive, got {self.seconds} s and {self.gigabytes} GB.")
        if self.gigabytes is not None and not Path("/proc/self/statm").exists():
            raise ValueError("Memory of a cell can be limited on Linux only.")


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: ``kind`` is done, skipped or failed; ``reason`` is empty when done."""

    task: dict[str, Any]
    kind: str
    seconds: float
    reason: str = ""


class Executor(Protocol):
    """Starts cells and tells how they ended."""

    def has_room(self) -> bool:
        """Whether another cell can be started now."""

    def start(self, task: dict[str, Any]) -> None:
        """Start a cell."""

    def finished(self) -> list[Outcome]:
        """Cells that ended since the last call; waits a little when there are none."""

    def stop(self) -> None:
        """End whatever still runs."""


class CellProcess:
    """One cell in a process group of its own.

    Args:
        task: What to run.
        limits: What it may use.
        command: Program that reads a task as JSON from standard input; None forks :func:`run_forked` off the server.
        threads: Threads of numerical libraries, or None to leave them alone. The server keeps its first value.
    """

    def __init__(
        self,
        task: dict[str, Any],
        limits: Limits,
        command: Sequence[str] | None = RUN_CELL,
        threads: int | None = None,
    ) -> None:
        self.task = task
        self._limits = limits
        for name in ("error", "skipped"):
            Path(task["files"][name]).unlink(missing_ok=True)
        self._log: IO[bytes] = tempfile.NamedTemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._begin = time.monotonic()
        environment = child_environment()
        if threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        self._process = self._fork(environment) if command is None else self._spawn(command, environment)

    def _fork(self, environment: dict[str, str]) -> Any:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        process = context.Process(target=run_forked, args=(self.task, self._log.name))
        # The first start starts the server, which takes over the environment.
        # A look for graphics cards through the driver would keep forks of the server from using them.
        with _environment({**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}):
            process.start()
        return process

    def _spawn(self, command: Sequence[str], environment: dict[str, str]) -> Any:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        # It may end before reading; its exit code tells.
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # type: ignore[union-attr]
            stdin.write(json.dumps({**self.task, "parent": os.getpid()}).encode())
        return process

    def poll(self) -> Outcome | None:
        """How the cell ended, or None while it runs; ends it when it has used more than it may."""
        code = self._exit_code()
        seconds = time.monotonic() - self._begin
        reason = self._over_limit(seconds) if code is None else None
        if code is None and reason is None:
            return None
        self.kill()
        return self._outcome(code, seconds, reason)

    def kill(self) -> None:
        """End the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # a fork may not have its group yet
        if isinstance(self._process, subprocess.Popen):
            self._process.wait()
        else:
            self._process.join()

    def _exit_code(self) -> int | None:
        return self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode

    def _over_limit(self, seconds: float) -> str | None:
        limits = self._limits
        if limits.seconds is not None and seconds > limits.seconds:
            return f"It ran longer than the time limit of {limits.seconds:g} s."
        if limits.gigabytes is not None and _resident_gigabytes(self._process.pid) > limits.gigabytes:
            return f"It used more memory than the limit of {limits.gigabytes:g} GB."
        return None

    def _outcome(self, code: int | None, seconds: float, reason: str | None) -> Outcome:
        files = {name: Path(path) for name, path in self.task["files"].items()}
        if reason is None and code == 0 and files["result"].exists():
            return Outcome(self.task, "done", seconds)
        if reason is None and code == SKIPPED_EXIT and files["skipped"].exists():
            return Outcome(self.task, "skipped", seconds, read_reason(files["skipped"]))
        if reason is not None or not files["error"].exists():
            write_reason(files["error"], self.task, reason or _describe(code), log=self._tail())
        return Outcome(self.task, "failed", seconds, read_reason(files["error"]))

    def _tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - TAIL))
        return self._log.read().decode(errors="replace")


class LocalExecutor:
    """Cells on this machine.

    Args:
        jobs: Most cells at a time.
        limits: What a cell may use.
        command: Program that runs a task; None forks cells off a server that has imported what they need.
        interval: Seconds between two looks at the running cells.
    """

    def __init__(self, jobs: int, limits: Limits, command: Sequence[str] | None = None, interval: float = 0.2) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}.")
        self._jobs, self._limits, self._command, self._interval = jobs, limits, command, interval
        # Numerical libraries take every core for themselves unless told otherwise.
        self._threads = max(1, (os.cpu_count() or 1) // jobs)
        self._running: list[CellProcess] = []

    def has_room(self) -> bool:
        """Whether another cell can be started now."""
        return len(self._running) < self._jobs

    def start(self, task: dict[str, Any]) -> None:
        """Start a cell."""
        self._running.append(CellProcess(task, self._limits, self._command, self._threads))

    def finished(self) -> list[Outcome]:
        """Cells that ended since the last call; waits a little when there are none."""
        outcomes = {process: process.poll() for process in self._running}
        self._running = [process for process, outcome in outcomes.items() if outcome is None]
        ended = [outcome for outcome in outcomes.values() if outcome is not None]
        if not ended:
            time.sleep(self._interval)
        return ended

    def stop(self) -> None:
        """End whatever still runs."""
        for process in self._running:
            process.kill()
        self._running = []


def run_forked(task: dict[str, Any], log: str) -> None:
    """Run a task in a process that was forked off the server: a session of its own, its output in the file ``log``."""
    os.setsid()
    with open(log, "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor is wanted
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from benchmarks.few_shot.run_cell import die_with, run_task

    die_with(os.getppid())
    # The server outlives a sweep that was killed for as long as it has children, so each looks after itself.
    threading.Thread(target=_end_with_sweep, daemon=True).start()
    sys.exit(run_task(task))


def _end_with_sweep() -> None:
    sweep = multiprocessing.parent_process()
    if sweep is not None:
        sweep.join()
        os.killpg(0, signal.SIGKILL)


@contextlib.contextmanager
def _environment(changed: dict[str, str]) -> Iterator[None]:
    """Environment variables for what is started inside."""
    before = dict(os.environ)
    os.environ.update(changed)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def child_environment() -> dict[str, str]:
    """Environment of a process that imports this project, wherever it is started."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def write_reason(path: Path, task: dict[str, Any], reason: str, **details: str) -> None:
    """Write why a cell has no result."""
    write_json(path, {"cell": task["cell"], "reason": reason, **details})


def read_reason(path: Path) -> str:
    """First line of why a cell has no result."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["reason"]).strip().partition("\n")[0]
    except (OSError, ValueError, KeyError):
        return "unknown"


def _describe(code: int | None) -> str:
    if code == 0:
        return "Its process ended without a result."
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " Out of memory, most likely." if name == "SIGKILL" else ""
        return f"Its process was ended by {name}.{hint}"
    return f"Its process ended with exit code {code}."


def _resident_gigabytes(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
