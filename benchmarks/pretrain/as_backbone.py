"""Run Anomalib's Patchcore and Padim on the shipped image tower, as a timm backbone."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.engine import Engine
from anomalib.models import Padim, Patchcore
from anomalib.post_processing import PostProcessor
from lightning import seed_everything

import anomalib_vtfusion
from anomalib_vtfusion.data.demo import DemoParts
from benchmarks.pretrain.evaluate import auroc
from benchmarks.pretrain.export import export_timm_backbone
from benchmarks.provenance import provenance, write_json

SHIPPED = Path(anomalib_vtfusion.__file__).parent / "weights" / "vtfusion-tiny"


def measure(model_name: str, backbone: str, datamodule: AnomalibDataModule, folder: Path) -> dict[str, float]:
    """Fit and judge one model.

    Args:
        model_name: "Patchcore" or "Padim".
        backbone: ``local-dir:PATH`` as timm takes it.
        datamodule: Images.
        folder: Folder for what Anomalib writes.

    Returns:
        Image and pixel AUROC on the test images.
    """
    options: dict[str, Any] = {
        "backbone": backbone,
        # Scores as they are: without validation images there is nothing to fit a normalisation to, and torchmetrics
        # would squash scores above 1 until they are all alike.
        "evaluator": False,
        "post_processor": PostProcessor(enable_normalization=False, enable_thresholding=False),
        "visualizer": False,
    }
    if model_name == "Patchcore":
        model: Patchcore | Padim = Patchcore(layers=["layer2", "layer3"], coreset_sampling_ratio=0.02, **options)
    else:
        model = Padim(layers=["layer1", "layer2", "layer3"], n_features=100, **options)
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False)
    engine.fit(model, datamodule=datamodule)
    batches: list[Any] = engine.predict(model, datamodule=datamodule) or []
    scores, labels = (torch.cat([getattr(b, name).flatten() for b in batches]) for name in ("pred_score", "gt_label"))
    maps, masks = (torch.cat([getattr(b, name).flatten() for b in batches]) for name in ("anomaly_map", "gt_mask"))
    return {"image_auroc": round(auroc(scores, labels), 4), "pixel_auroc": round(auroc(maps, masks), 4)}


def main(arguments: list[str] | None = None) -> None:
    """Fit both models on demo parts, or on a category in MVTec AD layout, and write a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain.as_backbone", description=main.__doc__)
    parser.add_argument("--data", type=Path, help="folder of categories; demo parts if left out")
    parser.add_argument("--category", default="washer")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(arguments)
    results = {}
    seed_everything(0)
    with tempfile.TemporaryDirectory() as temporary:
        backbone = f"local-dir:{export_timm_backbone(SHIPPED, Path(temporary) / 'backbone')}"
        for name in ("Patchcore", "Padim"):
            datamodule: AnomalibDataModule = DemoParts(category=args.category)
            if args.data:
                datamodule = MVTecAD(root=args.data, category=args.category, num_workers=0)
            results[name] = measure(name, backbone, datamodule, Path(temporary) / name)
    data = "MVTec AD layout" if args.data else "DemoParts"
    write_json(args.output, {"provenance": provenance(), "data": data, "category": args.category, "results": results})


if __name__ == "__main__":
    main()
