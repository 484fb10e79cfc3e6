"""What the process of one cell does: seed, build, fit, measure, test, score, write the result.

The task comes from the server that this process was forked off, or as JSON on standard input. The exit code is 0 with a
result, 3 where the model cannot be run here, else 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.few_shot.executors import SKIPPED_EXIT, write_reason
from benchmarks.provenance import provenance, write_json

SCHEMA = 1
PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the task on standard input and return the exit code."""
    task = json.load(sys.stdin)
    die_with(task.get("parent"))
    return run_task(task)


def run_task(task: dict[str, Any]) -> int:
    """Run a task and return the exit code."""
    files = {name: Path(path) for name, path in task["files"].items()}
    from benchmarks.few_shot.models import UnavailableError

    try:
        result = run(task)
    except UnavailableError as error:
        write_reason(files["skipped"], task, str(error))
        return SKIPPED_EXIT
    except Exception as error:
        traceback.print_exc()
        write_reason(files["error"], task, f"{type(error).__name__}: {error}", log=traceback.format_exc())
        return 1
    write_json(files["result"], result)
    return 0


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Run a cell.

    Args:
        task: What :func:`benchmarks.few_shot.cells.task` made.

    Returns:
        Content of its result file.

    Raises:
        UnavailableError: If the model's weights cannot be had.
        ValueError: If an argument is wrong, or a model's output is.
    """
    import torch
    from anomalib.callbacks.checkpoint import ModelCheckpoint
    from anomalib.engine import Engine
    from lightning.pytorch import seed_everything

    from benchmarks.few_shot.collector import RawOutputs, preprocessed
    from benchmarks.few_shot.measure import checkpoint_mb, latency, peak_memory_mb
    from benchmarks.few_shot.models import build_data, build_model, class_name_of

    cell = task["cell"]
    # Before anything is built: initial weights and PaDiM's choice of channels depend on it.
    seed_everything(cell["seed"], workers=True)
    datamodule = build_data(task["data"], cell)
    class_name = class_name_of(task["data"], datamodule)
    model = build_model(task["model"], cell, class_name)
    outputs = RawOutputs()
    with tempfile.TemporaryDirectory(prefix="few_shot_") as scratch:
        arguments = {
            "accelerator": task["accelerator"],
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            # One that never writes; the size of a checkpoint is measured apart from the fit.
            "callbacks": [outputs, ModelCheckpoint(save_top_k=0)],
        }
        engine = Engine(default_root_dir=scratch, **{**arguments, **task["model"]["trainer"]})
        begin, busy = time.perf_counter(), time.process_time()
        engine.fit(model, datamodule=datamodule)
        fit_seconds, fit_cpu_seconds = time.perf_counter() - begin, time.process_time() - busy
        device = engine.trainer.strategy.root_device
        checkpoint = checkpoint_mb(engine.trainer, Path(scratch))
        images = preprocessed(datamodule, model)
        milliseconds = latency(model.model, images, device)
        memory = peak_memory_mb(device)
        begin, busy = time.perf_counter(), time.process_time()
        engine.test(model, datamodule=datamodule, verbose=False)
        test_seconds, test_cpu_seconds = time.perf_counter() - begin, time.process_time() - busy
    begin = time.perf_counter()
    scored = score(task, outputs)
    return {
        "schema": SCHEMA,
        "cell": cell,
        "fingerprint": task["fingerprint"],
        "class_name": class_name,
        **scored,
        "fit_seconds": round(fit_seconds, 3),
        "fit_cpu_seconds": round(fit_cpu_seconds, 3),  # tells a slow fit from a busy machine
        "test_seconds": round(test_seconds, 3),
        "test_cpu_seconds": round(test_cpu_seconds, 3),
        "score_seconds": round(time.perf_counter() - begin, 3),
        "latency_ms": milliseconds,
        "peak_memory_mb": memory,
        "checkpoint_mb": checkpoint,
        "image_size": list(images.shape[-2:]),
        "threads": torch.get_num_threads(),
        "accelerator": device.type,
        "references": _references(datamodule.manifest, cell["k"]),
        "model": {key: task["model"][key] for key in ("class_path", "init_args", "image_size", "trainer")},
        "encoder_sha256": task["encoder_sha256"],
        "data": _without_root(task["data"]),
        "provenance": provenance(),
    }


def score(task: dict[str, Any], outputs: Any) -> dict[str, Any]:
    """Metrics of a test run, and the scores of its images by kind of defect; keeps pictures if the task says so."""
    import numpy as np

    from anomalib_vtfusion.data.few_shot import relative_paths
    from benchmarks.few_shot import pictures, scores

    names = relative_paths(outputs.paths)
    labels, values = np.array(outputs.labels, dtype=bool), np.array(outputs.scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("An image score is not finite.")
    metrics = scores.image_metrics(values, labels)
    maps, masks = outputs.maps(), outputs.masks()
    metrics |= scores.pixel_metrics(maps, masks) if maps is not None and masks is not None else {}
    if task["pictures"] and maps is not None and masks is not None:
        kept = pictures.choose(names, task["pictures"])
        chosen = [names[i] for i in kept]
        pictures.save_maps(Path(task["files"]["maps"]), chosen, maps[kept])
        originals = [outputs.read(outputs.paths[i]) for i in kept]
        pictures.save_views(Path(task["views"]), chosen, originals, masks[kept])
    anomalous_kinds = {name.rpartition("/")[0] for name, label in zip(names, labels, strict=True) if label}
    defects: dict[str, Any] = defaultdict(lambda: {"auroc": None, "scores": {}})
    for name, label, value in zip(names, labels, values, strict=True):
        kind, _, file = name.rpartition("/")
        entry = defects[kind if label or kind not in anomalous_kinds else f"{kind} (normal)"]
        entry["label"] = int(label)
        entry["scores"][file] = float(value)
    for kind, entry in defects.items():
        if entry["label"]:
            of_kind = np.array(
                [bool(label) and name.rpartition("/")[0] == kind for name, label in zip(names, labels, strict=True)]
            )
            chosen_rows = of_kind | ~labels
            entry["auroc"] = scores.auroc(values[chosen_rows], labels[chosen_rows])
    return {"metrics": metrics, "images": len(names), "defects": dict(defects)}


def die_with(parent: int | None) -> None:
    """End with the process that started this one, and be the first to go when memory runs out (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        sys.exit(1)  # it ended before the line above
    with contextlib.suppress(OSError):  # a container may forbid it
        Path("/proc/self/oom_score_adj").write_text("600", encoding="ascii")


def _references(manifest: dict[str, Any], k: int) -> dict[str, Any]:
    """The manifest without the folder, which is a path of this machine; a zero-shot model was shown nothing."""
    listed = manifest["references"] if k else []
    return {"available": manifest["available"], "seed": manifest["seed"], "references": listed}


def _without_root(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "init_args": {key: value for key, value in data["init_args"].items() if key != "root"}}


if __name__ == "__main__":
    sys.exit(main())
