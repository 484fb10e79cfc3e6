"""Makes the file of each variant, each in a process of its own so that its peak memory can be told."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from anomalib.models import Patchcore
from anomalib.models.image.winclip import torch_model as winclip
from open_clip import list_models
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import Resize

from anomalib_vtfusion import VTFusion
from anomalib_vtfusion.components.encoder_weights import load_clip
from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.data.demo import ensure_rendered, render
from benchmarks.few_shot.window_clip import CropWindowModel
from benchmarks.latency.worker import resident_megabytes
from benchmarks.provenance import ROOT

CATEGORY = "washer"
PATCHCORE_SIZE = (224, 224)


@dataclass(frozen=True)
class Job:
    """A file to make.

    Attributes:
        what: Name of a function below.
        folder: Folder that holds all files of the run.
        encoder: VTFusion's encoder.
        weights: Its weights; "" for random ones.
        k: Number of references.
        steps: Optimiser steps of the fit.
        compression: Compression of an OpenVINO export; None for none.
    """

    what: str
    folder: str
    encoder: str
    weights: str | None
    k: int = 4
    steps: int = 0
    compression: str | None = None

    @property
    def target(self) -> Path:
        """Folder of this job's own, ``checkpoint`` and exports of one fit beside each other."""
        return Path(self.folder, "-".join(filter(None, [self.what, self.compression or "", f"k{self.k}"])))

    @property
    def checkpoint(self) -> Path:
        """Checkpoint of the fit with this job's k."""
        return Path(self.folder, f"fit-k{self.k}", "model.ckpt")


def data(folder: Path, train: int) -> None:
    """Render the demo's washers with at least ``train`` normal training images."""
    good = ensure_rendered(folder / "parts", CATEGORY) / "train" / "good"
    for index in range(len(list(good.iterdir())), train):
        Image.fromarray(render(CATEGORY, "train", "good", index)[0]).save(good / f"{index:03}.png")


