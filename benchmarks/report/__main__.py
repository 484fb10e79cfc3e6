"""Report of a sweep: ``python -m benchmarks.report benchmarks/results/NAME``."""

import argparse
import sys
from pathlib import Path

from benchmarks.report.page import write_report
from benchmarks.report.results import load


def main(arguments: list[str] | None = None) -> int:
    """Write a report and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, help="Folder of the sweep, which holds the folder cells.")
    parser.add_argument("--output", type=Path, help="Folder for the report; RESULTS/report if not given.")
    options = parser.parse_args(arguments)
    try:
        sweep = load(options.results)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    for path in write_report(sweep, options.output or options.results / "report"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
