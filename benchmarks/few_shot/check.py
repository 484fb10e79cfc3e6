"""Checks the classes and arguments of a sweep before its first cell, in a process of its own.

Importing every model takes seconds and hundreds of megabytes, which the sweep itself can do without.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.few_shot.config import SweepConfig
from benchmarks.few_shot.executors import child_environment


def check_classes(config: SweepConfig) -> None:
    """Check the classes and arguments of a sweep.

    Raises:
        ValueError: If one is wrong; the message names all that are, or what kept them from being checked.
    """
    entries = {
        "models": {name: asdict(entry) for name, entry in config.models.items()},
        "datasets": {name: asdict(entry) for name, entry in config.datasets.items()},
    }
    command = [sys.executable, "-m", "benchmarks.few_shot.check"]
    done = subprocess.run(
        command, input=json.dumps(entries), capture_output=True, text=True, check=False, env=child_environment()
    )
    if done.returncode:
        raise ValueError(f"The classes of the sweep cannot be checked:\n{done.stderr}")
    if problems := json.loads(done.stdout.splitlines()[-1]):
        raise ValueError("\n".join(["The sweep cannot run:", *(f"- {problem}" for problem in problems)]))


def check(entries: dict[str, dict[str, Any]]) -> list[str]:
    """Problems of ``entries["models"]`` and ``entries["datasets"]``, one sentence each."""
    from benchmarks.few_shot.models import find_data, model_arguments

    problems = []
    for name, entry in entries["models"].items():
        try:
            model_arguments(entry, {"k": 1, "seed": 0}, "object")
        except ValueError as error:
            problems.append(f"Model {name}: {error}")
    for name, entry in entries["datasets"].items():
        try:
            taken = inspect.signature(find_data(entry["class_path"])).parameters
        except ValueError as error:
            problems.append(f"Data set {name}: {error}")
            continue
        unknown = sorted(set(entry["init_args"]) - set(taken))
        if unknown:
            problems.append(f"Data set {name}: {entry['class_path']} does not take {', '.join(unknown)}.")
    return problems


if __name__ == "__main__":
    print(json.dumps(check(json.load(sys.stdin))))
