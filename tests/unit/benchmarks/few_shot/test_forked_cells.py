"""Cells that are forked off a server give the numbers of any other process, and are as easily ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.few_shot.cells import plan, task
from benchmarks.few_shot.config import DatasetEntry, ModelEntry, SweepConfig
from benchmarks.few_shot.executors import PRELOAD, Limits, LocalExecutor, Outcome, child_environment
from benchmarks.few_shot.run_cell import run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="watches processes in /proc")
DATA = {"train_batch_size": 2, "eval_batch_size": 3, "num_workers": 0, "val_split_mode": "none"}
# Stands for a model that hangs while it is built.
SLEEPING = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
print("said before the end", flush=True)
here = pathlib.Path(__file__).with_name("pids")
here.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
here.with_suffix(".new").rename(here)
time.sleep(600)
"""


def make_task(parts: Path, folder: Path, class_path: str, **arguments) -> dict:
    datasets = {"parts": DatasetEntry("MVTecAD", ["woven"], {**DATA, "root": str(parts)})}
    config = SweepConfig("forked", {"m": ModelEntry(class_path, arguments)}, datasets, [1], [3])
    return task(config, next(plan(config)), folder, accelerator="cpu")


def outcome_of(job: dict, **limits: float) -> Outcome:
    executor = LocalExecutor(1, Limits(**limits), interval=0.05)
    executor.start(job)
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if ended := executor.finished():
            return ended[0]
    executor.stop()
    raise AssertionError("The cell did not end.")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> bool:
    end = time.monotonic() + 300
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(
    ("class_path", "arguments"),
    [
        ("benchmarks.few_shot.encoder_baselines.EncoderPadim", {}),
        ("anomalib_vtfusion.VTFusion", {"num_steps": 2}),
    ],
)
def test_a_forked_cell_gives_the_numbers_of_a_process_of_its_own(
    class_path: str, arguments: dict, parts, cnn_encoder, tmp_path: Path
) -> None:
    job = make_task(parts, tmp_path, class_path, encoder=cnn_encoder, **arguments)
    assert outcome_of(job).kind == "done"
    forked = json.loads(Path(job["files"]["result"]).read_text())
    own = torch.get_num_threads()
    torch.set_num_threads(forked["threads"])  # sums are taken in another order with another number
    try:
        here = json.loads(json.dumps(run(job)))
    finally:
        torch.set_num_threads(own)
    assert {key: forked[key] for key in ("metrics", "defects", "references")} == {
        key: here[key] for key in ("metrics", "defects", "references")
    }


def test_a_forked_cell_that_fails_says_why(parts, tmp_path: Path) -> None:
    outcome = outcome_of(make_task(parts, tmp_path, "Padim", shots=3))
    assert outcome.kind == "failed"
    assert "does not take shots" in outcome.reason


def test_a_forked_cell_over_its_time_is_ended_with_what_it_started(parts, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sleeping.py").write_text(SLEEPING)
    monkeypatch.syspath_prepend(str(tmp_path))
    executor = LocalExecutor(1, Limits(seconds=600), interval=0.02)
    job = make_task(parts, tmp_path, "sleeping.Model")
    executor.start(job)
    assert wait_until((tmp_path / "pids").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(alive(pid) for pid in pids)
    assert os.getsid(pids[0]) == pids[0]
    assert executor.finished() == []
    monkeypatch.setattr(executor._running[0], "_limits", Limits(seconds=0.01))
    (outcome,) = executor.finished()
    assert (outcome.kind, outcome.reason) == ("failed", "It ran longer than the time limit of 0.01 s.")
    assert "said before the end" in json.loads(Path(job["files"]["error"]).read_text())["log"]
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_forked_cell_ends_with_its_sweep(parts, tmp_path: Path) -> None:
    (tmp_path / "sleeping.py").write_text(SLEEPING)
    script = (
        "import json, sys, time; from benchmarks.few_shot.executors import Limits, LocalExecutor; "
        "LocalExecutor(1, Limits()).start(json.loads(sys.argv[1])); time.sleep(600)"
    )
    environment = child_environment()
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(tmp_path)])
    job = json.dumps(make_task(parts, tmp_path, "sleeping.Model"))
    sweep = subprocess.Popen([sys.executable, "-c", script, job], env=environment)
    try:
        assert wait_until((tmp_path / "pids").exists)
    finally:
        os.kill(sweep.pid, signal.SIGKILL)
        sweep.wait()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_importing_what_the_server_imports_starts_no_thread_and_no_graphics_card() -> None:
    # The pools of OpenBLAS, which end before a fork and begin anew after it, are told not to start.
    environment = child_environment() | {"OPENBLAS_NUM_THREADS": "1"}
    script = (
        f"import importlib, os; [importlib.import_module(name) for name in {PRELOAD}]; import torch; "
        "print(len(os.listdir('/proc/self/task')), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "False"]
