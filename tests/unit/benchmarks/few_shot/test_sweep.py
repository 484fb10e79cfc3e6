"""A sweep survives cells that raise, hang, vanish or eat memory, and goes on where it was stopped."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.few_shot.cells import CellFiles, plan, task
from benchmarks.few_shot.config import DatasetEntry, ModelEntry, SweepConfig
from benchmarks.few_shot.executors import Limits, LocalExecutor
from benchmarks.few_shot.progress import Progress
from benchmarks.few_shot.sweep import run_sweep
from benchmarks.provenance import ROOT

# A cell without libraries: what it does is its model's class path.
FAKE_CELL = """
import json, os, pathlib, signal, subprocess, sys, time
task = json.load(sys.stdin)
files, kind = task["files"], task["model"]["class_path"]
folder = pathlib.Path(files["result"]).parent
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts.txt", "a") as log:
    log.write("x")
if kind == "raise":
    raise RuntimeError("no such luck")
if kind == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "child.txt").write_text(str(child.pid))
    time.sleep(60)
if kind == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "eat":
    eaten = bytearray(400_000_000)
    time.sleep(60)
if kind == "silent":
    sys.exit(0)
if kind == "skip":
    pathlib.Path(files["skipped"]).write_text(json.dumps({"cell": task["cell"], "reason": "no weights"}))
    sys.exit(3)
