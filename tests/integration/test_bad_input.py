"""Wrong arguments and wrong data: one clear error each, before any training step."""

import shutil

import numpy as np
import pytest
import torch
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_vtfusion import VTFusion


class TestArguments:
    """Found at construction; no data is needed."""

    @pytest.mark.parametrize("k_shot", [0, -3])
    def test_k_shot(self, k_shot):
        with pytest.raises(ValueError, match=f"k_shot must be at least 1, or None for all normal images; got {k_shot}"):
            VTFusion(k_shot=k_shot)

    def test_num_steps(self):
        with pytest.raises(ValueError, match="num_steps must not be negative"):
            VTFusion(num_steps=-1)

    def test_unknown_encoder(self):
        with pytest.raises(ValueError, match=r"Unknown encoder 'ViT-B-16-plus-204'.*did you mean ViT-B-16-plus-240"):
            VTFusion(encoder="ViT-B-16-plus-204")

    def test_encoder_folder_that_does_not_exist(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json does not exist.*vtfusion-tiny"):
            VTFusion(encoder=f"local-dir:{tmp_path / 'nowhere'}")

    def test_missing_weights(self, cnn_encoder, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors does not exist"):
            VTFusion(encoder=cnn_encoder, weights=str(tmp_path / "nowhere.safetensors"))

    def test_weights_of_another_model(self, cnn_encoder, vit_encoder):
        wrong = vit_encoder.removeprefix("local-dir:") + "/open_clip_model.safetensors"
        with pytest.raises(ValueError, match="does not hold weights of encoder"):
            VTFusion(encoder=cnn_encoder, weights=wrong)

    def test_weights_that_are_no_weights(self, cnn_encoder, tmp_path):
        (tmp_path / "wrong.safetensors").write_text("not weights")
        with pytest.raises(ValueError, match="does not hold weights of encoder"):
            VTFusion(encoder=cnn_encoder, weights=str(tmp_path / "wrong.safetensors"))

    def test_unknown_layer(self, cnn_encoder):
        with pytest.raises(ValueError, match="layers 0 to 4"):
            VTFusion(encoder=cnn_encoder, layers=[2, 7])

    def test_image_smaller_than_a_patch(self, cnn_encoder):
        with pytest.raises(ValueError, match="smaller than one patch"):
            VTFusion(encoder=cnn_encoder, image_size=16)

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ({"normal_prompts": []}, "normal_prompts is an empty list"),
            ({"normal_prompts": ["a {}", "A  {} "]}, "same phrase twice"),
            ({"anomaly_prompts": ["a broken {}", " "]}, "empty phrase"),
            ({"defects": ["a crack", "a crack"]}, "same phrase twice"),
            ({"normal_prompts": ["a {}"], "anomaly_prompts": ["a {}"]}, "both normal and anomalous"),
            ({"class_name": " "}, "class_name"),
        ],
    )
    def test_user_prompts(self, prompts, message):
        with pytest.raises(ValueError, match=message):
            VTFusion(**prompts)

    def test_anomaly_families(self):
        with pytest.raises(ValueError, match="unknown defect families"):
            VTFusion(anomaly_families=["scratches"])

    def test_texture_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            VTFusion(texture_source=str(tmp_path / "nowhere"))

    @pytest.mark.parametrize("bank_size", [0, -5])
    def test_bank_size(self, cnn_encoder, bank_size):
        with pytest.raises(ValueError, match=f"max_rows={bank_size}"):
            VTFusion(encoder=cnn_encoder, bank_size=bank_size)

    @pytest.mark.parametrize("context", [-1, 31])
    def test_learnable_context(self, cnn_encoder, context):
        with pytest.raises(ValueError, match="learnable_context"):
            VTFusion(encoder=cnn_encoder, learnable_context=context)


@pytest.fixture
def fails(make_engine, monkeypatch, cnn_encoder):
    """Function that fits with the given arguments, expects the given error, and allows no training step."""
    encoder = cnn_encoder

    def check(error, message, *, datamodule=None, fit=None, **arguments):
        monkeypatch.setattr(VTFusion, "training_step", lambda *_: pytest.fail("training had begun"))
        model = VTFusion(**{"encoder": encoder, "num_steps": 2} | arguments)
        with pytest.raises(error, match=message):
            make_engine().fit(model, **(fit or {"datamodule": datamodule}))

    return check


