"""Exported models give what PyTorch gives: torch, ONNX and OpenVINO files, made by the engine from a checkpoint."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine

from anomalib_vtfusion import VTFusion

FIELDS = ("pred_score", "pred_label", "anomaly_map", "pred_mask")
WORDS = 49408  # rows of the text tower's token table
# Processors with bfloat16 units make OpenVINO calculate in it unless told otherwise, and distances do not survive that.
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


class Fitted:
    """A short fit, its checkpoint, and what has been exported from that so far.

    The thresholds are moved to where the test images are, so that both verdicts occur.
    """

    def __init__(self, root, encoder, datamodule, images, **arguments):
        self.root, self.datamodule, self.images = root, datamodule, images
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        self.engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, **quiet)
        arguments = {"k_shot": 2, "num_steps": 3, "learning_rate": 1e-2, "bank_size": 64} | arguments
        self.model = VTFusion(encoder=encoder, **arguments)
        self.engine.fit(self.model, datamodule=datamodule)
        self.model.eval()
        with torch.no_grad():
            raw = self.model.model(images)
        self.model.post_processor._image_threshold.copy_(raw.pred_score.sort(dim=0).values[:2].mean())
        self.model.post_processor._pixel_threshold.copy_(raw.anomaly_map.quantile(0.9))
        self.checkpoint = root / "model.ckpt"
        self.engine.trainer.save_checkpoint(self.checkpoint)
        self._files = {}

    def export(self, kind, compression=None):
        """Path of the export, which is made once."""
        key = (str(kind.value), str(compression and compression.value))
        if key not in self._files:
            self._files[key] = self.engine.export(
                VTFusion(encoder=self.model.hparams.encoder),
                kind,
                export_root=self.root / "-".join(key),
                input_size=None if kind == ExportType.TORCH else (64, 64),
                compression_type=compression,
                datamodule=self.datamodule if compression == CompressionType.INT8_PTQ else None,
                ckpt_path=self.checkpoint,
            )
        return self._files[key]

    @torch.no_grad()
    def expected(self, count):
        """What PyTorch gives for the first images."""
        return {name: getattr(self.model(self.images[:count]), name).numpy() for name in FIELDS}


def translate_once(patch):
    """Let exports of one model share the translation to ONNX, which is the same for all and takes most of the time."""
    translate, made = VTFusion.to_onnx, {}

    def to_onnx(self, export_root, *arguments, **options):
        key = self.model.encoder.weights_hash
        if key not in made:
            made[key] = translate(self, export_root, *arguments, **options)
            shutil.copytree(made[key].parent, f"kept-{key}")
            return made[key]
        return Path(shutil.copytree(f"kept-{key}", export_root, dirs_exist_ok=True), made[key].name)

    patch.setattr(VTFusion, "to_onnx", to_onnx)


@pytest.fixture(scope="module")
def images(parts):
    """Two parts with a black square and one without, ``(3, 3, 64, 64)``."""
    dataset = MVTecAD(root=parts, category="woven", num_workers=0)
    dataset.setup()
    tested = list(dataset.test_data)
    chosen = [image for image in tested if image.gt_label][:2] + [image for image in tested if not image.gt_label][:1]
    return torch.nn.functional.interpolate(torch.stack([image.image for image in chosen]), (64, 64), mode="bilinear")


@pytest.fixture(scope="module")
def fits(cnn_encoder, vit_encoder, parts, images, tmp_path_factory):
    """One fit of each kind of tower; the one of the ViT learns a context."""
    root = tmp_path_factory.mktemp("exports")
    options = {"root": parts, "category": "woven", "train_batch_size": 2, "eval_batch_size": 2, "num_workers": 0}
    datamodule = MVTecAD(**options, val_split_mode="same_as_test")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # OpenVINO's inferencer keeps a cache in the current folder
        patch.setenv("TRUST_REMOTE_CODE", "1")  # Anomalib's torch inferencer unpickles only then
        translate_once(patch)
        cnn = Fitted(root / "cnn", cnn_encoder, datamodule, images)
        vit = Fitted(root / "vit", vit_encoder, datamodule, images, learnable_context=2)
        yield {"cnn": cnn, "vit": vit}


@pytest.fixture(params=["cnn", "vit"])
def fit(request, fits):
    return fits[request.param]


@pytest.fixture
def cnn_fit(fits):
    return fits["cnn"]


def assert_same(actual, expected, tolerance=1e-3):
    """Maps and scores within the tolerance, and the same verdicts except where they hang on it."""
    for values, verdict in (("pred_score", "pred_label"), ("anomaly_map", "pred_mask")):
        found = np.asarray(actual[values]).reshape(expected[values].shape)
        np.testing.assert_allclose(found, expected[values], rtol=0, atol=tolerance)
        differs = np.asarray(actual[verdict]).reshape(found.shape).astype(bool) != expected[verdict]
        assert (np.abs(expected[values][differs] - 0.5) <= tolerance).all()


def run_openvino(path, images, config=None):
    """What Anomalib's inferencer gives, calculated in single precision unless the configuration says otherwise."""
    batch = OpenVINOInferencer(path, device="CPU", config=F32 if config is None else config).predict(images)
    return {name: getattr(batch, name) for name in FIELDS}