time.sleep(float(task["model"]["init_args"].get("seconds", 0)))
content = {"fingerprint": task["fingerprint"], "value": task["cell"]["k"] * 10 + task["cell"]["seed"]}
temporary = pathlib.Path(files["result"] + ".tmp")
temporary.write_text(json.dumps(content))
temporary.replace(files["result"])
"""
COMMAND = (sys.executable, "-S", "-c", FAKE_CELL)


def config(kinds: dict[str, str], **changes) -> SweepConfig:
    models = {name: ModelEntry(kind) for name, kind in kinds.items()}
    datasets = {"d": DatasetEntry("Folder", ["c"])}
    return SweepConfig(**{"name": "s", "models": models, "datasets": datasets, "k": [1], "seeds": [0], **changes})


def sweep(settings: SweepConfig, folder: Path, jobs: int = 2, **limits: float) -> tuple[dict[str, int], str]:
    tasks = [task(settings, cell, folder) for cell in plan(settings)]
    said = io.StringIO()
    executor = LocalExecutor(jobs, Limits(**limits), COMMAND, interval=0.02)
    counts = run_sweep(tasks, executor, Progress(Console(file=said, width=300), jobs))
    return counts, said.getvalue()


def files_of(settings: SweepConfig, folder: Path) -> dict[str, CellFiles]:
    return {cell.model: CellFiles.of(cell, folder) for cell in plan(settings)}


def starts(files: CellFiles) -> int:
    return len((files.result.parent / "starts.txt").read_text())


def reason(path: Path) -> str:
    return json.loads(path.read_text())["reason"]


@pytest.fixture(scope="module")
def troubled(tmp_path_factory) -> tuple[SweepConfig, Path, dict[str, int], str]:
    kinds = {kind: kind for kind in ("raise", "hang", "killed", "eat", "silent", "skip")}
    settings, folder = config({**kinds, "good": "good"}), tmp_path_factory.mktemp("troubled")
    return settings, folder, *sweep(settings, folder, jobs=4, seconds=3, gigabytes=0.2)


def test_troubled_cells_leave_the_others_alone(troubled) -> None:
    settings, folder, counts, said = troubled
    assert counts == {"done": 1, "skipped": 1, "failed": 5}
    files = files_of(settings, folder)
    assert files["good"].result.exists()
    assert not any(files[name].result.exists() for name in files if name != "good")
    assert "done d/c/good/k1_seed0" in said


def test_each_error_is_in_its_own_file_and_says_what_happened(troubled) -> None:
    files = files_of(troubled[0], troubled[1])
    assert reason(files["raise"].error) == "Its process ended with exit code 1."
    assert "RuntimeError: no such luck" in json.loads(files["raise"].error.read_text())["log"]
    assert reason(files["hang"].error) == "It ran longer than the time limit of 3 s."
    assert "ended by SIGKILL" in reason(files["killed"].error)
    assert reason(files["eat"].error) == "It used more memory than the limit of 0.2 GB."
    assert reason(files["silent"].error) == "Its process ended without a result."
    assert reason(files["skip"].skipped) == "no weights"


def test_what_a_hanging_cell_started_is_ended_too(troubled) -> None:
    child = int((files_of(troubled[0], troubled[1])["hang"].result.parent / "child.txt").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_second_run_skips_finished_cells_and_retries_failed_ones_and_says_so(tmp_path: Path) -> None:
    settings = config({"good": "good", "bad": "raise"})
    sweep(settings, tmp_path)
    counts, said = sweep(settings, tmp_path)
    files = files_of(settings, tmp_path)
    assert (starts(files["good"]), starts(files["bad"])) == (1, 2)
    assert counts == {"done": 1, "skipped": 0, "failed": 1}
    assert "1 cells to run, 1 have a result already." in said
    assert "1 failed before: tried again" in said


def test_a_retried_cell_that_works_leaves_no_error_behind(tmp_path: Path) -> None:
    settings = config({"m": "raise"})
    sweep(settings, tmp_path)
    files = files_of(settings, tmp_path)["m"]
    assert files.error.exists()
    settings.models["m"].class_path = "good"
    assert sweep(settings, tmp_path)[0]["done"] == 1
    assert (files.result.exists(), files.error.exists()) == (True, False)


def test_a_model_without_weights_is_tried_once(tmp_path: Path) -> None:
    settings = config({"m": "skip"}, seeds=[0, 1, 2])
    counts, _ = sweep(settings, tmp_path, jobs=1)
    assert counts == {"done": 0, "skipped": 3, "failed": 0}
    assert starts(files_of(settings, tmp_path)["m"]) == 1
    assert {reason(CellFiles.of(cell, tmp_path).skipped) for cell in plan(settings)} == {"no weights"}


def test_sweep_killed_twice_and_resumed_equals_an_undisturbed_one(tmp_path: Path) -> None:
    models = {"m": ModelEntry("good", {"seconds": 0.15})}
    settings = config({}, models=models, k=[1, 2, 3, 4], seeds=[0, 1])
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    sweep(settings, undisturbed)
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); "
        "import importlib.util as u; spec = u.spec_from_file_location('helper', sys.argv[1]); "
        "m = u.module_from_spec(spec); spec.loader.exec_module(m); "
        "s = m.config({}, models={'m': m.ModelEntry('good', {'seconds': 0.15})}, k=[1, 2, 3, 4], seeds=[0, 1]); "
        "m.sweep(s, Path(sys.argv[3]), jobs=1)"
    )
    for finished in (1, 3):
        process = subprocess.Popen([sys.executable, "-c", script, __file__, str(ROOT), str(disturbed)])
        limit = time.monotonic() + 60
        while len(results(disturbed)) < finished and time.monotonic() < limit:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = results(disturbed)
    assert 3 <= len(before) < 8
    sweep(settings, disturbed)
    assert results(disturbed) == results(undisturbed)
    assert len(results(disturbed)) == 8


def results(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("k*_seed?.json")}


def test_limits_must_make_sense() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="jobs must be at least 1"):
        LocalExecutor(0, Limits())


def test_terminal_shows_a_live_table(tmp_path: Path) -> None:
    settings = config({"good": "good", "bad": "raise"})
    screen = io.StringIO()
    progress = Progress(Console(file=screen, force_terminal=True, width=120), jobs=1)
    tasks = [task(settings, cell, tmp_path) for cell in plan(settings)]
    run_sweep(tasks, LocalExecutor(1, Limits(), COMMAND, interval=0.02), progress)
    text = screen.getvalue()
    assert "2 of 2 cells" in text
    assert "d/c/good/k1_seed0" in text


def test_cells_on_a_local_ray_instance(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from benchmarks.few_shot.ray_executor import RayExecutor

    settings = config({"good": "good", "raise": "raise", "hang": "hang", "skip": "skip"}, seeds=[1])
    settings.models["good"].cpus = 0.5
    tasks = [task(settings, cell, tmp_path) for cell in plan(settings)]
    executor = RayExecutor(Limits(seconds=2), COMMAND)
    counts = run_sweep(tasks, executor, Progress(Console(file=io.StringIO(), width=200)))
    assert counts == {"done": 1, "skipped": 1, "failed": 2}
    files = {cell.id: CellFiles.of(cell, tmp_path) for cell in plan(settings)}
    assert json.loads(files["d/c/good/k1_seed1"].result.read_text())["value"] == 11
    assert "time limit" in reason(files["d/c/hang/k1_seed1"].error)
    assert "exit code 1" in reason(files["d/c/raise/k1_seed1"].error)
