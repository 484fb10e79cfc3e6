"""Draws the heat maps of README.md: ``python -m benchmarks.heatmaps --output docs/heatmaps.png``."""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from anomalib.engine import Engine
from matplotlib.axes import Axes
from torch import Tensor

from anomalib_vtfusion import DemoParts, VTFusion

CATEGORIES = ("washer", "plate", "tile", "fabric", "connector")


def predict_first_defects(category: str, encoder: str, k_shot: int, num_steps: int) -> list[dict[str, Tensor | str]]:
    """Fit on ``k_shot`` normal images of a category and predict the first test image of each of two defects.

    Returns:
        For each image ``image (3, H, W)``, ``mask (H, W)``, ``anomaly_map (H, W)`` in ``[0, 1]`` and ``title``.
    """
    data = DemoParts(category=category, num_workers=0)
    model = VTFusion(encoder=encoder, k_shot=k_shot, num_steps=num_steps, visualizer=False)
    engine = Engine(enable_progress_bar=False, default_root_dir="results/heatmaps")
    engine.fit(model, datamodule=data)
    shown: dict[str, dict[str, Tensor | str]] = {}
    batches: list[Any] = list(engine.predict(model, datamodule=data) or [])
    for batch in batches:
        for item in batch.items:
            defect = Path(item.image_path).parent.name
            if defect != "good" and defect not in shown:
                shown[defect] = {
                    "image": item.image,
                    "mask": item.gt_mask.squeeze(),
                    "anomaly_map": item.anomaly_map.squeeze(),
                    "title": f"{category}: {defect.replace('_', ' ')}",
                }
    return [shown[defect] for defect in sorted(shown)][:2]


def draw(rows: list[dict[str, Tensor | str]], path: Path) -> None:
    """Write a picture with a column for each image: the image, its ground truth and its heat map."""
    figure, axes = plt.subplots(3, len(rows), figsize=(1.35 * len(rows), 4.3), dpi=110, squeeze=False)
    for column, row in enumerate(rows):
        image = torch.as_tensor(row["image"]).permute(1, 2, 0).cpu()
        panels: tuple[Axes, ...] = tuple(axes[:, column])
        panels[0].imshow(image)
        panels[0].set_title(str(row["title"]).replace(": ", "\n"), fontsize=7)
        panels[1].imshow(torch.as_tensor(row["mask"]).cpu(), cmap="gray")
        panels[2].imshow(image)
        panels[2].imshow(torch.as_tensor(row["anomaly_map"]).cpu(), cmap="jet", alpha=0.5, vmin=0, vmax=1)
        for panel in panels:
            panel.set_axis_off()
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)


def main() -> None:
    """Fit every category of the demo parts and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/heatmaps.png"))
    parser.add_argument("--encoder", default="vtfusion-tiny")
    parser.add_argument("--k_shot", type=int, default=2)
    parser.add_argument("--num_steps", type=int, default=120)
    args = parser.parse_args()
    rows = [
        row for name in CATEGORIES for row in predict_first_defects(name, args.encoder, args.k_shot, args.num_steps)
    ]
    draw(rows, args.output)


if __name__ == "__main__":
    main()
