"""The package's public names: all there, loaded only when they are used."""

import subprocess
import sys
from importlib import import_module

import pytest

import anomalib_vtfusion


def test_public_names_are_the_things_defined_in_their_modules() -> None:
    homes = {
        "AnomalySynthesizer": "synthesis.synthesizer",
        "DemoParts": "data.demo",
        "FewShot": "data.few_shot",
        "VTFusion": "lightning_model",
        "VTFusionModel": "torch_model",
        "build_prompts": "prompting",
    }
    assert {*anomalib_vtfusion.__all__} == {*homes, "__version__"}
    for name, home in homes.items():
        value = getattr(anomalib_vtfusion, name)
        assert value is getattr(import_module(f"anomalib_vtfusion.{home}"), name)
        assert value.__module__ == f"anomalib_vtfusion.{home}"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'anomalib_vtfusion' has no attribute 'nothing'"):
        _ = anomalib_vtfusion.nothing


def test_import_loads_nothing_but_names_are_listed() -> None:
    code = """
import sys, anomalib_vtfusion as package
print(set(package.__all__) <= set(dir(package)), [name for name in sys.modules if "torch" in name])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True []"
