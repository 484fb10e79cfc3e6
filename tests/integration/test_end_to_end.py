"""VTFusion under Anomalib's engine: fit, test, predict and reload on a tiny folder data set with tiny towers."""

from pathlib import Path

import pytest
import torch
from anomalib.data import PredictDataset
from lightning.pytorch import Callback

from anomalib_vtfusion import VTFusion
from anomalib_vtfusion.prompting import DEFECTS

STEPS = 3


class Recorder(Callback):
    """Keeps what was logged in each step, and in which modes network and encoder were."""

    def __init__(self):
        self.logged, self.modes = [], set()

    def on_train_batch_end(self, trainer, module, *args):
        self.modes.add((module.model.training, module.model.encoder.training))
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def scores_of(model, datamodule):
    """Raw scores of the test images, in their order."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model.model(batch.image).pred_score for batch in datamodule.test_dataloader()]).flatten()


class TestFitTestPredict:
    """One fit, looked at from all sides."""

    @pytest.fixture(scope="class")
    def run(self, make_model, parts, tmp_path_factory):
        from anomalib.data import MVTecAD
        from anomalib.engine import Engine

        class Run:
            root = tmp_path_factory.mktemp("run")
            recorder = Recorder()

        Run.engine = Engine(
            default_root_dir=Run.root, accelerator="cpu", callbacks=[Run.recorder], enable_progress_bar=False
        )
        Run.datamodule = MVTecAD(
            root=parts,
            category="woven",
            train_batch_size=2,
            eval_batch_size=2,
            num_workers=0,
            val_split_mode="none",
        )
        Run.model = make_model(num_steps=STEPS)
        Run.engine.fit(Run.model, datamodule=Run.datamodule)
        Run.steps, Run.epochs = Run.engine.trainer.global_step, Run.engine.trainer.fit_loop.epoch_progress.current
        Run.metrics = Run.engine.test(Run.model, datamodule=Run.datamodule)[0]
        Run.checkpoint = Path(Run.engine.checkpoint_callback.best_model_path)
        return Run

    def test_one_epoch_holds_all_steps(self, run):
        assert run.steps == STEPS == len(run.recorder.logged)
        assert run.epochs.completed == 1

    def test_all_losses_are_logged_and_finite(self, run):
        for logged in run.recorder.logged:
            names = {f"train_{name}_loss" for name in ("map", "text", "distance", "image")} | {"train_loss"}
            assert names <= set(logged)
            assert all(abs(value) < 1e3 for value in logged.values())
        first, last = run.recorder.logged[0], run.recorder.logged[-1]
        assert first["train_loss"] != last["train_loss"]

    def test_the_logged_total_is_the_weighted_sum(self, run):
        weights = run.model.loss.weights
        for logged in run.recorder.logged:
            total = sum(weight * logged[f"train_{name}_loss"] for name, weight in weights.items())
            assert logged["train_loss"] == pytest.approx(total, rel=1e-4)

    def test_trains_in_training_mode(self, run):
        """Lightning leaves the mode as it finds it, and the references are taken in in evaluation mode."""
        assert run.recorder.modes == {(True, False)}

    def test_the_datamodule_gets_its_training_data_back(self, run):
        assert len(run.datamodule.train_data) == 3

    def test_every_metric_is_reported(self, run):
        names = {f"image_{name}" for name in ("AUROC", "AUPR", "F1Score")}
        names |= {f"pixel_{name}" for name in ("AUROC", "AUPR", "AUPRO", "F1Score")}
        assert names == set(run.metrics)
        assert all(0 <= value <= 1 for value in run.metrics.values())

    def test_black_squares_are_found(self, run):
        """Even on random towers: a black square is far from every patch of the weave."""
        assert run.metrics["image_AUROC"] == 1.0
        assert run.metrics["pixel_AUROC"] > 0.8

    def test_thresholds_were_calibrated(self, run):
        for threshold in (run.model.post_processor.image_threshold, run.model.post_processor.pixel_threshold):
            assert 0 < float(threshold) < 1

    def test_checkpoint_is_small_and_plain(self, run):
        content = torch.load(run.checkpoint, weights_only=True)
        assert not [name for name in content["state_dict"] if "encoder." in name]
        assert "optimizer_states" not in content
        assert content["hyper_parameters"]["k_shot"] == 2

    def test_reloaded_from_checkpoint_it_scores_the_same(self, run):
        loaded = VTFusion.load_from_checkpoint(run.checkpoint)
        assert loaded.hparams.encoder == run.model.hparams.encoder
        expected = scores_of(run.model, run.datamodule)
        assert torch.equal(scores_of(loaded, run.datamodule), expected)
        assert loaded.post_processor.image_threshold == run.model.post_processor.image_threshold
        assert loaded.model.text_features.phrases == DEFECTS

    def test_testing_a_checkpoint_gives_the_same_metrics(self, run, make_engine, make_model):
        fresh = make_model(seed=9)
        metrics = make_engine().test(fresh, datamodule=run.datamodule, ckpt_path=run.checkpoint)[0]
        assert metrics == run.metrics

    def test_predicting_a_folder_and_a_file(self, run, parts, make_engine, make_model):
        folder = parts / "woven" / "test" / "square"
        engine = make_engine()
        batches = engine.predict(make_model(), data_path=folder, ckpt_path=run.checkpoint, return_predictions=True)
        pictures = sorted(Path(engine.trainer.default_root_dir).rglob("*.png"))
        assert [picture.name for picture in pictures] == ["000.png", "001.png"]
        scores = [float(batch.pred_score) for batch in batches]
        assert all(0 <= score <= 1 for score in scores)
        for batch in batches:
            assert batch.anomaly_map.shape[-2:] == batch.image.shape[-2:] == (64, 64)
            called = bool(batch.pred_label)
            assert called == bool(batch.explanation[0])
            assert all(phrase in DEFECTS for phrase in batch.explanation[0].split(", ") if called)
            assert called == (float(batch.pred_score) > 0.5)
        single = PredictDataset(folder / "001.png")
        alone = make_engine().predict(make_model(), dataset=single, ckpt_path=run.checkpoint, return_predictions=True)
        assert float(alone[0].pred_score) == pytest.approx(scores[1], abs=1e-5)

    @pytest.mark.parametrize(("sensitivity", "called"), [(1.0, True), (0.0, False)])
    def test_explanations_follow_the_labels(self, run, sensitivity, called):
        """The user's sensitivity moves the labels, and so which images are explained."""
        batch = next(iter(run.datamodule.test_dataloader()))
        post_processor = run.model.eval().post_processor
        before, post_processor.image_sensitivity = post_processor.image_sensitivity, sensitivity
        with torch.no_grad():
            result = run.model.test_step(batch, 0)
            post_processor.post_process_batch(result)
        post_processor.image_sensitivity = before
        assert [bool(phrases) for phrases in result.explanation] == [called] * 2
        assert result.pred_label.flatten().tolist() == [called] * 2

    def test_the_module_alone_maps_images_to_post_processed_predictions(self, run):
        """What is exported: images of any size in [0, 1] in, normalised predictions out."""
        run.model.eval()
        with torch.no_grad():
            output = run.model(torch.rand(1, 3, 80, 100, generator=torch.Generator().manual_seed(0)))
        assert output.anomaly_map.shape == (1, 1, 64, 64)
        assert output.pred_label.tolist() == (output.pred_score > 0.5).tolist()

    def test_fitting_again_starts_afresh(self, run, make_engine, parts_datamodule, fitted, make_model):
        """Same model, same data: references, bank and prompts are set up once more."""
        model = make_model(num_steps=0)
        for _ in range(2):
            datamodule = parts_datamodule()
            fitted(model, make_engine(), datamodule)
        assert torch.equal(
            scores_of(model, datamodule),
            scores_of(fitted(make_model(num_steps=0), make_engine(), datamodule), datamodule),
        )