class TestData:
    def test_no_normal_images(self, fails, folder_datamodule, parts):
        """The host stops first where the folder is empty; where it holds anomalies alone we do."""
        datamodule = folder_datamodule(abnormal_dir="test/square", normal_test_dir="test/good")
        datamodule.setup("fit")
        datamodule.train_data = datamodule.train_data.subsample([])
        datamodule._is_setup = True
        fails(ValueError, "There are no normal images in the training data of woven", datamodule=datamodule)

    def test_empty_normal_folder(self, fails, folder_datamodule, tmp_path):
        fails(
            (RuntimeError, ValueError),
            "(?i)0 .*images|no.* images",
            datamodule=folder_datamodule(root=None, normal_dir=tmp_path),
        )

    def test_k_shot_larger_than_what_there_is(self, fails, parts_datamodule):
        message = "k_shot is 4, but there are only 3 normal images in the training data of MVTecAD"
        fails(ValueError, message, datamodule=parts_datamodule(), k_shot=4)

    def test_missing_few_shot_source(self, fails, parts_datamodule, tmp_path):
        source = str(tmp_path / "nowhere")
        message = "few_shot_source must be a folder of normal images"
        fails(FileNotFoundError, message, datamodule=parts_datamodule(), few_shot_source=source)

    def test_empty_few_shot_source(self, fails, parts_datamodule, tmp_path):
        fails(ValueError, "holds no images", datamodule=parts_datamodule(), few_shot_source=str(tmp_path))

    def test_few_shot_source_with_too_few_images(self, fails, parts_datamodule, parts):
        source = str(parts / "woven" / "test" / "good")
        message = "k_shot is 3, but there are only 2 normal images in few_shot_source"
        fails(ValueError, message, datamodule=parts_datamodule(), few_shot_source=source, k_shot=3)

    @pytest.mark.parametrize("content", [b"", b"not an image", None])
    def test_unreadable_reference(self, fails, parts_datamodule, parts, tmp_path, content):
        broken = tmp_path / "broken.png"
        whole = (parts / "woven" / "train" / "good" / "000.png").read_bytes()
        broken.write_bytes(whole[: len(whole) // 2] if content is None else content)
        message = r"The reference image .*broken\.png cannot be read"
        fails(ValueError, message, datamodule=parts_datamodule(), few_shot_source=str(tmp_path))

    def test_unreadable_training_image(self, fails, parts, tmp_path):
        from anomalib.data import MVTecAD

        shutil.copytree(parts / "woven", tmp_path / "woven")
        path = tmp_path / "woven" / "train" / "good" / "001.png"
        path.write_bytes(path.read_bytes()[:300])
        datamodule = MVTecAD(root=tmp_path, category="woven", num_workers=0, val_split_mode="none")
        fails(ValueError, r"001\.png cannot be read", datamodule=datamodule)

    def test_bare_dataloaders(self, fails, parts_datamodule):
        datamodule = parts_datamodule()
        datamodule.setup()
        loader = DataLoader(datamodule.train_data, batch_size=1, collate_fn=datamodule.train_data.collate_fn)
        fails(TypeError, "pass datamodule=..., not bare dataloaders", fit={"train_dataloaders": loader})

    def test_test_without_fit_or_checkpoint(self, cnn_encoder, parts_datamodule, make_engine):
        with pytest.raises(RuntimeError, match="no reference images yet: run fit or train first, or load a checkpoint"):
            make_engine().test(VTFusion(encoder=cnn_encoder), datamodule=parts_datamodule())


class TestPreProcessor:
    def test_normalising(self, fails, parts_datamodule):
        normalise = Compose([Resize((64, 64)), Normalize([0.5] * 3, [0.5] * 3)])
        message = "leave Normalize out of the pre-processor"
        fails(ValueError, message, datamodule=parts_datamodule(), pre_processor=PreProcessor(transform=normalise))

    @pytest.mark.parametrize("transform", [Resize((32, 32)), Compose([Resize((64, 96))])])
    def test_another_size(self, fails, parts_datamodule, transform):
        message = r"The pre-processor makes images of .*but the encoder .*\(64, 64\).*Set image_size of VTFusion"
        fails(ValueError, message, datamodule=parts_datamodule(), pre_processor=PreProcessor(transform=transform))

    @pytest.mark.parametrize("pre_processor", [False, PreProcessor()])
    def test_none(self, fails, parts_datamodule, pre_processor):
        message = r"give it a pre-processor with Resize\(\(64, 64\)\)"
        fails(ValueError, message, datamodule=parts_datamodule(), pre_processor=pre_processor)


class TestImageFormats:
    """Files that are images, but not 8-bit RGB, are references and queries all the same."""

    @pytest.fixture
    def write(self, parts, tmp_path):
        """Function that writes the training images in another mode and returns their folder."""

        def write(convert):
            for path in (parts / "woven" / "train" / "good").glob("*.png"):
                convert(Image.open(path)).save(tmp_path / path.name)
            return tmp_path

        return write

    @pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1"])
    def test_other_modes(self, write, parts_datamodule, make_engine, cnn_encoder, mode):
        folder = write(lambda image: image.convert(mode))
        model = VTFusion(encoder=cnn_encoder, few_shot_source=str(folder), num_steps=0)
        make_engine().fit(model, datamodule=parts_datamodule())
        assert model._references.images.shape == (3, 3, 64, 64)
        assert model._references.images.std() > 0.02
        for batch in make_engine().predict(model, data_path=folder, return_predictions=True):
            assert batch.image.shape[1] == 3
            assert not batch.pred_label.any()

    def test_sixteen_bit_gives_the_same_as_eight_bit(self, parts, tmp_path, parts_datamodule, make_engine, cnn_encoder):
        folders = {"eight": tmp_path / "eight", "sixteen": tmp_path / "sixteen"}
        for folder in folders.values():
            folder.mkdir()
        for path in (parts / "woven" / "train" / "good").glob("*.png"):
            grey = Image.open(path).convert("L")
            grey.save(folders["eight"] / path.name)
            Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folders["sixteen"] / path.name)
        references, scores = {}, {}
        for depth, folder in folders.items():
            model = VTFusion(encoder=cnn_encoder, few_shot_source=str(folder), num_steps=1)
            engine = make_engine()
            engine.fit(model, datamodule=parts_datamodule())
            references[depth] = model._references.images
            predictions = engine.predict(model, data_path=folder, return_predictions=True)
            scores[depth] = torch.cat([batch.pred_score for batch in predictions])
        torch.testing.assert_close(references["sixteen"], references["eight"])
        torch.testing.assert_close(scores["sixteen"], scores["eight"], atol=1e-4, rtol=0)
