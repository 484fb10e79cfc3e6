"""What a sweep runs: models, data sets, shots and seeds, checked before anything is started."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
T = TypeVar("T")
# Data modules that read ``root/category``, so that a wrong folder shows before the first cell.
CATEGORY_FOLDERS = ("MVTecAD", "MVTecAD2", "Visa")


@dataclass
class ModelEntry:
    """A row of the comparison.

    Attributes:
        class_path: Class of an Anomalib model: a name of ``anomalib.models`` or a dotted path.
        init_args: Its arguments. ``class_name``, ``k_shot`` and ``seed`` are filled in where the class takes them.
        image_size: Side in pixels that images are resized to; None for the model's own.
        trainer: Arguments of the trainer, such as ``max_steps``.
        k: Shots that this model runs with instead of the sweep's; ``[0]`` for a zero-shot model.
        cpus: Processor cores that a cell needs, for an executor that places cells.
        gpus: Graphics cards that a cell needs; a fraction lets several cells share one.
    """

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    k: list[int] | None = None
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass
class DatasetEntry:
    """A data set of the comparison.

    Attributes:
        class_path: Class of an Anomalib image datamodule: a name of ``anomalib.data`` or a dotted path.
        categories: Categories to run.
        init_args: Further arguments, in which ``{category}`` stands for the category. A ``category`` argument is filled
            in where the class takes one; ``root`` lies in the sweep's, if that has one.
        class_names: What text prompts call a category, where its folder's name does not say it.
    """

    class_path: str
    categories: list[str]
    init_args: dict[str, Any] = field(default_factory=dict)
    class_names: dict[str, str] = field(default_factory=dict)


@dataclass
class SweepConfig:
    """Everything that decides which cells there are and what they compute.

    Attributes:
        name: Name of the sweep and of its folder of results.
        models: Models by the name that tables show.
        datasets: Data sets by the name that tables show.
        k: Numbers of reference images.
        seeds: Seeds of the choice of references and of everything random in a model.
        root: Folder of the data: the root of each data set, or where its own relative one lies.
        pictures: How many test images of a category to keep small heat maps of, for the first seed and the most shots;
            0 keeps none, and with them no picture of the data.
    """

    name: str
    models: dict[str, ModelEntry]
    datasets: dict[str, DatasetEntry]
    k: list[int]
    seeds: list[int]
    root: str | None = None
    pictures: int = 0

    def __post_init__(self) -> None:
        """Check everything that can be checked without importing a model.

        Raises:
            ValueError: If a value makes no sense; the message names all that do not.
        """
        problems = [*self._name_problems(), *_shot_problems("k", self.k, 1), *_seed_problems(self.seeds)]
        for name, model in self.models.items():
            if model.k is not None:
                problems += _shot_problems(f"k of model {name}", model.k, 0)
            if model.gpus < 0 or model.cpus < 0:
                problems.append(f"cpus and gpus of model {name} must not be negative.")
        for name, dataset in self.datasets.items():
            problems += self._dataset_problems(name, dataset)
        if self.pictures < 0:
            problems.append(f"pictures must not be negative, got {self.pictures}.")
        if problems:
            raise ValueError("\n".join(["The sweep cannot run:", *(f"- {problem}" for problem in problems)]))

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> SweepConfig:
        """Read a sweep from a YAML file.

        Args:
            path: The file.
            **changes: Values to use instead of the file's; None leaves the file's.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it does not describe a sweep.
        """
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} does not hold the settings of a sweep.")  # noqa: TRY004 - about a file
        content = {**content, **{name: value for name, value in changes.items() if value is not None}}
        entries = {"models": ModelEntry, "datasets": DatasetEntry}
        for section, kind in entries.items():
            if not isinstance(content.get(section, {}), Mapping):
                raise ValueError(f"{section} must be a mapping of names to settings.")  # noqa: TRY004 - about a file
            content[section] = {
                str(name): _make(kind, entry, f"{section}.{name}") for name, entry in content.get(section, {}).items()
            }
        return _make(cls, content, "The sweep")

    def data_arguments(self, name: str, category: str) -> dict[str, Any]:
        """Arguments of the datamodule of ``category`` in data set ``name``."""
        given = self.datasets[name].init_args
        arguments = {k: v.replace("{category}", category) if isinstance(v, str) else v for k, v in given.items()}
        if self.root is not None:
            arguments["root"] = str(Path(self.root) / arguments.get("root", ""))
        return {**arguments, "category": category}

    def _name_problems(self) -> list[str]:
        names = [("name", self.name), *(("model", m) for m in self.models), *(("data set", d) for d in self.datasets)]
        problems = [
            f"{kind} {name!r} is used as a file name: use letters, digits and . _ + - only, no other sign first."
            for kind, name in names
            if not NAME.fullmatch(name)
        ]
        problems += [f"There are no {kind}." for kind in ("models", "datasets") if not getattr(self, kind)]
        return problems

    def _dataset_problems(self, name: str, dataset: DatasetEntry) -> list[str]:
        if not dataset.categories:
            return [f"Data set {name} has no categories."]
        problems = [f"Category {category!r} of {name} is listed twice." for category in _repeated(dataset.categories)]
        unknown = sorted(set(dataset.class_names) - set(dataset.categories))
        if unknown:
            problems.append(f"class_names of {name} names categories that are not run: {', '.join(unknown)}.")
        reads_folders = dataset.class_path.rpartition(".")[2] in CATEGORY_FOLDERS
        roots = {category: self.data_arguments(name, category).get("root") for category in dataset.categories}
        if None in roots.values():
            return [*problems, f"Where is {name}? Give its folder with --root."] if reads_folders else problems
        missing = sorted({str(root) for root in roots.values() if not Path(str(root)).is_dir()})
        if missing:
            return problems + [f"The folder of {name} does not exist: {root}" for root in missing]
        if reads_folders:
            lacking = [category for category, root in roots.items() if not _has_category(Path(str(root)), category)]
            problems += [f"{name} has no folder {Path(str(roots[category])) / category}." for category in lacking]
        return problems


def _make(kind: type[T], content: Any, where: str) -> T:
    """Build a dataclass from a mapping.

    Raises:
        ValueError: If keys are missing or unknown, or a value has another type than the default of its field.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping of settings, got {content!r}.")  # noqa: TRY004 - about a file
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    needed = {n for n, item in known.items() if item.default is MISSING and item.default_factory is MISSING}
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"{where} has unknown settings: {', '.join(unknown)}; there are {', '.join(known)}.")
    if missing := sorted(needed - set(content)):
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    for name in ("k", "seeds", "categories"):
        value = content.get(name)
        kinds = str if name == "categories" else int
        listed = isinstance(value, list) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)
        if name in content and value is not None and not listed:
            raise ValueError(f"{where}: {name} must be a list of {kinds.__name__}, got {value!r}.")
    return kind(**content)


def _shot_problems(what: str, shots: Sequence[int], least: int) -> list[str]:
    if not shots:
        return [f"{what} is empty."]
    problems = [f"{what} must be at least {least}, got {k}." for k in shots if k < least]
    return problems + [f"{what} lists {k} twice." for k in _repeated(shots)]


def _seed_problems(seeds: Sequence[int]) -> list[str]:
    if not seeds:
        return ["seeds is empty."]
    problems = [f"A seed must not be negative, got {seed}." for seed in seeds if seed < 0]
    return problems + [f"seeds lists {seed} twice." for seed in _repeated(seeds)]


def _repeated(values: Sequence[Any]) -> list[Any]:
    return sorted({value for value in values if list(values).count(value) > 1})


def _has_category(root: Path, category: str) -> bool:
    """Whether a data set lies there; Anomalib arranges VisA anew in a folder of its own."""
    return any((folder / category).is_dir() for folder in (root, root / "visa_pytorch"))
