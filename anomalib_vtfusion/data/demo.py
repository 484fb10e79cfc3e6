"""DemoParts: a small rendered data set of industrial parts, to try a model where no data can be downloaded."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from anomalib.data import AnomalibDataModule
from anomalib.data.datasets.image.mvtecad import MVTecADDataset
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from PIL import Image
from torchvision.transforms.v2 import Transform

from anomalib_vtfusion.data import part_defects, parts
from anomalib_vtfusion.data.rendering import Array, Light, Surface, photograph, place_light, shade, shrink

VERSION = 1
"""Counts up whenever a picture changes; part of the cache path, so that old and new pictures never mix."""

NUM_TRAIN, NUM_GOOD, NUM_PER_DEFECT = 16, 10, 5
"""Normal training images, normal test images, and test images of each defect, in every category."""

GOOD = "good"
_MARKER = "demo_parts.json"

DrawDefect = Callable[[Surface, np.random.Generator, float], Array]


@dataclass(frozen=True)
class Category:
    """A kind of part and what can be wrong with it.

    Attributes:
        build: Function of :mod:`~anomalib_vtfusion.data.parts` that builds it.
        faults: Defects that ``build`` puts into the shape of the part.
        defects: Defects that are drawn on its surface, and how.
    """

    build: Callable[[np.random.Generator, Light, parts.Fault | None], parts.Built]
    faults: tuple[str, ...]
    defects: Mapping[str, DrawDefect]


CATEGORIES: dict[str, Category] = {
    "connector": Category(
        build=parts.connector,
        faults=("bent_pin", "missing_pin"),
        defects={
            "contamination": partial(part_defects.chips, color=(0.55, 0.56, 0.57)),
            "crack": partial(part_defects.crack, depth=(0.16, 0.16, 0.16)),
        },
    ),
    "fabric": Category(
        build=parts.fabric,
        faults=("missing_thread",),
        defects={
            "contamination": partial(part_defects.fiber, color=(0.42, 0.05, 0.04)),
            "hole": part_defects.hole,
            "stain": partial(part_defects.stain, tint=(0.30, 0.27, 0.22)),
        },
    ),
    "plate": Category(
        build=parts.plate,
        faults=("blocked_hole", "deformed_hole"),
        defects={"scratch": part_defects.scratch, "stain": part_defects.stain},
    ),
    "tile": Category(
        build=parts.tile,
        faults=(),
        defects={
            "crack": part_defects.crack,
            "pit": part_defects.pit,
            "scratch": partial(part_defects.scratch, bright=(0.70, 0.69, 0.67)),
            "stain": partial(part_defects.stain, tint=(0.42, 0.38, 0.33)),
        },
    ),
    "washer": Category(
        build=parts.washer,
        faults=("nick",),
        defects={
            "contamination": part_defects.fiber,
            "scratch": part_defects.scratch,
            "stain": part_defects.stain,
        },
    ),
}


def defects_of(category: str) -> tuple[str, ...]:
    """Return the defects that ``category`` is shown with, in alphabetical order."""
    return tuple(sorted({*CATEGORIES[category].faults, *CATEGORIES[category].defects}))


def render(
    category: str, split: str, kind: str, index: int, *, twin: bool = False
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Render one picture. It depends on the arguments only, and on no other picture.

    Args:
        category: One of :data:`CATEGORIES`.
        split: ``train`` or ``test``.
        kind: ``good`` or a defect of the category.
        index: Number of the picture; defects grow stronger with it.
        twin: Leave the defect out and everything else, down to the noise of the sensor, as it is.

    Returns:
        RGB ``(256, 256, 3)`` in [0, 255] and the defect mask ``(256, 256)``.
    """

    def stream(purpose: str) -> np.random.Generator:
        key = f"{VERSION}/{category}/{split}/{kind}/{index}/{purpose}"
        return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big"))

    recipe = CATEGORIES[category]
    light = place_light(stream("light"))
    strength = 0.15 + 0.85 * (index + 1) / NUM_PER_DEFECT if index < NUM_PER_DEFECT else 1.0
    broken = kind != GOOD and not twin
    fault = parts.Fault(kind, strength, stream("defect")) if broken and kind in recipe.faults else None
    surface, coverage = recipe.build(stream("part"), light, fault)
    if broken and fault is None:
        coverage = recipe.defects[kind](surface, stream("defect"), strength)
    image = photograph(shade(surface, light), light, stream("sensor"))
    mask = np.zeros(image.shape[:2], dtype=np.bool_) if coverage is None else shrink(coverage) >= 0.25
    return image, mask


