"""The network as a whole: it starts as the training-free detector, and its state is small, checked and complete."""

import pickle

import pytest
import torch

from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.components.predictions import top_mean
from anomalib_vtfusion.prompting import DEFECTS, build_prompts
from anomalib_vtfusion.synthesis.views import reference_views
from anomalib_vtfusion.torch_model import Components, VTFusionModel

ALL_OFF = Components(*[False] * 4)
EACH_OFF = [Components()._replace(**{name: False}) for name in Components._fields]
PROMPTS = build_prompts("nut", normal_prompts=["a {}"], anomaly_prompts=["a broken {}"], defects=["a crack", "a hole"])


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def cnn(cnn_encoder):
    return VisionTextEncoder(cnn_encoder)


def build(encoder, components=Components(), seed=0, size=(64, 64), references=2, **arguments):  # noqa: B008
    """A model that knows two references and the prompts, in evaluation mode."""
    model = VTFusionModel(encoder, components, dim=32, bank_size=2048, seed=seed, **arguments).eval()
    model.set_prompts(PROMPTS)
    images = rand(references, 3, *size)
    views, owners = reference_views(images, turn=True)
    model.set_references(views, owners, torch.Generator().manual_seed(0))
    noisy = (images + 0.1 * rand(references, 3, *size, seed=5)).clamp(0, 1)
    model.set_statistics(noisy, torch.arange(references))
    return model


