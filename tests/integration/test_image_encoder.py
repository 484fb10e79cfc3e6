"""A timm ViT beside the CLIP towers in Anomalib: fit, predict, checkpoint and ONNX file, all on random weights."""

import inspect
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
import yaml
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from safetensors.torch import save_file

from anomalib_vtfusion import VTFusion
from anomalib_vtfusion.components.encoders import VisionTextEncoder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "model"
SIZE = 96  # the ViT's grid is 6 x 6, the CLIP tower sees 64 x 64 and has 4 x 4


@pytest.fixture(scope="module")
def arguments(vit_encoder):
    return {
        "encoder": vit_encoder,
        "image_encoder": "test_vit",
        "image_weights": "",
        "image_size": SIZE,
        "k_shot": 2,
        "num_steps": 2,
        "bank_size": 64,
    }


@pytest.fixture(scope="module")
def run(arguments, parts, tmp_path_factory):
    """A fit of two steps and what it left behind."""

    class Run:
        root = tmp_path_factory.mktemp("image-encoder")
        engine = Engine(default_root_dir=root, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
        datamodule = MVTecAD(
            root=parts, category="woven", train_batch_size=2, eval_batch_size=2, num_workers=0, val_split_mode="none"
        )
        model = VTFusion(**arguments)

    Run.before = {name: tensor.clone() for name, tensor in Run.model.model.encoder.vit.state_dict().items()}
    Run.engine.fit(Run.model, datamodule=Run.datamodule)
    Run.checkpoint = Path(Run.engine.checkpoint_callback.best_model_path)
    Run.images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        Run.expected = Run.model.eval()(Run.images)
    return Run


def test_the_fit_leaves_the_tower_as_it_was(run):
    after = run.model.model.encoder.vit.state_dict()
    assert after.keys() == run.before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in run.before.items())
    assert run.model.model.grid == (6, 6)
    assert run.engine.trainer.global_step == 2
    assert run.expected.anomaly_map.std() > 1e-3


def test_predictions_have_the_size_of_the_input(run):
    batches = run.engine.predict(run.model, datamodule=run.datamodule, return_predictions=True)
    assert sum(len(batch.image) for batch in batches) == 4
    assert {tuple(batch.anomaly_map.shape[-2:]) for batch in batches} == {(SIZE, SIZE)}


def test_checkpoint_holds_no_tower_and_loads(run):
    state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    assert not [name for name in state if "encoder.vit" in name or "encoder.image" in name]
    loaded = VTFusion.load_from_checkpoint(run.checkpoint).eval()
    with torch.no_grad():
        assert torch.equal(loaded(run.images).anomaly_map, run.expected.anomaly_map)


def test_checkpoint_is_refused_by_another_image_encoder(run, arguments, tmp_path):
    state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "other.safetensors")
    other = VTFusion(**(arguments | {"image_weights": str(tmp_path / "other.safetensors")}))
    with pytest.raises(
        ValueError, match=r"was trained on encoder '.*vit with test_vit' \(weights .*but this model has"
    ):
        other.load_state_dict(state)


def test_onnx_file_gives_what_torch_gives(run, arguments):
    path = run.engine.export(
        VTFusion(**arguments), ExportType.ONNX, export_root=run.root, input_size=(SIZE, SIZE), ckpt_path=run.checkpoint
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for count in (1, 3):
        images = run.images[:count]
        found = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
        for name in ("pred_score", "anomaly_map"):
            expected = getattr(run.expected, name)[:count]
            torch.testing.assert_close(torch.from_numpy(found[name]).view_as(expected), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_model_configurations_name_arguments_that_there_are(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["class_path"] == "anomalib_vtfusion.VTFusion"
    assert set(content["init_args"]) <= set(inspect.signature(VTFusion).parameters)


@pytest.mark.parametrize("name", ["mvtec_ad", "visa"])
def test_benchmarks_measure_the_towers_of_the_preset(name):
    preset = yaml.safe_load((CONFIGS / "vtfusion_strong.yaml").read_text(encoding="utf-8"))["init_args"]
    models = yaml.safe_load((ROOT / "benchmarks" / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))["models"]
    strong, plain = models["VTFusion-strong"]["init_args"], models["VTFusion"]["init_args"]
    assert strong == plain | {name: preset[name] for name in ("image_encoder", "image_size")}
    # The preset spells out what the tower's default is.
    assert preset["layers"] == list(range(2, 10))


def test_the_preset_builds_the_towers_it_speaks_of(monkeypatch):
    # Filling and hashing hundreds of millions of numbers is most of the time and says nothing about these shapes.
    for filler in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, filler, lambda tensor, *args, **kwargs: tensor)
    monkeypatch.setattr("timm.models.vision_transformer.trunc_normal_", lambda tensor, *args, **kwargs: tensor)
    for module in ("encoders", "encoder_vit"):
        monkeypatch.setattr(f"anomalib_vtfusion.components.{module}.hash_state", lambda states: "0" * 64)
    preset = yaml.safe_load((CONFIGS / "vtfusion_strong.yaml").read_text(encoding="utf-8"))["init_args"]
    names = ("encoder", "layers", "image_size", "image_encoder")
    encoder = VisionTextEncoder(**{name: preset[name] for name in names}, weights="", image_weights="")
    assert (encoder.grids, encoder.channels, encoder.token_grid) == ([(32, 32)] * 2, [768] * 2, (32, 32))
    assert (encoder.image.image_size, encoder.embed_dim) == ((240, 240), 640)
    assert encoder.vit.groups == [(2, 3, 4, 5), (6, 7, 8, 9)]
    assert (encoder.vit.vit.num_prefix_tokens, len(encoder.vit.vit.blocks)) == (5, 10)
