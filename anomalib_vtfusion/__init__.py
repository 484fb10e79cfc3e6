"""VTFusion: vision-text fusion for few-shot industrial anomaly detection, as an Anomalib model.

This file runs at every interpreter start (the start-up file imports :mod:`anomalib_vtfusion.plugin`), so it imports
nothing. The public names are loaded on first use (PEP 562).
"""

__version__ = "0.1.0"

# Type checkers take a name called TYPE_CHECKING as true; importing it from ``typing`` would cost milliseconds here.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from anomalib_vtfusion.data.demo import DemoParts
    from anomalib_vtfusion.data.few_shot import FewShot
    from anomalib_vtfusion.lightning_model import VTFusion
    from anomalib_vtfusion.prompting import build_prompts
    from anomalib_vtfusion.synthesis.synthesizer import AnomalySynthesizer
    from anomalib_vtfusion.torch_model import VTFusionModel

__all__ = [
    "AnomalySynthesizer",
    "DemoParts",
    "FewShot",
    "VTFusion",
    "VTFusionModel",
    "build_prompts",
    "__version__",
]

_HOMES = {
    "AnomalySynthesizer": "synthesis.synthesizer",
    "DemoParts": "data.demo",
    "FewShot": "data.few_shot",
    "VTFusion": "lightning_model",
    "VTFusionModel": "torch_model",
    "build_prompts": "prompting",
}


def __getattr__(name: str) -> object:
    """Import the module that holds a public name and keep the name here."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> "list[str]":
    """List the public names before they are loaded, too."""
    return sorted({*globals(), *__all__})
