"""The benchmark of the start-up hook measures what it says it measures."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import startup


@pytest.mark.parametrize(("hook", "bytecode"), [(False, True), (True, False), (True, True)])
def test_environment_has_what_is_asked_for(tmp_path: Path, hook: bool, bytecode: bool) -> None:
    python = startup.make_environment(tmp_path, hook=hook, bytecode=bytecode)
    process_ms, site_cpu_ms, report = startup.start(python, "-X", "importtime", "-v")
    loaded = {name for _, name in startup.IMPORT_TIME.findall(report)}
    assert loaded.issuperset(startup.MODULES) is hook
    assert process_ms > site_cpu_ms > 0
    read = [line for line in report.splitlines() if line.startswith("# code object from") and "vtfusion" in line]
    assert len(read) == len(startup.MODULES) * hook
    assert all(str(tmp_path) in line and (".pyc" in line) is bytecode for line in read)


def test_summary_is_of_paired_differences() -> None:
    summary = startup.summarize([3.0, 13.0, 23.0], [2.0, 11.0, 20.0])
    assert summary["with_hook"] == 13.0
    assert summary["without_hook"] == 11.0
    assert summary["cost"] == 2.0


def test_command_writes_a_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "startup.json"
    monkeypatch.setattr(sys, "argv", ["startup", "--repeats", "2", "--output", str(output)])
    startup.main()
    result = json.loads(output.read_text())
    assert result["settings"] == {"repeats": 2}
    assert result["with_bytecode"]["importtime_self_us"].keys() == set(startup.MODULES)
    assert result["provenance"]["versions"]
