"""Images of more than eight bits a channel, which Anomalib's reader clips to white."""

from typing import Any

import numpy as np
import torch
from anomalib.data.utils import read_image
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize

_LARGEST = 65535


def is_deep(path: str) -> bool:
    """Whether an image file has more than eight bits a channel; only its header is read."""
    with Image.open(path) as image:
        return image.mode.startswith(("I", "F"))


def read_rgb(path: str) -> Tensor:
    """Read an image of any depth.

    Args:
        path: Grey, colour, palette or transparent image, 8 or 16 bits.

    Returns:
        RGB ``(3, H, W)`` in ``[0, 1]``.

    Raises:
        OSError: If the file cannot be read.
    """
    if not is_deep(path):
        return torch.as_tensor(read_image(path, as_tensor=True))
    with Image.open(path) as image:
        values = torch.from_numpy(np.array(image, dtype=np.float32))
        largest = 1.0 if image.mode == "F" else _LARGEST
    return (values / largest).clamp(0, 1).expand(3, -1, -1)


def restore_deep_images(batch: Any) -> Tensor:
    """Images of a batch, with those that Anomalib has clipped read anew.

    Args:
        batch: Anomalib's batch; `image` is ``(B, 3, H, W)``, `image_path` may be missing.

    Returns:
        The images; those of files with more than eight bits a channel are resized to ``H x W``.
    """
    images: Tensor = batch.image
    deep = [i for i, path in enumerate(batch.image_path or []) if is_deep(path)]
    if not deep:
        return images
    images = images.clone()
    for i in deep:
        images[i] = resize(read_rgb(batch.image_path[i]), list(images.shape[-2:]), antialias=True).to(images)
    return images