class TestSeeds:
    def test_the_model_s_own_seed_decides(self, fitted, make_model, make_engine, parts_datamodule):
        def run(seed, outside):
            torch.manual_seed(outside)
            datamodule = parts_datamodule()
            # All three normal images are references: what differs is not the choice of them.
            return scores_of(fitted(make_model(seed=seed, k_shot=3), make_engine(), datamodule), datamodule)

        first = run(0, outside=1)
        assert torch.equal(run(0, outside=2), first)
        assert not torch.equal(run(1, outside=1), first)


class TestTrainerArguments:
    @pytest.mark.parametrize(
        ("arguments", "steps"), [({"max_steps": 2}, 2), ({"max_epochs": 2}, 2 * STEPS), ({"limit_train_batches": 1}, 1)]
    )
    def test_the_user_s_own_are_kept(self, fitted, make_model, make_engine, parts_datamodule, arguments, steps):
        engine, datamodule = make_engine(**arguments), parts_datamodule()
        model = fitted(make_model(num_steps=STEPS), engine, datamodule)
        assert engine.trainer.global_step == steps
        # Whenever the fit ends, what is saved is the model as it is then.
        loaded = VTFusion.load_from_checkpoint(engine.checkpoint_callback.best_model_path)
        assert torch.equal(scores_of(loaded, datamodule), scores_of(model, datamodule))
        assert loaded.post_processor.image_threshold == model.post_processor.image_threshold

    def test_bfloat16(self, fitted, make_model, make_engine, parts_datamodule):
        datamodule = parts_datamodule()
        engine = make_engine(precision="bf16-mixed")
        model = fitted(make_model(), engine, datamodule)
        metrics = engine.test(model, datamodule=datamodule)[0]
        assert metrics["image_AUROC"] == 1.0
        assert scores_of(model, datamodule).dtype == torch.float32
        assert scores_of(model, datamodule).isfinite().all()


