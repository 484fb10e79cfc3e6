"""Command line: ``python -m benchmarks.latency [--encoder vtfusion-tiny] [--output FILE.json]``."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomalib_vtfusion.components.encoders import VisionTextEncoder
from benchmarks.latency.plot import draw
from benchmarks.latency.pool import Asked, WorkerProcess, measure
from benchmarks.latency.prepare import PATCHCORE_SIZE, Job, data, make, make_in_process, test_images
from benchmarks.latency.summary import auroc, quartiles, summarize
from benchmarks.latency.worker import Variant, Worker
from benchmarks.provenance import RESULTS, provenance, write_json

# Name of a variant: what makes its file, the file's compression, how it runs and what it calculates in.
VARIANTS: dict[str, tuple[str, str | None, str, str]] = {
    "tower": ("tower", None, "torch", "f32"),
    "vtfusion": ("export_torch", None, "torch", "f32"),
    "vtfusion-bf16": ("export_torch", None, "torch", "bf16"),
    "vtfusion-compiled": ("export_torch", None, "compiled", "f32"),
    "vtfusion-onnx": ("export_onnx", None, "onnx", "f32"),
    "vtfusion-openvino": ("export_openvino", None, "openvino", "f32"),
    "vtfusion-openvino-bf16": ("export_openvino", None, "openvino", "bf16"),
    "vtfusion-openvino-fp16": ("export_openvino", "fp16", "openvino", "f32"),
    "vtfusion-openvino-int8": ("export_openvino", "int8", "openvino", "f32"),
    "vtfusion-openvino-int8-ptq": ("export_openvino", "int8_ptq", "openvino", "f32"),
    "patchcore": ("patchcore", None, "torch", "f32"),
    "winclip": ("winclip", None, "torch", "f32"),
}
K = 4


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--encoder", default="vtfusion-tiny", help="encoder of VTFusion (default: vtfusion-tiny)")
    parser.add_argument("--weights", help='its weights; "" for random ones, on which latency does not depend')
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15, help="rounds at each batch size (default: 15)")
    parser.add_argument("--repeats", type=int, default=3, help="batches a round, the fastest counts; less of slow ones")
    parser.add_argument("--steps", type=int, default=0, help="optimiser steps of VTFusion's fit (default: 0)")
    parser.add_argument("--references", nargs="+", type=int, default=[1, 4, 16, 64], help="numbers k to compare")
    parser.add_argument("--images", nargs="+", type=int, default=[10, 100, 1000], help="numbers of images to compare")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=RESULTS / "latency.json", help="result file; a plot goes beside")
    parser.add_argument("--folder", type=Path, help="keep what is prepared here, or take it from here")
    parser.add_argument("--prepare", action="store_true", help="prepare --folder, for a measurement at a quiet time")
    parser.add_argument("--quick", action="store_true", help="one round in this process, only to try the benchmark")
    found = parser.parse_args(arguments)
    if found.prepare and found.folder is None:
        parser.error("--prepare needs --folder, where the measurement will find it")
    if "tower" not in found.variants:
        found.variants.insert(0, "tower")  # everything is compared with it
    if found.quick:
        found.rounds, found.repeats, found.references, found.images = 1, 1, found.references[:2], [2]
    return found


class Run:
    """One run of the benchmark.

    Args:
        settings: What `parse` returned.
        folder: Folder for all files; what it holds already is taken from there.
        keep: Ends what was started.

    Raises:
        ValueError: If the folder was prepared with other settings.
    """

    def __init__(self, settings: argparse.Namespace, folder: Path, keep: ExitStack) -> None:
        self.settings, self.folder, self.keep = settings, folder, keep
        own = {name: getattr(settings, name) for name in ("encoder", "weights", "steps")}
        about = folder / "about.json"
        if not about.exists():
            write_json(about, {"settings": own, "commit": provenance()["commit"]})
        prepared = json.loads(about.read_text(encoding="utf-8"))
        self.commit: str | None = prepared["commit"]
        if prepared["settings"] != own:
            raise ValueError(
                f"{folder} was prepared with {prepared['settings']}, not with {own}; give another --folder."
            )
        self.make: Callable[[Job], dict[str, Any]] = make if settings.quick else make_in_process
        encoder = VisionTextEncoder(settings.encoder, settings.weights)
        self.size, self.weights_hash = encoder.image_size, encoder.weights_hash
        data(folder, max(K, *settings.references))
        images, self.labels = test_images(folder, self.size)
        self.images = folder / "images.npy"
        np.save(self.images, images)
        self.files: dict[Job, dict[str, Any]] = {}

    def job(self, what: str, compression: str | None = None, k: int = K, steps: int = 0) -> dict[str, Any]:
        """Make a file, once."""
        settings = self.settings
        job = Job(what, str(self.folder), settings.encoder, settings.weights, k, steps, compression)
        record = job.target / "made.json"
        if job not in self.files and record.exists():
            self.files[job] = json.loads(record.read_text(encoding="utf-8"))
        if job not in self.files:
            print(f"making {job.target.name}", flush=True)
            self.files[job] = self.make(job)
            write_json(record, self.files[job])
        return self.files[job]

    def prepare(self) -> None:
        """Make all files."""
        self.job("fit", steps=self.settings.steps)
        for name in self.settings.variants:
            self.job(*VARIANTS[name][:2])
        for k in self.settings.references:
            self.job("fit", k=k, steps=self.settings.steps if k == K else 0)
            self.job("export_torch", k=k)
        if not self.settings.quick:
            self.job("test")

    def start(self, variant: Variant) -> Asked:
        """Load a variant."""
        print(f"loading {variant.name}", flush=True)
        if self.settings.quick:
            return Worker(variant, np.load(self.images))
        worker = WorkerProcess(variant, self.images)
        self.keep.callback(worker.stop)
        return worker

    def variant(self, name: str, path: str, kind: str, precision: str) -> Variant:
        """Describe a variant."""
        size = PATCHCORE_SIZE if name == "patchcore" else self.size
        device = self.settings.device if kind in {"torch", "compiled"} else "cpu"
        return Variant(name, kind, path, size, precision, device, self.settings.threads)

    def compare_variants(self) -> tuple[dict[str, Any], dict[str, Asked]]:
        """All variants, by name: times, memory, load time, file size and scores."""
        made = {name: self.job(*VARIANTS[name][:2]) for name in self.settings.variants}
        variants = {name: self.variant(name, made[name]["path"], *VARIANTS[name][2:]) for name in made}
        workers = {name: self.start(variant) for name, variant in variants.items()}
        batches = self.settings.batches
        samples = measure(workers, batches, self.settings.rounds, self.settings.repeats)
        times = {batch: summarize(samples[batch], "tower") for batch in batches}
        result: dict[str, Any] = {}
        for name, worker in workers.items():
            memory = {key: round(value, 2) for key, value in worker.ask({"do": "memory"}).items()}
            result[name] = {"batch": {str(batch): times[batch][name] for batch in batches}, **memory}
            result[name]["file_mb"] = round(made[name]["file_mb"], 2)
            result[name]["device"] = variants[name].device
        self._judge({name: worker for name, worker in workers.items() if name.startswith("vtfusion")}, result)
        return result, workers

    def _judge(self, workers: dict[str, Asked], result: dict[str, Any]) -> None:
        """How far each variant's scores are from eager PyTorch's, and how well they tell the test images apart."""
        scores = {name: worker.ask({"do": "scores"})["scores"] for name, worker in workers.items()}
        for name, own in scores.items():
            result[name]["image_auroc"] = round(auroc(own, self.labels.tolist()), 4)
            if "vtfusion" in scores:
                difference = max(abs(a - b) for a, b in zip(own, scores["vtfusion"], strict=True))
                result[name]["score_difference"] = float(f"{difference:.2g}")

    def compare_references(self) -> dict[str, Any]:
        """Eager time at batch 1, by number of references."""
        workers, rows = {}, {}
        for k in self.settings.references:
            path = self.job("export_torch", k=k)["path"]
            state = torch.load(Path(self.folder, f"fit-k{k}", "model.ckpt"), weights_only=True)["state_dict"]
            rows[k] = [value.shape[0] for name, value in state.items() if ".keys_" in name]
            workers[str(k)] = self.start(self.variant(f"vtfusion-k{k}", path, "torch", "f32"))
        samples = measure(workers, [1], self.settings.rounds, self.settings.repeats)[1]
        return {
            k: {clock: quartiles([sample[clock] for sample in rounds]) for clock in ("wall_ms", "cpu_ms")}
            | {"bank_rows": rows[int(k)]}
            for k, rounds in samples.items()
        }

    def compare_images(self, worker: Asked) -> dict[str, Any]:
        """Mean eager time an image, one by one, and the memory held afterwards, by number of images."""
        found = {str(count): worker.ask({"do": "many", "count": count}) for count in self.settings.images}
        return {count: {key: round(value, 2) for key, value in entry.items()} for count, entry in found.items()}

    def peaks(self) -> dict[str, float]:
        """Peak memory in MB of a test and of each export, each in a process of its own."""
        return {job.target.name: round(made["peak_mb"], 1) for job, made in self.files.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write result file and plot."""
    settings = parse(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
    # Of the commit and the load that the run starts with.
    result: dict[str, Any] = {"benchmark": "latency", "provenance": provenance()}
    with ExitStack() as keep:
        run = Run(settings, settings.folder or Path(keep.enter_context(tempfile.TemporaryDirectory())), keep)
        run.prepare()
        if settings.prepare:
            return
        names = ("encoder", "weights", "batches", "rounds", "repeats", "steps", "threads", "device")
        result["settings"] = {name: getattr(settings, name) for name in names}
        result["settings"] |= {"k": K, "image_size": run.size, "weights_hash": run.weights_hash}
        result["settings"] |= {"prepared_at_commit": run.commit}
        result["variants"], workers = run.compare_variants()
        result["images"] = run.compare_images(workers["vtfusion"] if "vtfusion" in workers else workers["tower"])
        result["references"] = run.compare_references()
        if not settings.quick:
            result["peak_mb"] = run.peaks()
    for name, entry in result["variants"].items():
        times = {b: (t["wall_ms"]["median"], t["wall_ratio"]["median"]) for b, t in entry["batch"].items()}
        print(f"{name:28s}", *(f"batch {b}: {ms:8.1f} ms {ratio:6.2f}x" for b, (ms, ratio) in times.items()), sep="  ")
    print(
        "wrote", write_json(settings.output, result).name, "and", draw(result, settings.output.with_suffix(".png")).name
    )


if __name__ == "__main__":
    main()
