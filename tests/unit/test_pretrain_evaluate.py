"""The judge of an encoder: AUROC and patch nearest-neighbour on a folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_vtfusion.components.encoders import ImageFeatures
from benchmarks.pretrain.evaluate import auroc, list_category, patch_nearest_neighbour


class Brightness:
    """Stand-in encoder whose only feature tells bright patches from dark ones."""

    image_size = (32, 32)

    def encode_image(self, images: torch.Tensor) -> ImageFeatures:
        """Return direction (1, 0) for dark and (0, 1) for bright patches, at two strides."""
        mean = images.mean(1, keepdim=True)
        maps = [torch.nn.functional.avg_pool2d(torch.cat([1 - mean, mean], 1), stride) for stride in (2, 4)]
        return ImageFeatures(maps=maps, tokens=maps[1], pooled=maps[1].mean((2, 3)))


def test_auroc_counts_ties_half() -> None:
    assert auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1])) == pytest.approx(0.875)


def test_patch_nearest_neighbour_reads_the_folder_layout(tmp_path: Path) -> None:
    def save(path: str, bright: bool) -> None:
        image = np.zeros((32, 32), dtype=np.uint8)
        if bright:
            image[8:16, 8:16] = 255
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / path)

    for number in range(3):
        save(f"train/good/{number}.png", bright=False)
        save(f"test/good/{number}.png", bright=False)
        save(f"test/spot/{number}.png", bright=True)
        save(f"ground_truth/spot/{number}_mask.png", bright=True)
    train_images, test_images = list_category(tmp_path)
    assert len(train_images) == 3
    assert [mask is None for _, mask in test_images] == [True] * 3 + [False] * 3
    found = patch_nearest_neighbour(Brightness(), tmp_path, [1], [0, 1])
    assert found["1"]["image_auroc"] == [1.0, 1.0]
    assert min(found["1"]["pixel_auroc"]) > 0.95
