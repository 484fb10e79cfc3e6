"""Builds the model and the datamodule of a cell from their entries."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule

from anomalib_vtfusion.data.few_shot import FewShot
from anomalib_vtfusion.prompting import clean_class_name

# Whose errors mean that weights could not be fetched, beside OSError.
NETWORK_PACKAGES = ("httpx", "httpcore", "huggingface_hub", "requests", "urllib3")


class UnavailableError(RuntimeError):
    """A model's weights cannot be had here."""


def find_model(class_path: str) -> type[AnomalibModule]:
    """Return a model class.

    Args:
        class_path: A name of ``anomalib.models`` or a dotted path.

    Raises:
        ValueError: If there is no such class, or it is no Anomalib model.
    """
    found = _find(class_path, "anomalib.models", "model")
    if not (inspect.isclass(found) and issubclass(found, AnomalibModule)):
        raise ValueError(f"{class_path!r} is not an Anomalib model.")
    return found


def find_data(class_path: str) -> type[AnomalibDataModule]:
    """Return a datamodule class.

    Args:
        class_path: A name of ``anomalib.data`` or a dotted path.

    Raises:
        ValueError: If there is no such class, or it is no Anomalib datamodule.
    """
    found = _find(class_path, "anomalib.data", "datamodule")
    if not (inspect.isclass(found) and issubclass(found, AnomalibDataModule)):
        raise ValueError(f"{class_path!r} is not an Anomalib datamodule.")
    return found


def takes(kind: type, argument: str) -> bool:
    """Whether a datamodule class takes an argument; every one may be given a category, which not all know."""
    return argument != "category" or argument in inspect.signature(kind).parameters


def arguments_of(kind: type) -> list[str]:
    """Names of the arguments of a class, and of its parents' as far as they are passed on."""
    names: list[str] = []
    for parent in kind.__mro__:
        if "__init__" in vars(parent):
            parameters = list(inspect.signature(parent.__init__).parameters.values())[1:]  # type: ignore[misc]
            names += [p.name for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return list(dict.fromkeys(names))


def model_arguments(entry: dict[str, Any], cell: dict[str, Any], class_name: str) -> dict[str, Any]:
    """Arguments of a cell's model: those of its entry, and what the cell decides where the class takes it.

    Raises:
        ValueError: If the class does not take one of the entry's arguments.
    """
    model = find_model(entry["class_path"])
    taken = arguments_of(model)
    unknown = sorted(set(entry["init_args"]) - set(taken))
    if unknown:
        raise ValueError(f"{entry['class_path']} does not take {', '.join(unknown)}; it takes {', '.join(taken)}.")
    decided = {"class_name": class_name, "k_shot": cell["k"], "seed": cell["seed"]}
    arguments = {name: value for name, value in decided.items() if name in taken}
    size = entry["image_size"]
    if size is not None and "image_size" in taken:
        arguments["image_size"] = size
    elif size is not None:
        arguments["pre_processor"] = model.configure_pre_processor((size, size))
    # Scores are taken before Anomalib's evaluator, and pictures are not drawn.
    return {**arguments, **entry["init_args"], "evaluator": False, "visualizer": False}


def build_model(entry: dict[str, Any], cell: dict[str, Any], class_name: str) -> AnomalibModule:
    """Build a cell's model.

    Raises:
        UnavailableError: If its weights are missing and cannot be downloaded.
        ValueError: If an argument is wrong.
    """
    arguments = model_arguments(entry, cell, class_name)
    try:
        return find_model(entry["class_path"])(**arguments)
    except Exception as error:
        if not _could_not_fetch(error):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnavailableError(f"Its weights cannot be had: {reason}") from error


def build_data(entry: dict[str, Any], cell: dict[str, Any]) -> FewShot:
    """Build a cell's datamodule: k references (one for a zero-shot model, which is not shown it)."""
    found = find_data(entry["class_path"])
    data = found(**{name: value for name, value in entry["init_args"].items() if takes(found, name)})
    return FewShot(data=data, k_shot=max(1, cell["k"]), seed=cell["seed"])


def class_name_of(entry: dict[str, Any], datamodule: AnomalibDataModule) -> str:
    """What prompts call the category."""
    return entry["class_name"] or clean_class_name(entry["init_args"]["category"] or datamodule.name)


def _find(class_path: str, package: str, kind: str) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module or package), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"There is no {kind} class {class_path!r}: {error}") from error


def _could_not_fetch(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in NETWORK_PACKAGES:
            return True
        error = error.__cause__ or error.__context__
    return False
