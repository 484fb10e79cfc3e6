"""A k-shot view of any Anomalib image datamodule.

No Anomalib datamodule can keep only k normal images, and results of two methods can be compared only when both saw the
same k. :func:`select_references` is therefore a pure function of the file names, k and a seed, and :class:`FewShot`
applies it to whatever datamodule it is given and writes down what it chose.
"""

import copy
import hashlib
import importlib
import itertools
import json
import operator
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.datamodules.base.video import AnomalibVideoDataModule
from anomalib.data.utils import LabelName
from jsonargparse import Namespace
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from omegaconf import DictConfig, OmegaConf

MANIFEST_NAME = "few_shot.json"
"""File that :class:`FewShot` writes into the results folder of a run."""

# Splits drawn by an unseeded datamodule differ from run to run, and with them the images to choose from.
_SPLIT_SEED = 0
_SUBSETS = ("train_data", "val_data", "test_data")


def relative_paths(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Write paths relative to the deepest folder that holds all of them.

    The result is the same wherever the data set lies and whichever datamodule reads it: ``MVTecAD`` and ``Folder`` on
    one set of images give the same names. Separators become ``/`` and Unicode is composed (NFC), because file systems
    differ in both.

    Args:
        paths: Paths of files, absolute or relative, all of the same kind.

    Returns:
        One relative posix path for each of ``paths``, in their order.
    """
    parts = [unicodedata.normalize("NFC", os.fspath(path)).replace("\\", "/").split("/") for path in paths]
    levels = zip(*(part[:-1] for part in parts), strict=False)
    depth = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
    return ["/".join(part[depth:]) for part in parts]


def select_references(paths: Sequence[str | os.PathLike[str]], k: int, seed: int) -> list[int]:
    """Choose k of the given images, the same k in every place, for every model and with every library version.

    Images are ranked by the SHA-256 of ``"{seed}:{relative path}"`` and the first k are taken. No random number
    generator is involved, the order of ``paths`` and the place of the data set do not matter, and for one seed the
    references of a small k are among those of every larger k.

    Args:
        paths: Paths of the normal training images; only what follows their common folder counts.
        k: How many to choose, from 1 to ``len(paths)``.
        seed: Chooses among the possible sets of references.

    Returns:
        Ascending indices into ``paths``, k of them.

    Raises:
        TypeError: If ``k`` or ``seed`` is not an integer.
        ValueError: If there are no images, fewer than ``k``, ``k`` is below 1, or a path is listed twice.
    """
    k, seed = operator.index(k), operator.index(seed)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    names = relative_paths(paths)
    if not names:
        raise ValueError("There are no normal images to choose references from.")
    if k > len(names):
        raise ValueError(f"{k} reference images were asked for, but there are only {len(names)} normal images.")
    if len(set(names)) != len(names):
        raise ValueError("A path is listed more than once; every image may be listed only once.")
    ranked = sorted(range(len(names)), key=lambda index: hashlib.sha256(f"{seed}:{names[index]}".encode()).digest())
    return sorted(ranked[:k])


def build_datamodule(data: AnomalibDataModule | Mapping[str, Any] | Namespace | str) -> AnomalibDataModule:
    """Build a datamodule from the configuration form that Anomalib uses.

    Args:
        data: A datamodule (returned as it is), the name of one, or a mapping with ``class_path`` and ``init_args``.
            The name is an attribute of :mod:`anomalib.data` or a dotted path to a class.

    Returns:
        The datamodule.

    Raises:
        TypeError: If ``data`` is none of these, or names something that is not an image datamodule.
        ValueError: If a mapping has no ``class_path``, or the class is unknown.
    """
    if isinstance(data, str):
        data = {"class_path": data}
    elif isinstance(data, Namespace):
        data = data.as_dict()
    elif isinstance(data, DictConfig):
        data = cast("dict[str, Any]", OmegaConf.to_container(data, resolve=True))
    if isinstance(data, Mapping):
        if "class_path" not in data:
            raise ValueError(f"The wrapped datamodule needs a 'class_path', got the keys {sorted(map(str, data))}.")
        data = _find_class(str(data["class_path"]))(**(data.get("init_args") or {}))
    if isinstance(data, AnomalibVideoDataModule) or not isinstance(data, AnomalibDataModule):
        raise TypeError(f"data must be an Anomalib image datamodule or its configuration, got {type(data).__name__}.")
    return data


def _find_class(class_path: str) -> Callable[..., Any]:
    """Return the class with a bare name from :mod:`anomalib.data`, as Anomalib does, or with a dotted path."""
    module_name, _, class_name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name or "anomalib.data"), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"There is no datamodule {class_path!r}; expected a name from anomalib.data or a dotted path to a class."
        ) from error
    if not callable(found):
        raise TypeError(f"{class_path!r} is not a datamodule class.")
    return found


class FewShot(AnomalibDataModule):
    """Any Anomalib image datamodule, with only k normal training images.

    Validation, test and prediction data, the name and category (and so the results folder), batch sizes, workers and
    augmentations are those of the wrapped datamodule, which is itself left as it was. Public attributes that are not
    found here (``root``, for one) are looked up there.

    References are chosen from the training data that is left once the wrapped datamodule has made its own validation
    and test splits. A wrapped datamodule that has no seed makes them with seed 0, or the images to choose from would
    change from run to run.

    What was chosen is in :attr:`manifest`, and in ``few_shot.json`` in the results folder once a trainer is attached.

    Args:
        data: The datamodule to take k images from, or its configuration: ``class_path`` and ``init_args``.
        k_shot: How many normal training images to keep.
        seed: Chooses the references, and nothing else.
        manifest_dir: A folder to write the manifest to as well, named after data set, category, k and seed. Meant
            for runs whose results folder is thrown away, such as those of ``anomalib benchmark``.

    Raises:
        TypeError: If ``data`` is not an image datamodule.
        ValueError: If ``k_shot`` is below 1, or ``data`` names an unknown class. :meth:`setup` raises it where fewer
            than ``k_shot`` normal images are found.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> FewShot(data=MVTecAD(category="grid"), k_shot=2).name
        'MVTecAD'
    """

    def __init__(
        self,
        data: AnomalibDataModule,
        k_shot: int,
        seed: int = 0,
        manifest_dir: str | Path | None = None,
    ) -> None:
        self.data = build_datamodule(data)
        if operator.index(k_shot) < 1:
            raise ValueError(f"k_shot must be at least 1, got {k_shot}.")
        super().__init__(
            train_batch_size=self.data.train_batch_size,
            eval_batch_size=self.data.eval_batch_size,
            num_workers=self.data.num_workers,
            train_augmentations=self.data.train_augmentations,
            val_augmentations=self.data.val_augmentations,
            test_augmentations=self.data.test_augmentations,
            val_split_mode=self.data.val_split_mode,
            val_split_ratio=self.data.val_split_ratio,
            test_split_mode=self.data.test_split_mode,
            test_split_ratio=self.data.test_split_ratio,
            seed=operator.index(seed),
        )
        self.k_shot = operator.index(k_shot)
        self.manifest_dir = Path(manifest_dir) if manifest_dir is not None else None
        self.external_collate_fn = self.data.external_collate_fn
        self._source: AnomalibDataModule | None = None
        self._manifest: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        """Look up what is not defined here on the wrapped datamodule."""
        data = self.__dict__.get("data")
        # Before setup() the subsets of the wrapped datamodule must not pass for ours.
        if data is None or name.startswith("_") or name in _SUBSETS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(data, name)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the wrapped datamodule, so that results lie where they would without ``FewShot``."""
        return self.data.name

    @property
    def category(self) -> str:
        """Category of the wrapped datamodule."""
        return self.data.category

    @category.setter
    def category(self, category: str) -> None:
        self.data.category = category

    @property
    def manifest(self) -> dict[str, Any]:
        """What was chosen from what: plain types, ready for JSON.

        ``dataset``, ``category``, ``k_shot``, ``seed``, ``available`` (how many normal images there were), ``folder``
        (the deepest folder that holds them) and ``references``, each with its ``path`` under ``folder`` and ``sha256``.

        Raises:
            RuntimeError: Before :meth:`setup`.
        """
        if self._manifest is None:
            raise RuntimeError("The references are chosen by setup(); call it before reading the manifest.")
        return self._manifest

    def prepare_data(self) -> None:
        """Let the wrapped datamodule download or render its data."""
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Choose the references, once, and write the manifest where the run keeps its results.

        Args:
            stage: Stage of the trainer: fit, validate, test or predict.

        Raises:
            ValueError: If there are fewer normal training images than ``k_shot``.
        """
        if not self._is_setup:
            self._setup(stage)
            self._is_setup = True
        self._update_augmentations()
        self._write_manifests(stage)

    def _setup(self, _stage: str | None = None) -> None:
        # A shallow copy takes the attributes that its setup() sets, so the wrapped datamodule stays as it was.
        source = copy.copy(self.data)
        if hasattr(source, "train_data"):
            for subset in {"val_data", "test_data"} & vars(source).keys():
                setattr(source, subset, _copy_dataset(getattr(source, subset)))
        else:
            source.seed = _SPLIT_SEED if source.seed is None else source.seed
            source.setup(_stage)
        self._source = source

        images = source.train_data.samples
        labels = images.get("label_index", [LabelName.NORMAL] * len(images))
        normal = [i for i, label in enumerate(labels) if label == LabelName.NORMAL]
        paths = [str(path) for path in images["image_path"].iloc[normal]]
        try:
            chosen = select_references(paths, self.k_shot, self.seed or 0)
        except ValueError as error:
            raise ValueError(f"Cannot choose references from {self._title()}: {error}") from error

        self.train_data = source.train_data.subsample([normal[i] for i in chosen])
        self.test_data = source.test_data
        if hasattr(source, "val_data"):
            self.val_data = source.val_data
        self._manifest = self._describe(paths, chosen)

    def _describe(self, paths: list[str], chosen: list[int]) -> dict[str, Any]:
        """Return the manifest for the references ``chosen`` among the normal images ``paths``."""
        names = relative_paths(paths)
        folder = Path(paths[0]).parents[names[0].count("/")]
        return {
            "dataset": self.name,
            "category": self.category,
            "k_shot": self.k_shot,
            "seed": self.seed,
            "available": len(paths),
            "folder": folder.as_posix(),
            "references": [
                {"path": names[i], "sha256": hashlib.sha256(Path(paths[i]).read_bytes()).hexdigest()} for i in chosen
            ],
        }

    def _title(self) -> str:
        return f"{self.name}/{self.category}" if self.category else self.name

    def _write_manifests(self, stage: str | None) -> None:
        """Write the manifest into the results folder of the trainer, if there is one, and into ``manifest_dir``."""
        trainer = self.trainer
        if trainer is not None and not trainer.is_global_zero:
            return
        if trainer is not None:
            path = Path(trainer.default_root_dir) / MANIFEST_NAME
            # A later test or predict run may share the folder with the fit that the manifest is about.
            if stage == TrainerFn.FITTING or not path.exists():
                _write_json(path, self.manifest)
        if self.manifest_dir is not None:
            parts = (self.name, self.category, f"k{self.k_shot}", f"seed{self.seed}")
            name = "_".join(part.replace("/", "-") for part in parts if part)
            _write_json(self.manifest_dir / f"{name}.json", self.manifest)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Return the loader of the validation images, or no loader where the split mode leaves none."""
        return super().val_dataloader() if hasattr(self, "val_data") else []

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Return the loader of the test images; a wrapped datamodule with its own way of making it keeps that."""
        own = type(self.data).test_dataloader is not AnomalibDataModule.test_dataloader
        return self._source.test_dataloader() if own and self._source is not None else super().test_dataloader()


def _copy_dataset(dataset: AnomalibDataset) -> AnomalibDataset:
    """Copy a dataset; the original stays responsible for temporary files, as synthetic validation sets have them."""
    owner = getattr(dataset, "_cleanup", None)
    copied = copy.deepcopy(dataset)
    if owner is not None:
        dataset._cleanup, copied._cleanup = owner, False  # type: ignore[attr-defined]
    return copied


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` so that a reader finds the whole file or none, also when several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
