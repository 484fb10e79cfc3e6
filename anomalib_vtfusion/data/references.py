"""The reference images of a fit: chosen, read and checked before anything long starts."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import LabelName
from anomalib.data.utils.image import get_image_filenames_from_dir
from torch import Tensor
from torchvision.transforms.v2 import Transform

from anomalib_vtfusion.data.deep_images import read_rgb
from anomalib_vtfusion.data.few_shot import select_references


@dataclass(frozen=True)
class References:
    """Reference images of one class.

    Attributes:
        paths: Path of each of the ``k`` references.
        images: ``(k, 3, H, W)`` in ``[0, 1]``, transformed as the model's pre-processor does it.
    """

    paths: tuple[str, ...]
    images: Tensor

    def indices(self, image_paths: Sequence[str]) -> Tensor:
        """Which reference each of these paths is: ``(B,)``."""
        return torch.tensor([self.paths.index(str(path)) for path in image_paths])

    def repeated(self, dataset: AnomalibDataset, rows: int) -> AnomalibDataset:
        """A copy of a training set with the references alone, repeated so that one epoch holds ``rows`` images."""
        samples = pd.concat([dataset.samples.iloc[[0]]] * rows, ignore_index=True)
        samples["image_path"] = [self.paths[i % len(self.paths)] for i in range(rows)]
        samples["label_index"], samples["mask_path"] = LabelName.NORMAL, ""
        samples.attrs = dict(dataset.samples.attrs)
        repeated = copy.copy(dataset)
        repeated.samples = samples
        return repeated


def choose_references(
    datamodule: AnomalibDataModule,
    k_shot: int | None,
    seed: int,
    few_shot_source: str | None,
    transform: Transform,
    image_size: tuple[int, int],
) -> References:
    """Choose ``k_shot`` normal images of the training data, or of a folder, and read them.

    Args:
        datamodule: Set-up datamodule.
        k_shot: How many; None for all there are.
        seed: Seed of the choice.
        few_shot_source: Folder of normal images to use instead of the training data.
        transform: The model's pre-processing.
        image_size: Height and width that it must make of every image.

    Raises:
        FileNotFoundError: If ``few_shot_source`` is not a folder.
        ValueError: If there are no normal images, fewer than ``k_shot``, or one that cannot be read or comes out of the
            pre-processing in another size.
    """
    if few_shot_source is not None:
        if not Path(few_shot_source).is_dir():
            msg = f"few_shot_source must be a folder of normal images, but {few_shot_source!r} is not a folder."
            raise FileNotFoundError(msg)
        try:
            paths = [str(path) for path in get_image_filenames_from_dir(few_shot_source)]
        except ValueError as error:
            msg = f"few_shot_source {few_shot_source!r} holds no images; put at least one normal image there."
            raise ValueError(msg) from error
        origin = f"few_shot_source {few_shot_source!r}"
    else:
        samples = datamodule.train_data.samples
        # A datamodule may list an image more than once; it is still one reference.
        paths = list(dict.fromkeys(str(path) for path in samples[samples.label_index == LabelName.NORMAL].image_path))
        origin = f"the training data of {datamodule.name}"
    if not paths:
        msg = f"There are no normal images in {origin}: VTFusion needs at least one."
        raise ValueError(msg)
    if k_shot is not None:
        if k_shot > len(paths):
            msg = f"k_shot is {k_shot}, but there are only {len(paths)} normal images in {origin}."
            raise ValueError(msg)
        paths = [paths[i] for i in select_references(paths, k_shot, seed)]
    images = [transform(_read(path)) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if tuple(image.shape[-2:]) != tuple(image_size):
            msg = (
                f"The pre-processor makes images of {tuple(image.shape[-2:])} (of {path}), but the encoder takes "
                f"{tuple(image_size)}. Set image_size of VTFusion instead."
            )
            raise ValueError(msg)
    return References(tuple(paths), torch.stack(images))


def _read(path: str) -> Tensor:
    try:
        return read_rgb(path)
    except OSError as error:
        msg = f"The reference image {path} cannot be read ({error}). Remove it or replace it."
        raise ValueError(msg) from error
