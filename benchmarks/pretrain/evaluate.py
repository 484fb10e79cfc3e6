"""Judge an encoder: patch nearest-neighbour on real images and a zero-shot text check.

Both look at frozen features of the exported encoder only; nothing is trained or chosen here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.data.few_shot import select_references
from benchmarks.pretrain.losses import patch_vectors
from benchmarks.provenance import provenance, write_json

TOP_FRACTION = 0.01


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of ``scores (N,)`` for binary ``labels (N,)``, ties counted half."""
    unique, inverse = scores.double().unique(return_inverse=True)
    positive = torch.zeros(len(unique), dtype=torch.double).index_add_(0, inverse, labels.double())
    negative = torch.zeros(len(unique), dtype=torch.double).index_add_(0, inverse, 1 - labels.double())
    below = negative.cumsum(0) - negative
    wins = (positive * (below + negative / 2)).sum()
    return (wins / (positive.sum() * negative.sum())).item()


def read_image(path: Path, size: int) -> Tensor:
    """Read an image as RGB ``(3, size, size)`` in [0, 1], squashed as Anomalib's Resize does (antialiased bilinear)."""
    with Image.open(path) as image:
        rgb = np.asarray(image.convert("RGB"))
    tensor = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(tensor, size=(size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)


def read_mask(path: Path, size: int) -> Tensor:
    """Read a mask as bool ``(size, size)``."""
    with Image.open(path) as image:
        resized = image.convert("L").resize((size, size), Image.Resampling.NEAREST)
        return torch.from_numpy(np.asarray(resized) > 127)


@torch.inference_mode()
def patch_features(encoder: VisionTextEncoder, images: Tensor) -> Tensor:
    """Unit patch vectors ``(B, h * w, C)`` at the finest grid.

    All maps count the same, made comparable as in training: :func:`benchmarks.pretrain.losses.patch_vectors`.
    """
    parts = patch_vectors([features.float() for features in encoder.encode_image(images).maps])
    return F.normalize(torch.cat(parts, 1), dim=1).flatten(2).transpose(1, 2)


def nearest_distance(query: Tensor, bank: Tensor) -> Tensor:
    """Cosine distance ``(n,)`` of query vectors ``(n, C)`` to the nearest of the bank ``(m, C)``, in [0, 2]."""
    return 1 - (query @ bank.T).amax(1)


def list_category(root: Path, every: int = 1) -> tuple[list[Path], list[tuple[Path, Path | None]]]:
    """List a category in MVTec AD layout.

    Args:
        root: Folder with ``train/good``, ``test/<defect>`` and ``ground_truth/<defect>``.
        every: Take each n-th test image of every defect only, for a quick look.

    Returns:
        Training images, and test images with their mask (None for good ones).
    """
    train = sorted((root / "train" / "good").iterdir())
    test: list[tuple[Path, Path | None]] = []
    for folder in sorted((root / "test").iterdir()):
        for path in sorted(folder.iterdir())[::every]:
            mask = root / "ground_truth" / folder.name / f"{path.stem}_mask.png"
            test.append((path, None if folder.name == "good" else mask))
    return train, test


@torch.inference_mode()
def patch_nearest_neighbour(
    encoder: VisionTextEncoder, root: Path, shots: Sequence[int], seeds: Sequence[int], every: int = 1
) -> dict[str, dict[str, list[float]]]:
    """Few-shot anomaly detection by distance to the patches of k references.

    The map is the distance to the nearest reference patch, the image score the mean of its top 1%.

    Returns:
        For every number of shots the image and pixel AUROC of each seed.
    """
    size = encoder.image_size[0]
    train, test = list_category(root, every)
    chosen = {(k, s): select_references([str(p) for p in train], k, s) for k in shots for s in seeds}
    needed = sorted({i for indices in chosen.values() for i in indices})
    references = {i: patch_features(encoder, read_image(train[i], size)[None])[0] for i in needed}
    labels = torch.tensor([mask is not None for _, mask in test])
    scores: dict[tuple[int, int], list[Tensor]] = {key: [] for key in chosen}
    pixels: dict[tuple[int, int], list[Tensor]] = {key: [] for key in chosen}
    truth = []
    for path, mask in test:
        query = patch_features(encoder, read_image(path, size)[None])[0]
        side = round(len(query) ** 0.5)
        truth.append(F.max_pool2d(read_mask(mask, 4 * side).float()[None], 4)[0] if mask else torch.zeros(side, side))
        # References are shared between seeds and shots; each is compared once.
        to_reference = {i: nearest_distance(query, reference) for i, reference in references.items()}
        for key, indices in chosen.items():
            distance = torch.stack([to_reference[i] for i in indices]).amin(0)
            scores[key].append(distance.topk(max(1, round(TOP_FRACTION * len(distance)))).values.mean())
            pixels[key].append(distance)
    flat_truth = torch.stack(truth).flatten() > 0.5
    return {
        str(k): {
            "image_auroc": [auroc(torch.stack(scores[k, s]), labels) for s in seeds],
            "pixel_auroc": [auroc(torch.cat(pixels[k, s]), flat_truth) for s in seeds],
        }
        for k in shots
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure patch nearest-neighbour on folders in MVTec AD layout and write a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain.evaluate", description=main.__doc__)
    parser.add_argument("--encoder", default="vtfusion-tiny", help="anything VisionTextEncoder takes")
    parser.add_argument("--data", type=Path, required=True, help="folder of categories")
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--shots", nargs="+", type=int, default=[2, 4, 16])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", type=int, default=[256])
    parser.add_argument("--every", type=int, default=1, help="take each n-th test image only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    results: dict[str, dict] = {}
    for size in args.sizes:
        encoder = VisionTextEncoder(args.encoder, image_size=size)
        for category in args.categories:
            shots = [k for k in args.shots if k <= len(list_category(args.data / category)[0])]
            found = patch_nearest_neighbour(encoder, args.data / category, shots, args.seeds, args.every)
            results.setdefault(category, {})[str(size)] = found
            for k, figures in found.items():
                means = {name: round(sum(values) / len(values), 3) for name, values in figures.items()}
                print(category, f"{size} px, {k} shots:", means, flush=True)
    if args.output:
        what = {"encoder": Path(args.encoder).name, "weights_sha256": encoder.weights_hash, "layers": encoder.layers}
        protocol = {"shots": args.shots, "seeds": args.seeds, "every": args.every, "top_fraction": TOP_FRACTION}
        write_json(args.output, {"provenance": provenance(), **what, "protocol": protocol, "results": results})


if __name__ == "__main__":
    main()
