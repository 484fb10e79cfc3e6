"""A cell of a sweep: one model on one category with k references and a seed, and the files that tell its state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.few_shot.config import SweepConfig
from benchmarks.provenance import ROOT

SHIPPED, LOCAL_PREFIX = "vtfusion-tiny", "local-dir:"


class State(Enum):
    """What the files of a cell say about it."""

    NEW = "new"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"
    CHANGED = "changed"


@dataclass(frozen=True)
class Cell:
    """One model on one category with k references and a seed."""

    dataset: str
    category: str
    model: str
    k: int
    seed: int

    @property
    def id(self) -> str:
        """Readable name, unique in its sweep; also the path of its files, without suffix."""
        return f"{self.dataset}/{self.category}/{self.model}/k{self.k}_seed{self.seed}"


@dataclass(frozen=True)
class CellFiles:
    """Where the files of a cell lie.

    Attributes:
        result: Written once the cell has finished.
        error: Why it has not.
        skipped: Why it cannot be run here.
        maps: Small heat maps, where the sweep keeps any.
    """

    result: Path
    error: Path
    skipped: Path
    maps: Path

    @classmethod
    def of(cls, cell: Cell, folder: Path) -> CellFiles:
        """Files of ``cell`` in a sweep's ``folder``."""
        # The category may hold slashes; the rest are checked names.
        stem = folder / "cells" / cell.id
        return cls(*(stem.with_name(stem.name + end) for end in (".json", ".error.json", ".skipped.json", ".npz")))


def plan(config: SweepConfig) -> Iterator[Cell]:
    """Cells of a sweep, ordered so that one that is stopped early has compared all models on something.

    A zero-shot model (k = 0) sees no reference, so it runs with the first seed alone.
    """
    for seed in config.seeds:
        for dataset, entry in config.datasets.items():
            for category in entry.categories:
                for k in sorted({*config.k, *(k for model in config.models.values() for k in model.k or ())}):
                    for name, model in config.models.items():
                        if k in (config.k if model.k is None else model.k) and (k > 0 or seed == config.seeds[0]):
                            yield Cell(dataset, category, name, k, seed)


def task(config: SweepConfig, cell: Cell, folder: Path, accelerator: str = "auto") -> dict[str, Any]:
    """Everything that a process needs to run ``cell``, in plain types.

    Args:
        config: The sweep.
        cell: One of its cells.
        folder: The sweep's folder of results.
        accelerator: Lightning's name of the device kind.
    """
    files = CellFiles.of(cell, folder)
    dataset = config.datasets[cell.dataset]
    keep = config.pictures and cell.seed == config.seeds[0] and cell.k in {0, max(config.k)}
    content = {
        "cell": asdict(cell),
        "model": asdict(config.models[cell.model]),
        "data": {
            "class_path": dataset.class_path,
            "init_args": config.data_arguments(cell.dataset, cell.category),
            "class_name": dataset.class_names.get(cell.category),
        },
        "encoder_sha256": encoder_digest(config.models[cell.model].init_args.get("encoder")),
        "pictures": config.pictures if keep else 0,
    }
    return {
        **content,
        "fingerprint": fingerprint(content),
        "accelerator": accelerator,
        "files": {name: str(path.resolve()) for name, path in vars(files).items()},
        "views": str((folder / "views" / cell.dataset / f"{cell.category}.npz").resolve()),
    }


def fingerprint(content: dict[str, Any]) -> str:
    """Hash of what decides a cell's numbers: not where the data lies, nor how the cell is placed on a machine."""
    model = {key: value for key, value in content["model"].items() if key not in {"k", "cpus", "gpus"}}
    data = {**content["data"], "init_args": {k: v for k, v in content["data"]["init_args"].items() if k != "root"}}
    text = json.dumps([content["cell"], model, data, content["encoder_sha256"]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encoder_digest(encoder: Any) -> str | None:
    """SHA-256 of the weights of an encoder that lies in a folder, or None; a new version of it is another encoder."""
    if encoder == SHIPPED:
        return _digest(ROOT / "anomalib_vtfusion" / "weights" / SHIPPED)
    is_folder = isinstance(encoder, str) and encoder.startswith(LOCAL_PREFIX)
    return _digest(Path(encoder.removeprefix(LOCAL_PREFIX)).expanduser()) if is_folder else None


@lru_cache
def _digest(folder: Path) -> str | None:
    weights = sorted(folder.glob("open_clip_model*.safetensors"))
    return hashlib.sha256(weights[0].read_bytes()).hexdigest() if weights else None


def state(cell_task: dict[str, Any]) -> State:
    """What the files say about a cell; a result that another configuration made counts as ``CHANGED``."""
    files = {name: Path(path) for name, path in cell_task["files"].items()}
    if files["result"].exists():
        try:
            made_by = json.loads(files["result"].read_text(encoding="utf-8")).get("fingerprint")
        except ValueError:
            return State.CHANGED
        return State.DONE if made_by == cell_task["fingerprint"] else State.CHANGED
    if files["error"].exists():
        return State.FAILED
    return State.SKIPPED if files["skipped"].exists() else State.NEW
