"""What a fit needs of trainer, datamodule and pre-processor, checked or arranged before anything long starts."""

import logging

from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import ValSplitMode
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize, Transform

logger = logging.getLogger(__name__)

# Lightning's own values where the user sets none.
_MAX_EPOCHS = 1000
_SANITY_STEPS = 2
# Steps and learning rate of a fit. A few images make it forget what a prior knows: from there it is short and gentle.
_FIT = (60, 1e-3)
_FIT_FROM_PRIOR = (20, 2e-4)


def check_counts(k_shot: int | None, num_steps: int | None) -> None:
    """Refuse numbers of references and of steps that make no sense.

    Raises:
        ValueError: If there is to be less than one reference, or a negative number of steps.
    """
    if k_shot is not None and k_shot < 1:
        msg = f"k_shot must be at least 1, or None for all normal images; got {k_shot}."
        raise ValueError(msg)
    if num_steps is not None and num_steps < 0:
        msg = f"num_steps must not be negative (0 for no fit); got {num_steps}."
        raise ValueError(msg)


def fit_settings(has_prior: bool, num_steps: int | None, learning_rate: float | None) -> tuple[int, float]:
    """Steps and highest learning rate of a fit: the user's own, or what suits its start."""
    steps, rate = _FIT_FROM_PRIOR if has_prior else _FIT
    return steps if num_steps is None else num_steps, rate if learning_rate is None else learning_rate


def checked_datamodule(trainer: Trainer) -> AnomalibDataModule:
    """The datamodule of a fit.

    Raises:
        TypeError: If the trainer was given bare dataloaders.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, AnomalibDataModule):
        msg = "VTFusion chooses its references from a datamodule: pass datamodule=..., not bare dataloaders."
        raise TypeError(msg)
    if datamodule.val_split_mode in {ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TEST}:
        logger.warning(
            "This datamodule validates on test images (val_split_mode=%s): thresholds, and with them F1, labels and "
            "masks, are tuned on them. Set val_split_mode to 'none' to take thresholds from the references.",
            datamodule.val_split_mode.value,
        )
    return datamodule


def checked_transform(pre_processor: nn.Module | None, image_size: tuple[int, int]) -> Transform:
    """The pre-processor's transform, if it leaves normalising to the encoder.

    Args:
        pre_processor: The model's pre-processor.
        image_size: Height and width that the encoder takes.

    Raises:
        ValueError: If there is no transform, or it normalises.
    """
    transform = getattr(pre_processor, "transform", None)
    if not isinstance(transform, Transform):
        msg = f"VTFusion needs images of one size: give it a pre-processor with Resize({image_size})."
        raise ValueError(msg)  # noqa: TRY004 - a missing resize, not a wrong type
    parts = transform.transforms if isinstance(transform, Compose) else [transform]
    if any(isinstance(part, Normalize) for part in parts):
        msg = "VTFusion's encoder normalises images itself: leave Normalize out of the pre-processor."
        raise ValueError(msg)
    return transform


def replace_trainer_defaults(trainer: Trainer, datamodule: AnomalibDataModule) -> None:
    """One epoch holds the whole fit, and there is nothing to check beforehand; what the user set is kept."""
    fit_loop = trainer.fit_loop
    if fit_loop.max_epochs in {None, _MAX_EPOCHS} and fit_loop.max_steps == -1:
        fit_loop.max_epochs = 1
    if trainer.num_sanity_val_steps == _SANITY_STEPS:
        trainer.num_sanity_val_steps = 0
    if not hasattr(datamodule, "val_data") and datamodule.val_split_mode == ValSplitMode.NONE:
        # Anomalib's datamodules fail in val_dataloader() then, instead of saying that there is none.
        trainer.limit_val_batches = 0


class TrainingDataSwap(Callback):
    """Shows other training data during a fit, and gives the datamodule its own back, after an error as well."""

    def __init__(self) -> None:
        self._original: tuple[AnomalibDataModule, AnomalibDataset] | None = None

    def replace(self, datamodule: AnomalibDataModule, data: AnomalibDataset) -> None:
        """Let ``datamodule`` train on ``data`` until the fit is over."""
        self._original = datamodule, datamodule.train_data
        datamodule.train_data = data

    def restore(self) -> None:
        """Give back what `replace` took; calling it again does nothing."""
        if self._original is not None:
            datamodule, data = self._original
            datamodule.train_data = data
            self._original = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The fit is over."""
        del trainer, pl_module, stage
        self.restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The fit broke off: Lightning calls no `teardown` then."""
        del trainer, pl_module, exception
        self.restore()