class TestFiles:
    def test_the_test_images_get_both_verdicts(self, fit):
        expected = fit.expected(3)
        for verdict in ("pred_label", "pred_mask"):
            assert set(np.unique(expected[verdict])) == {False, True}
        assert expected["anomaly_map"].std() > 1e-3
        assert expected["pred_score"].std() > 1e-3

    def test_torch(self, fit):
        path = fit.export(ExportType.TORCH)
        inferencer = TorchInferencer(path, device="cpu")
        for count in (1, 3):
            batch = inferencer.predict(fit.images[:count])
            actual = {name: getattr(batch, name).detach().numpy() for name in FIELDS}
            assert_same(actual, fit.expected(count))
        assert inferencer.model.model.encoder.text is None
        needed = sum(t.nbytes for t in [*inferencer.model.parameters(), *inferencer.model.buffers()])
        assert path.stat().st_size < needed + 2**20

    def test_onnx(self, fit):
        path = fit.export(ExportType.ONNX)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        assert set(names) == set(FIELDS)
        for count in (1, 3):
            outputs = session.run(None, {"input": fit.images[:count].numpy()})
            actual = dict(zip(names, outputs, strict=True))
            expected = fit.expected(count)
            assert {name: actual[name].shape for name in FIELDS} == {name: expected[name].shape for name in FIELDS}
            assert_same(actual, expected)

    def test_onnx_holds_no_text_tower(self, fit):
        path = fit.export(ExportType.ONNX)
        graph = onnx.load(path).graph
        assert not [tensor.name for tensor in graph.initializer if WORDS in tensor.dims]
        model = fit.model.model
        needed = sum(t.nbytes for t in [*model.parameters(), *model.buffers()] if t.dtype == torch.float32)
        assert sum(file.stat().st_size for file in path.parent.iterdir()) < needed + 2 * 2**20

    def test_openvino(self, fit):
        path = fit.export(ExportType.OPENVINO)
        for count in (1, 3):
            assert_same(run_openvino(path, fit.images[:count]), fit.expected(count))

    @pytest.mark.parametrize(
        ("compression", "tolerance", "share"),
        [
            (CompressionType.FP16, 0.01, 0.55),  # weights rounded to 11 bits
            (CompressionType.INT8, 0.15, 0.35),  # weights rounded to 8 bits
        ],
    )
    def test_openvino_compressed(self, cnn_fit, compression, tolerance, share):
        path = cnn_fit.export(ExportType.OPENVINO, compression)
        whole = cnn_fit.export(ExportType.OPENVINO)
        assert path.with_suffix(".bin").stat().st_size < share * whole.with_suffix(".bin").stat().st_size
        for count in (1, 3):
            actual = run_openvino(path, cnn_fit.images[:count])
            assert_same(actual, cnn_fit.expected(count), tolerance)

    def test_openvino_quantised_features(self, cnn_fit):
        # Rounded features lie away from their references, clean ones too: of random features only the order is left.
        path = cnn_fit.export(ExportType.OPENVINO, CompressionType.INT8_PTQ)
        whole = cnn_fit.export(ExportType.OPENVINO)
        assert path.with_suffix(".bin").stat().st_size < 0.5 * whole.with_suffix(".bin").stat().st_size
        actual = run_openvino(path, cnn_fit.images)
        damaged, clean = np.split(np.asarray(actual["pred_score"]).reshape(-1), [2])
        assert damaged.min() > clean.max()


class TestTextTower:
    def test_is_gone_after_the_fit(self, fit):
        assert fit.model.model.encoder.text is None

    def test_is_gone_once_a_checkpoint_is_loaded(self, fit):
        loaded = VTFusion.load_from_checkpoint(fit.checkpoint).eval()
        assert loaded.model.encoder.text is None
        assert torch.equal(loaded.model.text_features.states, fit.model.model.text_features.states)
        with torch.no_grad():
            assert torch.equal(loaded(fit.images).pred_score, fit.model(fit.images).pred_score)


class TestRunning:
    def test_inference_mode(self, fit):
        with torch.inference_mode():
            output = fit.model(fit.images)
        assert_same({name: getattr(output, name).numpy() for name in FIELDS}, fit.expected(3), tolerance=1e-6)

    def test_compiles_without_a_graph_break(self, fit):
        torch._dynamo.reset()
        compiled = torch.compile(fit.model.model, backend="eager", fullgraph=True)
        for count in (1, 3):
            with torch.no_grad():
                actual, expected = compiled(fit.images[:count]), fit.model.model(fit.images[:count])
            torch.testing.assert_close(actual.anomaly_map, expected.anomaly_map, rtol=0, atol=1e-5)
            torch.testing.assert_close(actual.pred_score, expected.pred_score, rtol=0, atol=1e-5)

    def test_bfloat16_autocast_is_close(self, fit):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            output = fit.model.model(fit.images)
        expected = fit.model.model(fit.images)
        assert output.pred_score.dtype == output.anomaly_map.dtype == torch.float32
        assert (output.pred_score - expected.pred_score).abs().max() < 0.1
        assert (output.anomaly_map - expected.anomaly_map).abs().mean() < 0.1

    def test_memory_stays_flat_over_many_images(self, cnn_fit):
        import gc
        import resource

        def run(count):
            with torch.inference_mode():
                for _ in range(count):
                    cnn_fit.model(cnn_fit.images)
            gc.collect()
            tensors = sum(torch.is_tensor(item) for item in gc.get_objects())
            return tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

        tensors, megabytes = run(10)
        more_tensors, more_megabytes = run(100)
        assert more_tensors == tensors
        # A single map of each of the 300 images would be 5 MB, one layer's features 10 MB.
        assert more_megabytes < megabytes + 4


@pytest.mark.parametrize("references", [1, 12])
def test_cost_does_not_grow_with_the_number_of_references(cnn_fit, references):
    """All that grows with k is the bank, and the bank is full from one reference on."""
    model = VTFusion.load_from_checkpoint(cnn_fit.checkpoint).model
    generator = torch.Generator().manual_seed(0)
    views = torch.rand(4 * references, 3, 64, 64, generator=generator)
    model.set_references(views, torch.arange(len(views)) // 4, generator)
    assert [model.reference_bank.keys(layer).shape[0] for layer in range(2)] == [64, 64]