class TestSwitches:
    OFF = dict.fromkeys(
        ("image_adapter", "text_adapter", "synthetic_anomalies", "fusion_block", "text_guidance"), False
    )

    @pytest.mark.parametrize("switch", OFF)
    def test_each_component_off_by_itself_trains(self, fitted, make_model, make_engine, parts_datamodule, switch):
        recorder, datamodule = Recorder(), parts_datamodule()
        engine = make_engine(callbacks=[recorder])
        model = make_model(**{switch: False}, num_steps=2)
        before = {name: value.clone() for name, value in model.model.named_parameters()}
        fitted(model, engine, datamodule)
        changed = {name for name, value in model.model.named_parameters() if not torch.equal(value, before[name])}
        assert len(recorder.logged) == 2
        if switch == "synthetic_anomalies":
            assert changed
            assert {name.split(".")[0] for name in changed} == {"image_adapter"}
            assert not any("train_map_loss" in logged for logged in recorder.logged)
        else:
            assert {"segmentation", "image_head"} <= {name.split(".")[0] for name in changed}
        assert scores_of(model, datamodule).isfinite().all()

    def test_no_steps_or_nothing_to_learn_is_the_training_free_detector(
        self, fitted, make_model, make_engine, parts_datamodule
    ):
        scores, maps = [], []
        for arguments in ({"num_steps": 0}, self.OFF, self.OFF | {"num_steps": 0}):
            model, datamodule = make_model(**arguments), parts_datamodule()
            engine = make_engine()
            metrics = engine.test(fitted(model, engine, datamodule), datamodule=datamodule)[0]
            assert metrics["image_AUROC"] == 1.0
            assert 0 < float(model.post_processor.image_threshold) < 1
            scores.append(scores_of(model, datamodule))
            with torch.no_grad():
                maps.append(model.model.predict(next(iter(datamodule.test_dataloader())).image).logits)
        for score, logits in zip(scores[1:], maps[1:], strict=True):
            torch.testing.assert_close(score, scores[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logits, maps[0], rtol=1e-4, atol=1e-4)

    def test_learnable_context_is_learned_and_baked_in(self, fitted, make_model, make_engine, parts_datamodule):
        datamodule, engine = parts_datamodule(), make_engine()
        model = make_model(learnable_context=4)
        before = model.model.text_features.context.detach().clone()
        fitted(model, engine, datamodule)
        features = model.model.text_features
        assert (features.context - before).abs().max() > 0
        with torch.no_grad():
            baked = features.states.clone()
            features.embed_with_context(model.model.encoder, model._state_phrases)
        torch.testing.assert_close(baked, features.states, rtol=0, atol=1e-6)
        loaded = VTFusion.load_from_checkpoint(engine.checkpoint_callback.best_model_path)
        assert torch.equal(scores_of(loaded, datamodule), scores_of(model, datamodule))
