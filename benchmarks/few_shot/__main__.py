"""Few-shot sweep: ``python -m benchmarks.few_shot --config benchmarks/configs/NAME.yaml``."""

import sys
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from benchmarks.few_shot.cells import State, plan, state, task
from benchmarks.few_shot.check import check_classes
from benchmarks.few_shot.config import SweepConfig
from benchmarks.few_shot.executors import Executor, Limits, LocalExecutor
from benchmarks.few_shot.progress import Progress
from benchmarks.few_shot.sweep import run_sweep
from benchmarks.provenance import RESULTS


def parser() -> ArgumentParser:
    """Return the command's parser."""
    command = ArgumentParser(
        prog="python -m benchmarks.few_shot",
        description="Compare anomaly detectors on k reference images. Run it again to go on where it was stopped.",
    )
    command.add_argument("--config", type=Path, required=True, help="YAML file with the sweep.")
    command.add_argument("--root", type=str | None, help="Folder of the data, instead of the file's.")
    command.add_argument("--k", type=list[int] | None, help="Numbers of references, instead of the file's.")
    command.add_argument("--seeds", type=list[int] | None, help="Seeds, instead of the file's.")
    command.add_argument("--name", type=str | None, help="Name of the sweep, instead of the file's.")
    command.add_argument("--only", type=str, default="", help="Run only cells whose name contains this.")
    command.add_argument("--results", type=Path, default=RESULTS, help="Folder that holds a folder for each sweep.")
    command.add_argument("--executor", type=Literal["local", "ray"], default="local", help="Where cells run.")
    command.add_argument("--jobs", type=int, default=1, help="Cells at a time, for local processes.")
    command.add_argument("--timeout", type=float | None, default=3600.0, help="Seconds that a cell may take.")
    command.add_argument("--memory", type=float | None, default=None, help="Gigabytes that a cell may hold.")
    command.add_argument("--accelerator", type=str, default="auto", help="Lightning's name of the device kind.")
    command.add_argument("--list", action="store_true", help="Print the cells' names and stop.")
    return command


def make_executor(kind: str, jobs: int, limits: Limits) -> Executor:
    """Return the executor of that kind.

    Raises:
        ImportError: If Ray is asked for and not installed.
        ValueError: If ``jobs`` is below 1.
    """
    if kind == "local":
        return LocalExecutor(jobs, limits)
    from benchmarks.few_shot.ray_executor import RayExecutor

    return RayExecutor(limits)


def main(arguments: list[str] | None = None) -> int:
    """Run a sweep and return the exit code: 1 if a cell failed, 2 if nothing could be started."""
    options = parser().parse_args(arguments)
    try:
        changes = {name: options[name] for name in ("root", "k", "seeds", "name")}
        config = SweepConfig.load(options.config, **changes)
        cells = [cell for cell in plan(config) if options.only in cell.id]
        if options.list:
            print("\n".join(cell.id for cell in cells))
            return 0
        folder = options.results / config.name
        tasks = [task(config, cell, folder, options.accelerator) for cell in cells]
        limits = Limits(options.timeout, options.memory)
        if any(state(job) is not State.DONE for job in tasks):
            check_classes(config)
        executor = make_executor(options.executor, options.jobs, limits)
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    counts = run_sweep(tasks, executor, Progress(jobs=options.jobs))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
