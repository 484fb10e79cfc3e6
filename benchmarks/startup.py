"""What the start-up hook costs every Python interpreter of an environment that has this package.

Two empty virtual environments are compared; one has the start-up files and the modules that they load. Interpreters are
started in turn, so that a change in the machine's load meets both alike. Three figures are given, each with bytecode
files (as pip installs) and without (as where ``PYTHONDONTWRITEBYTECODE`` is set):

- ``site_cpu_ms``: what the interpreter does at its start to set up site-packages, as processor time measured inside
  it: the cost of the hook, little disturbed by whatever else runs on the machine;
- ``process_ms``: the whole interpreter from start to end, by the clock on the wall;
- ``importtime_self_us``: what ``-X importtime`` reports for each module loaded.

Run ``python -m benchmarks.startup`` from the project's folder; it takes about a minute.
"""

import argparse
import compileall
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from benchmarks.provenance import RESULTS, ROOT, provenance, write_json

MODULES = ("anomalib_vtfusion", "anomalib_vtfusion.plugin")
# With -S the interpreter leaves site.main() to us. It reads start-up files and looks for sitecustomize.
TIMED_START = "import site, time; t = time.process_time_ns(); site.main(); print(time.process_time_ns() - t)"
IMPORT_TIME = re.compile(r"import time:\s*(\d+) \|\s*\d+ \|\s*(\S+)")


def make_environment(folder: Path, *, hook: bool, bytecode: bool) -> Path:
    """Make a virtual environment with nothing in it, or with the hook only.

    Args:
        folder: Folder to make.
        hook: Whether the start-up files and the modules that they load are put in.
        bytecode: Whether the modules are compiled.

    Returns:
        The environment's interpreter.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    if hook:
        site_packages = next(folder.rglob("site-packages"))
        package = site_packages / "anomalib_vtfusion"
        package.mkdir()
        for name in ("__init__.py", "plugin.py", "registration.py"):
            shutil.copy(ROOT / "anomalib_vtfusion" / name, package)
        for file in (ROOT / "startup").iterdir():
            shutil.copy(file, site_packages)
        if bytecode:
            compileall.compile_dir(package, quiet=1)
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def start(python: Path, *options: str) -> tuple[float, float, str]:
    """Start an interpreter that sets up its site-packages and does nothing else.

    Returns:
        Milliseconds of the whole process, processor milliseconds of setting up site-packages, and its stderr.
    """
    # -I: nothing from the current folder or the environment's variables. -B: no bytecode for the next one to find.
    command = [str(python), "-I", "-S", "-B", *options, "-c", TIMED_START]
    clean = {name: value for name, value in os.environ.items() if name != "ANOMALIB_PLUGINS"}
    begin = time.perf_counter()
    result = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    return (time.perf_counter() - begin) * 1e3, int(result.stdout) / 1e6, result.stderr


def summarize(hook: list[float], nothing: list[float]) -> dict[str, float]:
    """Return medians, and the median of the differences between interpreters started one after the other."""
    differences = [a - b for a, b in zip(hook, nothing, strict=True)]
    low, cost, high = statistics.quantiles(differences, n=4)
    return {
        "with_hook": round(statistics.median(hook), 3),
        "without_hook": round(statistics.median(nothing), 3),
        "cost": round(cost, 3),
        "cost_quartile_1": round(low, 3),
        "cost_quartile_3": round(high, 3),
    }


def measure(repeats: int, *, bytecode: bool) -> dict[str, Any]:
    """Measure the hook ``repeats`` times."""
    process: dict[str, list[float]] = {"hook": [], "nothing": []}
    site: dict[str, list[float]] = {"hook": [], "nothing": []}
    self_times: dict[str, list[float]] = {module: [] for module in MODULES}
    with tempfile.TemporaryDirectory() as parent:
        pythons = {kind: make_environment(Path(parent, kind), hook=kind == "hook", bytecode=bytecode) for kind in site}
        for python in pythons.values():
            start(python)  # brings the files into the page cache
        for _ in range(repeats):
            for kind, python in pythons.items():
                process_ms, site_cpu_ms, _ = start(python)
                process[kind].append(process_ms)
                site[kind].append(site_cpu_ms)
        for _ in range(max(repeats // 4, 1)):
            report = {name: int(us) for us, name in IMPORT_TIME.findall(start(pythons["hook"], "-X", "importtime")[2])}
            for module in MODULES:
                self_times[module].append(report[module])
    return {
        "site_cpu_ms": summarize(site["hook"], site["nothing"]),
        "process_ms": summarize(process["hook"], process["nothing"]),
        "importtime_self_us": {module: statistics.median(times) for module, times in self_times.items()},
    }


def main() -> None:
    """Measure, print and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200, help="interpreter starts of each kind (default: 200)")
    parser.add_argument("--output", type=Path, default=RESULTS / "startup.json", help="result file")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error(f"--repeats is {arguments.repeats}, but quartiles need at least 2")
    payload = {
        "benchmark": "startup",
        "provenance": provenance(),
        "settings": {"repeats": arguments.repeats},
        "with_bytecode": measure(arguments.repeats, bytecode=True),
        "without_bytecode": measure(arguments.repeats, bytecode=False),
    }
    for kind in ("with_bytecode", "without_bytecode"):
        print(kind, payload[kind])
    print("wrote", write_json(arguments.output, payload).name)


if __name__ == "__main__":
    main()
