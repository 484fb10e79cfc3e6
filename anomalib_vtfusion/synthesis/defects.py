"""The defect families by name."""

from __future__ import annotations

from collections.abc import Callable

from anomalib_vtfusion.synthesis import altered, drawn, transplanted
from anomalib_vtfusion.synthesis.scene import Change, Scene

DEFECT_FUNCTIONS: dict[str, Callable[[Scene], Change]] = {
    "perlin": transplanted.perlin,
    "cutpaste": transplanted.cutpaste,
    "scar": transplanted.scar,
    "poisson": transplanted.poisson,
    "scratch": drawn.scratch,
    "crack": drawn.crack,
    "stain": drawn.stain,
    "hole": drawn.hole,
    "spot": drawn.spot,
    "blur": altered.blur,
    "intensity": altered.intensity,
    "colour": altered.colour,
    "dent": altered.dent,
    "missing": altered.missing,
}

FAMILIES: tuple[str, ...] = tuple(DEFECT_FUNCTIONS)
"""Names of all defect families."""