def test_images(folder: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Test images ``(N, 3, H, W)`` in ``[0, 1]`` and their labels ``(N,)``."""
    datamodule = _datamodule(folder)
    datamodule.setup("test")
    dataset: Any = datamodule.test_data
    items = sorted(dataset, key=lambda item: str(item.image_path)[::-1])
    stacked = torch.stack([item.image for item in items])
    stacked = nn.functional.interpolate(stacked, size, mode="bilinear", antialias=True)
    return stacked.clamp(0, 1).numpy(), np.array([bool(item.gt_label) for item in items])


def fit(job: Job) -> Path:
    """Fit VTFusion on k references and keep the checkpoint."""
    model = VTFusion(encoder=job.encoder, weights=job.weights, k_shot=job.k, num_steps=job.steps, visualizer=False)
    engine = _engine(job)
    engine.fit(model, datamodule=_datamodule(Path(job.folder)))
    engine.trainer.save_checkpoint(job.checkpoint)
    return job.checkpoint


def test(job: Job) -> Path:
    """Test the checkpoint with Anomalib's engine; only its memory and time are of interest."""
    model = VTFusion.load_from_checkpoint(job.checkpoint)
    _engine(job).test(model, datamodule=_datamodule(Path(job.folder)))
    return job.checkpoint


def export_torch(job: Job) -> Path:
    """Export the checkpoint with its code's names, as Anomalib's torch inferencer loads it."""
    return _export(job, ExportType.TORCH)


def export_onnx(job: Job) -> Path:
    """Export the checkpoint to ONNX."""
    return _export(job, ExportType.ONNX)


def export_openvino(job: Job) -> Path:
    """Export the checkpoint to OpenVINO, compressed as the job says."""
    return _export(job, ExportType.OPENVINO)


def tower(job: Job) -> Path:
    """The image tower as open_clip makes it."""
    visual: Any = load_clip(job.encoder, job.weights).model.visual
    return _save(job, visual)


def patchcore(job: Job) -> Path:
    """Anomalib's PatchCore with WideResNet-50, random weights, and a bank from k images thinned as it does."""
    pre_processor = Patchcore.configure_pre_processor(PATCHCORE_SIZE)
    model = Patchcore(pre_trained=False, pre_processor=pre_processor, evaluator=False, visualizer=False)
    network = model.model
    network.train()
    network.feature_extractor.eval()
    with torch.no_grad():
        network(torch.from_numpy(np.resize(test_images(Path(job.folder), PATCHCORE_SIZE)[0], (job.k, 3, 224, 224))))
    network.subsample_embedding(model.coreset_sampling_ratio)
    return model.eval().to_torch(job.target)


def winclip_two_shot(job: Job) -> Path:
    """WinCLIP with two references: Anomalib's with an open_clip ViT of random weights, else by crops of the image."""
    size = VisionTextEncoder(job.encoder, job.weights).image_size
    references = torch.from_numpy(test_images(Path(job.folder), size)[0][:2])
    if job.encoder in list_models() and job.encoder.startswith("ViT"):
        constants: Any = winclip  # with its own it would download weights
        constants.BACKBONE, constants.PRETRAINED = job.encoder, None
        return _save(job, winclip.WinClipModel(CATEGORY, references))
    model = CropWindowModel(job.encoder, job.weights)
    model.setup(CATEGORY, references)
    return _save(job, model)


JOBS = {job.__name__: job for job in (fit, test, export_torch, export_onnx, export_openvino, tower, patchcore)}
JOBS["winclip"] = winclip_two_shot


def make(job: Job) -> dict[str, Any]:
    """Do a job in this process.

    Returns:
        ``path`` of the file, ``file_mb`` of it and what belongs to it, ``seconds``, and the process's ``peak_mb``.
    """
    start = time.perf_counter()
    path = JOBS[job.what](job)
    size = sum(file.stat().st_size for file in path.parent.iterdir()) / 1e6
    return {
        "path": str(path),
        "file_mb": size,
        "seconds": time.perf_counter() - start,
        "peak_mb": resident_megabytes(peak=True),
    }


def make_in_process(job: Job) -> dict[str, Any]:
    """Do a job in a process of its own.

    Raises:
        RuntimeError: If it fails, with the end of what it printed.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [sys.executable, "-m", "benchmarks.latency.prepare", json.dumps(asdict(job)), answer.name]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if process.returncode:
            raise RuntimeError(f"{job.what} failed:\n{process.stderr[-3000:]}")
        return json.loads(Path(answer.name).read_text(encoding="utf-8"))


def _export(job: Job, kind: ExportType) -> Path:
    model: Any = VTFusion.load_from_checkpoint(job.checkpoint)
    size = model.model.encoder.image_size
    quantized = job.compression == CompressionType.INT8_PTQ.value
    path = _engine(job).export(
        model,
        kind,
        export_root=job.target,
        input_size=None if kind == ExportType.TORCH else size,
        compression_type=CompressionType(job.compression) if job.compression else None,
        datamodule=_datamodule(Path(job.folder), calibrate=size) if quantized else None,
    )
    if path is None:
        raise RuntimeError(f"Anomalib exported nothing as {kind.value}.")
    return path


def _datamodule(folder: Path, *, calibrate: tuple[int, int] | None = None) -> MVTecAD:
    # Quantization takes its calibration images from validation data; there a normal training image is what it is for.
    split: dict[str, Any] = {"val_split_mode": "none"}
    if calibrate is not None:
        split = {"val_split_mode": "from_train", "val_split_ratio": 0.5, "val_augmentations": Resize(calibrate)}
    return MVTecAD(root=folder / "parts", category=CATEGORY, num_workers=0, eval_batch_size=8, **split)


def _engine(job: Job) -> Engine:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Engine(default_root_dir=Path(job.folder, "engine"), accelerator="cpu", devices=1, **quiet)


def _save(job: Job, module: nn.Module) -> Path:
    job.target.mkdir(parents=True, exist_ok=True)
    torch.save(module.eval(), job.target / "model.pt")
    return job.target / "model.pt"


def main() -> None:
    """Do the job given as JSON and write its answer to the file given."""
    Path(sys.argv[2]).write_text(json.dumps(make(Job(**json.loads(sys.argv[1])))), encoding="utf-8")


if __name__ == "__main__":
    main()