def render_category(category: str, folder: Path) -> None:
    """Render all pictures of a category into ``folder``, in the layout of MVTec AD."""

    def save(pixels: npt.NDArray[np.uint8], *path: str) -> None:
        target = folder.joinpath(*path)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target, compress_level=6)

    for split, count in (("train", NUM_TRAIN), ("test", NUM_GOOD)):
        for index in range(count):
            save(render(category, split, GOOD, index)[0], split, GOOD, f"{index:03}.png")
    for kind in defects_of(category):
        for index in range(NUM_PER_DEFECT):
            image, mask = render(category, "test", kind, index)
            save(image, "test", kind, f"{index:03}.png")
            save(mask.astype(np.uint8) * np.uint8(255), "ground_truth", kind, f"{index:03}_mask.png")
    (folder / _MARKER).write_text(json.dumps({"version": VERSION, "category": category}) + "\n", encoding="utf-8")


def default_root() -> Path:
    """Return the cache folder of the data set, under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME")
    base = Path(cache) if cache else Path.home() / ".cache"
    return base / "anomalib_vtfusion" / "demo_parts" / f"v{VERSION}"


def ensure_rendered(root: Path, category: str) -> Path:
    """Render ``category`` below ``root`` unless it is there, and return its folder.

    Pictures are rendered aside and moved into place at once, so that a folder is complete or absent, whatever is
    interrupted and however many processes start together.

    Raises:
        FileExistsError: If the folder holds something else, or pictures of another version.
    """
    folder = root / category
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{category}-", dir=root))
        try:
            render_category(category, aside)
            aside.chmod(0o755)
            aside.rename(folder)
        except OSError:
            # Another process may have been faster; its pictures are the same.
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    marker = folder / _MARKER
    if not marker.is_file() or json.loads(marker.read_text(encoding="utf-8")).get("version") != VERSION:
        raise FileExistsError(
            f"{folder} was not rendered by this version of DemoParts. Give another root, or delete the folder."
        )
    return folder


class DemoParts(AnomalibDataModule):
    """Photograph-like pictures of parts with defects and exact masks, rendered on first use.

    Five categories, objects and textures: ``connector``, ``fabric``, ``plate``, ``tile``, ``washer``. Each has
    16 normal training images, 10 normal test images and 5 test images of each of four defects, from hard to see to
    plain, all RGB of 256 x 256 in the layout of MVTec AD.

    Args:
        root: Folder to render into and read from. Defaults to ``anomalib_vtfusion/demo_parts/v1`` in the user's cache
            folder.
        category: The kind of part.
        train_batch_size: Batch size in training.
        eval_batch_size: Batch size in validation, test and prediction.
        num_workers: Worker processes for loading; 0 loads in the main process, which is faster for so few images.
        train_augmentations: Augmentations of the training images.
        val_augmentations: Augmentations of the validation images.
        test_augmentations: Augmentations of the test images.
        augmentations: Augmentations for every subset that has none of its own.
        test_split_mode: How the test set is made.
        test_split_ratio: Fraction of the training images to test on, where the split mode takes some.
        val_split_mode: How the validation set is made. ``none`` by default, so that nothing is tuned on test images.
        val_split_ratio: Fraction of images to validate on, where the split mode takes some.
        seed: Seed of random splits.

    Raises:
        ValueError: If the category is unknown.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        category: str = "washer",
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        test_split_ratio: float = 0.2,
        val_split_mode: ValSplitMode | str = ValSplitMode.NONE,
        val_split_ratio: float = 0.5,
        seed: int | None = 0,
    ) -> None:
        if category not in CATEGORIES:
            raise ValueError(f"There is no demo category {category!r}; there are {', '.join(sorted(CATEGORIES))}.")
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = Path(root) if root is not None else default_root()
        self.category = category

    def prepare_data(self) -> None:
        """Render the category, unless it has been rendered before."""
        ensure_rendered(self.root, self.category)

    def _setup(self, _stage: str | None = None) -> None:
        # Lightning calls prepare_data() first, a user in a notebook may not.
        self.prepare_data()
        self.train_data = MVTecADDataset(root=self.root, category=self.category, split=Split.TRAIN)
        self.test_data = MVTecADDataset(root=self.root, category=self.category, split=Split.TEST)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Return the loader of the validation images, or no loader where the split mode leaves none."""
        return super().val_dataloader() if hasattr(self, "val_data") else []
