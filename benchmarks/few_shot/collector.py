"""Takes what a model says of the test images before anything normalises or cuts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import read_image
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

TIMED_IMAGES = 8


class RawOutputs(Callback):
    """Collects paths, labels, scores, maps and masks of a test run.

    A trainer's own callbacks run before a model's, so this one sees the output before the post-processor does.

    Attributes:
        paths: Path of each image.
        labels: Whether it is anomalous.
        scores: Its raw score.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.labels: list[bool] = []
        self.scores: list[float] = []
        self._maps: list[Tensor] = []
        self._masks: list[Tensor] = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the batch says."""
        del trainer, pl_module, batch, batch_idx, dataloader_idx
        count = len(outputs.image_path)
        self.paths += [str(path) for path in outputs.image_path]
        self.labels += outputs.gt_label.reshape(count).bool().tolist()
        maps = outputs.anomaly_map
        if outputs.pred_score is None:
            scores = maps.reshape(count, -1).amax(dim=1)
        else:
            scores = outputs.pred_score.reshape(count)
        self.scores += scores.double().cpu().tolist()
        if maps is not None:
            self._maps.append(maps.reshape(count, *maps.shape[-2:]).float().cpu().clone())
        if outputs.gt_mask is not None:
            self._masks.append(outputs.gt_mask.reshape(count, *outputs.gt_mask.shape[-2:]).bool().cpu().clone())

    def maps(self) -> Tensor | None:
        """Maps ``(N, H, W)``, or None where a model makes none."""
        return torch.cat(self._maps) if self._maps else None

    def masks(self) -> Tensor | None:
        """Masks ``(N, H, W)``, or None where the data has none for some image."""
        masks = torch.cat(self._masks) if self._masks else None
        return masks if masks is not None and len(masks) == len(self.paths) else None

    @staticmethod
    def read(path: str) -> Tensor:
        """Image ``(3, H, W)`` in ``[0, 1]``."""
        return torch.as_tensor(read_image(Path(path), as_tensor=True))


def preprocessed(datamodule: AnomalibDataModule, model: AnomalibModule) -> Tensor:
    """First test images ``(N, 3, H, W)`` as the network takes them."""
    transform = getattr(model.pre_processor, "transform", None)
    dataset = datamodule.test_data
    images = [dataset[index].image for index in range(min(TIMED_IMAGES, len(dataset)))]
    return torch.stack([torch.as_tensor(transform(image) if transform else image) for image in images])
