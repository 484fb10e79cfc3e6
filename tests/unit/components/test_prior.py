"""The prior: what is written is what a new model starts from, and nothing of another encoder."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from anomalib_vtfusion.components.encoder_weights import PRIOR_NAME
from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.components.prior import load_prior, save_prior, trained_parameters
from anomalib_vtfusion.torch_model import Components, VTFusionModel


@pytest.fixture
def encoder(cnn_encoder: str) -> VisionTextEncoder:
    """Build the tiny random CNN towers."""
    return VisionTextEncoder(cnn_encoder)


@pytest.fixture
def written(encoder: VisionTextEncoder, tmp_path: Path) -> tuple[VTFusionModel, Path]:
    """Write a prior of a model whose parameters are all moved."""
    model = VTFusionModel(encoder, learnable_context=2, seed=1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.25)
    path = tmp_path / PRIOR_NAME
    save_prior(trained_parameters(model), path, encoder.weights_hash)
    return model, path


def test_a_new_model_starts_where_the_prior_left(
    encoder: VisionTextEncoder, written: tuple[VTFusionModel, Path]
) -> None:
    source, path = written
    model = VTFusionModel(encoder, learnable_context=2, seed=2)
    context = model.text_features.context.clone()
    taken = load_prior(model, path, encoder.weights_hash)
    assert {"image_adapter", "text_adapter", "fusion_block", "segmentation", "image_head", "text_scale"} <= set(taken)
    for name, value in trained_parameters(source).items():
        assert torch.equal(trained_parameters(model)[name], value.half().float()), name
    assert torch.equal(model.text_features.context, context)


def test_the_encoder_is_not_in_the_file(written: tuple[VTFusionModel, Path]) -> None:
    with safe_open(written[1], framework="pt") as file:
        names = set(file.keys())
        assert all(file.get_tensor(name).dtype == torch.float16 for name in names)
    assert not any(name.startswith(("encoder.", "text_features.")) for name in names)
    assert not list(written[1].parent.glob("*.part"))


def test_a_prior_of_other_weights_is_left_alone(
    encoder: VisionTextEncoder, written: tuple[VTFusionModel, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = VTFusionModel(encoder, seed=2)
    before = {name: value.clone() for name, value in trained_parameters(model).items()}
    assert load_prior(model, written[1], "0" * 64) == []
    assert all(torch.equal(before[name], value) for name, value in trained_parameters(model).items())
    assert "other encoder weights" in caplog.text


def test_a_part_that_a_switch_changes_keeps_its_own_weights(
    encoder: VisionTextEncoder, written: tuple[VTFusionModel, Path]
) -> None:
    model = VTFusionModel(encoder, Components(text_guidance=False), seed=2)
    before = {name: value.clone() for name, value in model.segmentation.named_parameters()}
    taken = load_prior(model, written[1], encoder.weights_hash)
    assert "segmentation" not in taken
    assert "fusion_block" in taken
    assert all(torch.equal(before[name], value) for name, value in model.segmentation.named_parameters())


def test_it_is_found_beside_the_weights(
    cnn_encoder: str, encoder: VisionTextEncoder, written: tuple[VTFusionModel, Path]
) -> None:
    source, path = written
    assert encoder.prior is None
    beside = Path(cnn_encoder.removeprefix("local-dir:")) / PRIOR_NAME
    beside.write_bytes(path.read_bytes())
    try:
        with_prior = VisionTextEncoder(cnn_encoder)
        model = VTFusionModel(with_prior, seed=2, prior=True)
        plain = VTFusionModel(with_prior, seed=2, prior=False)
    finally:
        beside.unlink()
    expected = trained_parameters(source)["text_bias"].half().float()
    assert torch.equal(model.text_bias, expected)
    assert not torch.equal(plain.text_bias, expected)
