"""A picture of every defect family on given images, for the eye to judge."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from anomalib_vtfusion.synthesis.foreground import foreground_mask
from anomalib_vtfusion.synthesis.masks import seeded
from anomalib_vtfusion.synthesis.synthesizer import AnomalySynthesizer

HEADER = 14
GAP = 2


@torch.no_grad()
def contact_sheet(
    images: Tensor, path: str | Path, seed: int = 0, synthesizer: AnomalySynthesizer | None = None
) -> Path:
    """Draw a grid: a pair of rows for each image (plain, then with the mask outlined in red), a column per family.

    The first column shows the clean image and its foreground mask.

    Args:
        images: Normal images, RGB in [0, 1], ``(B, 3, H, W)``.
        path: PNG file to write; written under another name first, so no half file is ever seen there.
        seed: Start of the random choices.
        synthesizer: Whose families and ranges to show; by default all families at their default ranges.

    Returns:
        The path.
    """
    synthesizer = synthesizer or AnomalySynthesizer()
    images = images.detach().float()
    columns: list[tuple[str, Tensor, Tensor]] = [("clean", images, _outline(foreground_mask(images)))]
    for family in synthesizer.families:
        single = AnomalySynthesizer(
            [family],
            area=synthesizer.area,
            strength=synthesizer.strength,
            defects_per_image=synthesizer.defects_per_image,
            clean_fraction=0.0,
        )
        single.textures = synthesizer.textures
        # One image at a time: a batch of different objects would lend each other their texture.
        rows = [single(image[None], seeded(seed + 1000 * row)) for row, image in enumerate(images)]
        pictures, masks = torch.cat([row.images for row in rows]), torch.cat([row.masks for row in rows])
        columns.append((family, pictures, _outline(masks)))

    height, width = images.shape[-2:]
    step_y, step_x = 2 * (height + GAP), width + GAP
    sheet = Image.new("RGB", (len(columns) * step_x, HEADER + images.shape[0] * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, pictures, outline) in enumerate(columns):
        draw.text((column * step_x + 2, 1), name, fill="black")
        red = torch.tensor([1.0, 0.0, 0.0], device=images.device).view(1, 3, 1, 1)
        marked = torch.where(outline, red, pictures)
        for row in range(images.shape[0]):
            top = HEADER + row * step_y
            sheet.paste(_to_pil(pictures[row]), (column * step_x, top))
            sheet.paste(_to_pil(marked[row]), (column * step_x, top + height + GAP))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    sheet.save(partial, format="PNG")
    partial.replace(path)
    return path


def _outline(masks: Tensor) -> Tensor:
    """Pixels just outside the masks, bool ``(B, 1, H, W)``."""
    return (F.max_pool2d(masks, 3, stride=1, padding=1) - masks) > 0.5


def _to_pil(image: Tensor) -> Image.Image:
    pixels = (image.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(1, 2, 0).cpu().contiguous()
    height, width = pixels.shape[:2]
    return Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())
