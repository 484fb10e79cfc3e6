"""Post-processor that keeps a threshold learned without anomalies, and scores that never saturate."""

import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

# Share of the pixels of every normal calibration image that lies below the pixel threshold.
NORMAL_PIXELS = 0.99


class FewShotPostProcessor(PostProcessor):
    """Thresholds from leave-one-out references and synthetic anomalies, unless validation has real anomalies.

    Anomalib's own post-processor takes threshold, minimum and maximum from the validation set. With normal images only
    that puts the threshold at the highest normal score, and with none at all there is no threshold. This one is
    calibrated by the model at the end of the fit (`calibrate`), and takes thresholds from validation only where
    validation holds normal *and* anomalous images.

    Scores are normalised by shifting their log-odds so that the threshold becomes 0.5. That is strictly increasing, so
    no two images tie because both were clipped, and needs no minimum or maximum.
    """

    def calibrate(self, batch: ImageBatch) -> None:
        """Take thresholds from a batch with labels, masks and raw predictions, half of it normal.

        The threshold with the best F1, but never one that calls normal images anomalous: synthetic anomalies that the
        model cannot see would otherwise pull it down to where everything is anomalous.

        Raises:
            ValueError: If the batch has no labels, masks or predictions.
        """
        fields = (batch.pred_score, batch.gt_label, batch.anomaly_map, batch.gt_mask)
        scores, labels, maps, masks = fields
        if scores is None or labels is None or maps is None or masks is None:
            msg = "Calibration needs pred_score, anomaly_map, gt_label and gt_mask of the batch."
            raise ValueError(msg)
        self._image_threshold_metric.update(batch)
        self._pixel_threshold_metric.update(batch)
        self._take_thresholds()
        self._image_threshold.clamp_(min=scores.flatten()[labels == 0].max())
        normal_pixels = maps.flatten(1)[labels == 0].sort(dim=1).values
        self._pixel_threshold.clamp_(min=normal_pixels[:, int(NORMAL_PIXELS * normal_pixels.shape[1])].max())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take thresholds from validation if it shows normal and anomalous images, else keep the calibrated ones."""
        del pl_module
        metric = self._image_threshold_metric
        labels = torch.cat([t.flatten() for t in metric.target]) if metric.update_called and metric.target else None
        if not trainer.sanity_checking and labels is not None and labels.min() == 0 and labels.max() == 1:
            self._take_thresholds()
        for unused in (
            self._image_threshold_metric,
            self._pixel_threshold_metric,
            self._image_min_max_metric,
            self._pixel_min_max_metric,
        ):
            unused.reset()

    def _take_thresholds(self) -> None:
        if self._image_threshold_metric.update_called:
            self._image_threshold.copy_(self._image_threshold_metric.compute())
            self._image_threshold_metric.reset()
        if self._pixel_threshold_metric.update_called:
            self._pixel_threshold.copy_(self._pixel_threshold_metric.compute())
            self._pixel_threshold_metric.reset()

    @staticmethod
    def _normalize(
        preds: Tensor | None,
        norm_min: Tensor,
        norm_max: Tensor,
        threshold: Tensor,
    ) -> Tensor | None:
        """Shift the log-odds of ``preds`` in ``(0, 1)`` so that ``threshold`` becomes 0.5."""
        del norm_min, norm_max
        if preds is None:
            return None
        threshold = torch.where(torch.isnan(threshold), torch.full_like(threshold, 0.5), threshold).clamp(
            1e-6, 1 - 1e-6
        )
        raised = preds * (1 - threshold)
        return raised / (raised + (1 - preds) * threshold)
