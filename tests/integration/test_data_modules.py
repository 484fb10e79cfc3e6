"""VTFusion with the datamodules that people have: which images it takes, and when it says that they are test images."""

import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback


def test_folder_without_masks(fitted, make_model, make_engine, folder_datamodule):
    datamodule, engine = folder_datamodule(abnormal_dir="test/square", normal_test_dir="test/good"), make_engine()
    metrics = engine.test(fitted(make_model(), engine, datamodule), datamodule=datamodule)[0]
    assert set(metrics) == {"image_AUROC", "image_AUPR", "image_F1Score"}
    assert metrics["image_AUROC"] == 1.0


def test_folder_with_masks(fitted, make_model, make_engine, folder_datamodule):
    datamodule, engine = (
        folder_datamodule(abnormal_dir="test/square", normal_test_dir="test/good", mask_dir="ground_truth/square"),
        make_engine(),
    )
    metrics = engine.test(fitted(make_model(), engine, datamodule), datamodule=datamodule)[0]
    assert metrics["pixel_AUROC"] > 0.8


@pytest.mark.parametrize("split", ["none", "from_test", "from_train", "synthetic", "same_as_test"])
def test_folder_without_any_abnormal_image(fitted, make_model, make_engine, folder_datamodule, split):
    datamodule = folder_datamodule(normal_test_dir="test/good", val_split_mode=split, seed=0)
    model = fitted(make_model(k_shot=1, num_steps=2), make_engine(), datamodule)
    threshold = float(model.post_processor.image_threshold)
    assert 0 < threshold < 1
    if split != "synthetic":  # which has anomalies of its own
        alone = fitted(make_model(k_shot=1, num_steps=2), make_engine(), only_references(model, folder_datamodule))
        assert threshold == pytest.approx(float(alone.post_processor.image_threshold))
    assert make_engine().predict(model, datamodule=datamodule)


def only_references(model, folder_datamodule):
    """A datamodule without validation that is left with the same reference."""
    datamodule = folder_datamodule(normal_test_dir="test/good")
    datamodule.setup("fit")
    keep = [str(path) in model._references.paths for path in datamodule.train_data.samples.image_path]
    datamodule.train_data = datamodule.train_data.subsample([i for i, kept in enumerate(keep) if kept])
    datamodule._is_setup = True
    return datamodule


def test_validation_on_test_images_is_warned_of(fitted, make_model, make_engine, parts_datamodule, caplog):
    engine = make_engine()
    with caplog.at_level(logging.WARNING):
        model = fitted(make_model(num_steps=1), engine, parts_datamodule(val_split_mode="same_as_test"))
    saved = torch.load(engine.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert saved["post_processor._image_threshold"] == model.post_processor.image_threshold
    assert "validates on test images (val_split_mode=same_as_test)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fitted(make_model(num_steps=1), make_engine(), parts_datamodule())
    assert "validates on test images" not in caplog.text


def test_no_test_image_is_read_during_fit(fitted, make_model, make_engine, parts_datamodule, monkeypatch):
    read = []
    from anomalib.data.datasets.base import image as dataset
    from PIL import Image

    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest: read.append(Path(path)) or original(path, *rest))
    assert dataset.read_image  # reads through PIL, as everything here does
    fitted(make_model(), make_engine(), parts_datamodule())
    assert read
    assert {path.parent.name for path in read} == {"good"}
    assert {path.parent.parent.name for path in read} == {"train"}


def test_references_from_a_folder(fitted, make_model, make_engine, parts_datamodule, parts):
    source = parts / "woven" / "test" / "good"
    datamodule = parts_datamodule()
    model = fitted(make_model(few_shot_source=str(source), k_shot=None), make_engine(), datamodule)
    assert sorted(Path(path) for path in model._references.paths) == sorted(source.glob("*.png"))
    assert model.model.reference_bank.references == 2
    assert len(datamodule.train_data) == 3


def test_all_normal_images_are_references_by_default(fitted, make_model, make_engine, parts_datamodule):
    model = fitted(make_model(k_shot=None, num_steps=0), make_engine(), parts_datamodule())
    assert len(model._references.paths) == 3


def test_vit_tower_and_non_square_images(make_model, make_engine, parts_datamodule, vit_encoder):
    datamodule, engine = parts_datamodule(), make_engine()
    model = make_model(encoder=vit_encoder, image_size=(64, 96))
    metrics = engine.train(model, datamodule=datamodule)[0]  # fit, then test of the checkpoint
    assert metrics["image_AUROC"] >= 0.5
    with torch.no_grad():
        output = model.model(next(iter(datamodule.test_dataloader())).image)
    assert output.anomaly_map.shape == (2, 1, 64, 96)


def test_class_name_comes_from_the_category(fitted, make_model, make_engine, parts_datamodule, caplog):
    with caplog.at_level(logging.INFO):
        fitted(make_model(num_steps=0), make_engine(), parts_datamodule())
    assert "2 references, prompts for 'woven'" in caplog.text


def test_an_interrupted_fit_gives_the_training_data_back(fitted, make_model, make_engine, parts_datamodule):
    class Interrupt(Callback):
        def on_train_batch_start(*args):
            raise RuntimeError("power cut")

    datamodule = parts_datamodule()
    with pytest.raises(RuntimeError, match="power cut"):
        fitted(make_model(), make_engine(callbacks=[Interrupt()]), datamodule)
    model = fitted(make_model(k_shot=3, num_steps=0), make_engine(), datamodule)
    assert len(model._references.paths) == 3
    assert len(datamodule.train_data) == 3
