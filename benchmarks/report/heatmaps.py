"""Best and worst heat maps of every model, side by side on the same images."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.report.results import Sweep

SHOWN_SIDE = 112
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Strip:
    """One image with every model's map of it.

    Attributes:
        image: Name of the image.
        why: Whose best or worst map it has.
        pictures: PNG data addresses: the image, its mask, and the maps in order of the models.
        precision: How well each map finds the defect: pixel average precision in per cent, "" where there is no map.
    """

    image: str
    why: str
    pictures: list[str]
    precision: list[str]


@dataclass(frozen=True)
class Sheet:
    """The strips of one category."""

    title: str
    models: list[str]
    strips: list[Strip]


def sheets(sweep: Sweep) -> list[Sheet]:
    """Strips of every category that the sweep keeps pictures of.

    For each model the defective image with its best and its worst map is taken; all models are shown on all of them.
    """
    found = []
    for views in sorted((sweep.folder / "views").rglob("*.npz")):
        category = views.relative_to(sweep.folder / "views").with_suffix("").as_posix()
        dataset, _, name = category.partition("/")
        maps = _maps(sweep, dataset, name)
        if maps:
            found.append(_sheet(category, np.load(views), maps))
    return found


def average_precision(scores: Array, truth: Array) -> float:
    """Area under the precision-recall curve of scores and boolean truth of one shape, as a step function."""
    order = np.argsort(-scores.reshape(-1).astype(np.float64), kind="stable")
    hits = truth.reshape(-1)[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean()) if hits.any() else float("nan")


def _maps(sweep: Sweep, dataset: str, category: str) -> dict[str, dict[str, Array]]:
    """Maps of each model by image name, at the most shots kept."""
    maps: dict[str, dict[str, Array]] = {}
    for model in sweep.models():
        folder = sweep.folder / "cells" / dataset / category / model
        files = sorted(folder.glob("k*.npz"), key=lambda path: int(path.name[1:].partition("_")[0]))
        if files:
            kept = np.load(files[-1])
            maps[model] = {str(name): values for name, values in zip(kept["names"], kept["maps"], strict=True)}
    return maps


def _sheet(title: str, views: Any, maps: dict[str, dict[str, Array]]) -> Sheet:
    names = [str(name) for name in views["names"]]
    truth = dict(zip(names, views["masks"], strict=True))
    images = dict(zip(names, views["images"], strict=True))
    precision = {
        model: {name: average_precision(values, truth[name]) for name, values in of_model.items() if truth[name].any()}
        for model, of_model in maps.items()
    }
    reasons: dict[str, dict[str, list[str]]] = {}
    for model, values in precision.items():
        if values:
            for what, choose in (("best", max), ("worst", min)):
                image = choose(values, key=values.__getitem__)
                reasons.setdefault(image, {}).setdefault(what, []).append(model)
    # One scale for all maps of a model, so that its images can be compared with each other.
    scales = {
        model: np.percentile(np.stack(list(of_model.values())).astype(np.float32), (1, 99.5))
        for model, of_model in maps.items()
    }
    strips = []
    for name, why in reasons.items():
        pictures = [png(images[name]), png(np.repeat(truth[name][..., None], 3, axis=2).astype(np.uint8) * 255)]
        for model, of_model in maps.items():
            pictures.append(png(overlay(images[name], of_model[name], scales[model])) if name in of_model else "")
        figures = [f"{100 * precision[m][name]:.0f}" if name in precision[m] else "" for m in maps]
        strips.append(
            Strip(name, "; ".join(f"{what} of {', '.join(who)}" for what, who in why.items()), pictures, figures)
        )
    return Sheet(title, list(maps), strips)


def overlay(image: Array, values: Array, scale: Array) -> Array:
    """Heat map over the grey image: RGB ``(H, W, 3)`` in [0, 255].

    Args:
        image: RGB image ``(H, W, 3)`` in [0, 255].
        values: Anomaly map ``(H, W)``.
        scale: Values shown as cold and as hot.
    """
    heat = ((values.astype(np.float32) - scale[0]) / max(1e-12, scale[1] - scale[0])).clip(0, 1)
    colour = mpl.colormaps["turbo"](heat)[..., :3]
    grey = np.repeat(image.mean(axis=2, keepdims=True) / 255, 3, axis=2)
    return ((0.55 * colour + 0.45 * grey) * 255).round().astype(np.uint8)


def png(pixels: Array) -> str:
    """Data address of a PNG of RGB pixels ``(H, W, 3)``."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BILINEAR).save(
        buffer, "PNG", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def svg_address(path: Path) -> str:
    """Data address of an SVG file."""
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
