"""Datamodules: a k-shot view of any Anomalib datamodule, and a small rendered data set to try things on.

Names are loaded on first use, because importing a datamodule imports Anomalib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomalib_vtfusion.data.demo import DemoParts
    from anomalib_vtfusion.data.few_shot import FewShot, select_references

_MODULES = {"DemoParts": "demo", "FewShot": "few_shot", "select_references": "few_shot"}

__all__ = ["DemoParts", "FewShot", "select_references"]


def __getattr__(name: str) -> Any:
    """Import the module that holds ``name``."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
