"""The command line of a sweep, and the end of a cell whose sweep has ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.few_shot import __main__ as command
from benchmarks.few_shot.executors import child_environment
from benchmarks.provenance import ROOT

DEMO = str(ROOT / "benchmarks" / "configs" / "demo.yaml")


def test_list_names_the_cells_and_runs_nothing(tmp_path: Path, capsys) -> None:
    arguments = ["--config", DEMO, "--results", str(tmp_path), "--k", "[2]", "--only", "tile/PaDiM", "--list"]
    assert command.main(arguments) == 0
    assert capsys.readouterr().out.split() == ["DemoParts/tile/PaDiM/k2_seed0"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", DEMO, "--k", "[0]"], "k must be at least 1"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", str(ROOT / "benchmarks/configs/factory.yaml")], "Give its folder with --root"),
        (["--config", DEMO, "--timeout", "0"], "must be positive"),
    ],
)
def test_wrong_arguments_end_before_anything_is_started(arguments: list[str], message: str, tmp_path, capsys) -> None:
    assert command.main([*arguments, "--results", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_classes_are_checked_before_anything_is_started(tmp_path: Path, capsys, monkeypatch) -> None:
    def refuse(config) -> None:
        raise ValueError("Model A: wrong")

    monkeypatch.setattr(command, "check_classes", refuse)
    assert command.main(["--config", DEMO, "--results", str(tmp_path)]) == 2
    assert "Model A: wrong" in capsys.readouterr().err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux ends a process with its parent")
def test_a_cell_ends_with_its_sweep(tmp_path: Path) -> None:
    cell = (
        "import os, pathlib, time; from benchmarks.few_shot.run_cell import die_with; die_with(os.getppid()); "
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    sweep = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {cell!r}], start_new_session=True)"
    parent = subprocess.Popen([sys.executable, "-c", sweep], env=child_environment())
    limit = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < limit:
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while alive(child) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