def trained(model, seed=0):
    """Weights of the size that training gives them, zero-initialised ones included; the bank follows the adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.refresh_keys()
    return model


@pytest.fixture(scope="module")
def untrained(cnn):
    return build(cnn)


@pytest.fixture(scope="module")
def model(cnn):
    return trained(build(cnn))


@pytest.fixture(scope="module")
def images():
    return rand(3, 3, 64, 64, seed=9)


@torch.no_grad()
def predict(model, images, **arguments):
    return model.predict(images, **arguments)


class TestTrainingFree:
    def test_an_untrained_network_is_the_training_free_detector(self, untrained, images):
        prediction = predict(untrained, images)
        finer = torch.nn.functional.interpolate(prediction.base, prediction.logits.shape[-2:], mode="bilinear")
        assert torch.equal(prediction.logits, finer)
        assert torch.equal(prediction.score, top_mean(finer))

    @pytest.mark.parametrize("components", [ALL_OFF, *EACH_OFF])
    def test_no_component_changes_anything_before_training(self, cnn, untrained, images, components):
        expected, actual = predict(untrained, images), predict(build(cnn, components), images)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(actual.score, expected.score, rtol=1e-5, atol=1e-5)

    def test_training_changes_the_map(self, untrained, model, images):
        assert (predict(model, images).logits - predict(untrained, images).logits).abs().max() > 1e-2

    def test_a_reference_looks_more_normal_than_another_image(self, untrained, images):
        scores = untrained(torch.cat([rand(2, 3, 64, 64), images])).pred_score.flatten()
        assert scores[:2].max() < scores[2:].min()

    def test_left_out_a_reference_looks_as_another_image_does(self, untrained):
        reference = rand(2, 3, 64, 64)[:1]
        own, other = (predict(untrained, reference, own=torch.tensor([i])).score for i in (0, 1))
        assert float(other) == pytest.approx(float(predict(untrained, reference).score), abs=1e-3)
        assert own > other + 0.5


class TestForward:
    def test_shapes_and_ranges(self, model, images):
        with torch.no_grad():
            output = model(images)
        assert output.pred_score.shape == (3, 1)
        assert output.anomaly_map.shape == (3, 1, 64, 64)
        for values in (output.pred_score, output.anomaly_map):
            assert values.min() > 0
            assert values.max() < 1
            assert values.isfinite().all()
        assert output.pred_score.std() > 0
        assert output.anomaly_map.std() > 0

    def test_probabilities_are_those_of_the_prediction(self, model, images):
        prediction = predict(model, images)
        scores, maps = model.to_probabilities(prediction, (64, 64))
        torch.testing.assert_close(scores, prediction.score.sigmoid())
        finer = torch.nn.functional.interpolate(prediction.logits, (64, 64), mode="bilinear")
        torch.testing.assert_close(maps, finer.sigmoid())
        small = model.to_probabilities(prediction, prediction.logits.shape[-2:])[1]
        torch.testing.assert_close(small, prediction.logits.sigmoid())

    def test_an_image_scores_the_same_alone(self, model, images):
        with torch.no_grad():
            together, alone = model(images), model(images[1:2])
        torch.testing.assert_close(together.pred_score[1:2], alone.pred_score, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.anomaly_map[1:2], alone.anomaly_map, rtol=0, atol=3e-5)

    def test_a_change_of_the_image_shows_where_it_is(self, untrained):
        reference = rand(2, 3, 64, 64)[:1]
        damaged = reference.clone()
        damaged[:, :, 40:64, 0:24] = 0
        with torch.no_grad():
            rise = (untrained(damaged).anomaly_map - untrained(reference).anomaly_map)[0, 0]
        inside, outside = rise[44:60, 4:20], rise[:20, 44:]
        assert inside.mean() > 5 * outside.abs().mean()

    def test_vit_tower(self, vit_encoder, images):
        model = trained(build(VisionTextEncoder(vit_encoder)))
        with torch.no_grad():
            assert model(images).anomaly_map.shape == (3, 1, 64, 64)
        assert predict(model, images).distances.shape == (3, 3, 4, 4)

    def test_non_square_images(self, cnn_encoder):
        model = trained(build(VisionTextEncoder(cnn_encoder, image_size=(64, 96)), size=(64, 96)))
        images = rand(2, 3, 64, 96, seed=4)
        with torch.no_grad():
            output = model(images)
        assert output.anomaly_map.shape == (2, 1, 64, 96)
        prediction = predict(model, images)
        assert prediction.base.shape == (2, 1, 8, 12)
        assert prediction.logits.shape == (2, 1, 16, 24)

    def test_before_any_reference(self, cnn, images):
        with pytest.raises(RuntimeError, match="no reference images yet"):
            VTFusionModel(cnn)(images)

    def test_images_of_another_size(self, model):
        with pytest.raises(ValueError, match=r"Expected images \(B, 3, 64, 64\)"):
            model(torch.rand(1, 3, 32, 32))


class TestTrainingMode:
    def test_every_weight_gets_a_gradient(self, cnn, images):
        model = trained(build(cnn, learnable_context=4)).train()
        model.text_features.embed_with_context(cnn, (["nut"], ["broken nut"]))
        prediction = model.predict(images, own=torch.tensor([0, 1, 0]))
        sum(value.square().mean() for value in prediction[:-1]).backward()
        missing = [
            name for name, value in model.named_parameters() if value.requires_grad and not value.grad.abs().sum()
        ]
        assert not missing
        assert not any(parameter.requires_grad for parameter in cnn.parameters())

    def test_bank_rows_are_adapted_anew(self, cnn, images):
        """While it trains, query and rows must go through the same adapter."""
        model = build(cnn)
        stale = model.reference_bank.keys(0).clone()
        with torch.no_grad():
            torch.nn.init.normal_(model.image_adapter.adapters[0].mlp[-1].weight)
        model.train()
        in_training = predict(model, images).distances
        model.eval()
        model.refresh_keys()
        assert not torch.allclose(model.reference_bank.keys(0), stale, atol=1e-2)
        # In cosine distance: what inference keeps is rounded to half precision.
        difference = (predict(model, images).distances - in_training) * model.reference_bank.std[:, None, None]
        assert difference.abs().max() < 1e-3

    def test_the_encoder_stays_in_evaluation_mode(self, cnn):
        model = build(cnn).train()
        assert model.training
        assert not any(module.training for module in model.encoder.modules())


def test_inference_keeps_half_of_the_residual_less_half_of_its_mean(model, images):
    residuals = []
    handle = model.segmentation.register_forward_hook(lambda module, inputs, output: residuals.append(output))
    prediction = predict(model, images)
    handle.remove()
    (residual,) = residuals
    assert residual.std() > 1e-3
    base = torch.nn.functional.interpolate(
        prediction.base, size=residual.shape[-2:], mode="bilinear", align_corners=False
    )
    expected = base + 0.5 * residual - 0.25 * residual.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(prediction.logits, expected)


class TestSeed:
    def test_same_seed_same_network(self, cnn, images):
        first = build(cnn, seed=3)
        torch.manual_seed(99)
        second = build(cnn, seed=3)
        for (name, one), two in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
            assert name == "_extra_state" or torch.equal(one, two), name
        other = build(cnn, seed=4)
        assert not torch.equal(first.segmentation.skip.weight, other.segmentation.skip.weight)

    def test_building_leaves_the_global_random_state_alone(self, cnn):
        before = torch.random.get_rng_state()
        VTFusionModel(cnn, seed=1)
        assert torch.equal(torch.random.get_rng_state(), before)


class TestState:
    def test_holds_nothing_of_the_encoder(self, model):
        state = model.state_dict()
        assert not [name for name in state if name.startswith("encoder")]
        assert {"reference_bank.keys_0", "text_features.states", "segmentation.output.weight"} <= set(state)

    @pytest.mark.parametrize("components", [Components(), ALL_OFF])
    def test_loads_strictly_and_scores_the_same(self, cnn, images, components):
        model = trained(build(cnn, components, learnable_context=2))
        loaded = VTFusionModel(cnn, components, learnable_context=2, dim=32, bank_size=2048, seed=7).eval()
        loaded.load_state_dict(model.state_dict(), strict=True)
        for before, after in zip(predict(model, images), predict(loaded, images), strict=True):
            assert torch.equal(before, after)
        assert loaded.explain(predict(loaded, images)) == model.explain(predict(model, images))

    def test_refuses_another_encoder_by_name(self, model, cnn, vit_encoder, other_cnn_encoder):
        for name in (other_cnn_encoder, vit_encoder):
            encoder = VisionTextEncoder(name)
            with pytest.raises((ValueError, RuntimeError)) as caught:
                VTFusionModel(encoder, dim=32).load_state_dict(model.state_dict())
            message = str(caught.value)
            assert cnn.name in message
            assert name in message
            assert "encoder and the weights of the checkpoint" in message

    def test_a_folder_may_move(self, model, cnn_encoder, tmp_path, images):
        import shutil

        moved = shutil.copytree(cnn_encoder.removeprefix("local-dir:"), tmp_path / "elsewhere")
        loaded = VTFusionModel(VisionTextEncoder(f"local-dir:{moved}"), dim=32, bank_size=2048).eval()
        loaded.load_state_dict(model.state_dict())
        torch.testing.assert_close(predict(loaded, images).score, predict(model, images).score)

    def test_pickled_whole_it_scores_the_same(self, model, images):
        copied = pickle.loads(pickle.dumps(model))
        assert torch.equal(predict(copied, images).logits, predict(model, images).logits)
        assert not [name for name in copied.state_dict() if name.startswith("encoder")]


class TestExplanation:
    def test_gives_known_phrases(self, model, images):
        explanations = model.explain(predict(model, images))
        assert len(explanations) == 3
        for phrases in explanations:
            assert sorted(phrases) == ["a crack", "a hole"]
        assert all(len(phrases) == 1 for phrases in model.explain(predict(model, images), top=1))

    def test_built_in_phrases(self, cnn, images):
        model = build(cnn)
        model.set_prompts(build_prompts("nut"))
        explanations = model.explain(predict(model, images))
        assert all(len(phrases) == 3 and set(phrases) <= set(DEFECTS) for phrases in explanations)

    def test_names_what_the_anomalous_region_looks_like(self, untrained, images):
        """Tokens that equal a phrase's embedding under the peak of the map, and everything else elsewhere."""
        prediction = predict(untrained, images[:2])
        crack, hole = untrained.text_features.defects
        tokens = (-crack - hole)[None, :, None, None].repeat(2, 1, 2, 2)
        tokens[0, :, 1, 0], tokens[1, :, 1, 0] = crack, hole
        logits = torch.full((2, 1, 16, 16), -6.0)
        logits[:, :, 8:, :8] = 6.0
        explained = untrained.explain(prediction._replace(logits=logits, joint_tokens=tokens), top=1)
        assert explained == [["a crack"], ["a hole"]]
