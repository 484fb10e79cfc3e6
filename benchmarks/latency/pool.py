"""Worker processes, and measurements in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from benchmarks.latency.worker import Variant, start_line
from benchmarks.provenance import ROOT

Samples = dict[str, list[dict[str, float]]]


class Asked(Protocol):
    """What answers requests about one variant."""

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request."""


class WorkerProcess:
    """A variant in a process of its own, which sleeps between requests.

    Args:
        variant: What to load.
        images: File of images ``(N, 3, H, W)``.

    Raises:
        RuntimeError: If the process ends before it is ready, or later instead of answering.
    """

    def __init__(self, variant: Variant, images: Path) -> None:
        self.name = variant.name
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - as long as the process
        threads = str(variant.threads)
        # Threads that wait for work by spinning would take time from the next variant.
        quiet = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
        quiet["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, and none left behind
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.latency.worker"],
            cwd=ROOT,
            env=os.environ | quiet,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._input: IO[str] = self._process.stdin  # type: ignore[assignment]
        self._output: IO[str] = self._process.stdout  # type: ignore[assignment]
        self._send(start_line(variant, images))

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request; see :meth:`benchmarks.latency.worker.Worker.ask`."""
        return self._send(json.dumps(request) + "\n")

    def stop(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self._input.close()
        self._process.wait()
        self._output.close()
        self._errors.close()

    def _send(self, line: str) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # the missing answer will say so
            self._input.write(line)
            self._input.flush()
        answer = self._output.readline()
        if not answer:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"The process of {self.name} ended with {code}:\n{self._errors.read()[-3000:]}")
        return json.loads(answer)


def measure(workers: Mapping[str, Asked], batches: Sequence[int], rounds: int, repeats: int) -> dict[int, Samples]:
    """Time all variants in turn.

    Args:
        workers: By name.
        batches: Batch sizes.
        rounds: How often each variant is timed at each batch size, after one time that does not count.
        repeats: Batches a time, of which the fastest counts.

    Returns:
        For each batch size and variant, milliseconds an image of each round, on the clock and on the processor.
    """
    samples: dict[int, Samples] = {batch: {name: [] for name in workers} for batch in batches}
    for batch in batches:
        for worker in workers.values():
            worker.ask({"do": "time", "batch": batch})
        for number in range(rounds):
            # Every other round backwards: no variant always comes after the same one.
            for name in list(workers)[:: 1 if number % 2 == 0 else -1]:
                samples[batch][name].append(workers[name].ask({"do": "time", "batch": batch, "repeats": repeats}))
    return samples
