"""Text embeddings: the ensemble is open_clip's zero-shot formula, and phrases, context and state keep together."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from anomalib_vtfusion.components.text_features import TextFeatures, ensemble

PROMPTS = SimpleNamespace(
    normal=("a nut", "a fine nut"),
    anomalous=("a broken nut",),
    defects={"a crack": ("a nut with a crack", "a crack in a nut"), "a stain": ("a nut with a stain",)},
)


class FakeTower:
    """Embeds a prompt by its length, so that every embedding is known; the context is added to it."""

    def encode_text(self, prompts):
        angles = torch.tensor([float(len(prompt)) for prompt in prompts])
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    def encode_text_with_context(self, prompts, context):
        return F.normalize(self.encode_text(prompts) + context.sum(dim=0)[:2], dim=1)


def zero_shot(embeddings):
    """open_clip's ``build_zero_shot_classifier`` for one class: normalise, mean, normalise by the norm."""
    embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
    mean = embeddings.sum(dim=0) / len(embeddings)
    return mean / mean.norm()


def test_ensemble_is_the_zero_shot_classifier():
    embeddings = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 6.0)[:, None]
    torch.testing.assert_close(ensemble(embeddings), zero_shot(embeddings))
    torch.testing.assert_close(ensemble(embeddings[:1]), F.normalize(embeddings[0], dim=0))


def test_states_and_defects_are_ensembles_in_their_order():
    features, tower = TextFeatures(2, 3, 0), FakeTower()
    features.embed(tower, PROMPTS)
    torch.testing.assert_close(features.states[0], zero_shot(tower.encode_text(PROMPTS.normal)))
    torch.testing.assert_close(features.states[1], zero_shot(tower.encode_text(PROMPTS.anomalous)))
    assert features.phrases == ("a crack", "a stain")
    torch.testing.assert_close(features.defects[0], zero_shot(tower.encode_text(PROMPTS.defects["a crack"])))
    assert features.defects.shape == (2, 2)


def test_without_context_nothing_is_learned_and_nothing_changes():
    features = TextFeatures(2, 3, 0)
    features.embed(FakeTower(), PROMPTS)
    states = features.states
    features.embed_with_context(FakeTower(), (("x",), ("y",)))
    assert features.states is states
    assert not list(features.parameters())


def test_gradients_flow_to_the_context():
    features = TextFeatures(2, 3, 4)
    assert features.context.shape == (4, 3)
    features.embed_with_context(FakeTower(), (PROMPTS.normal, PROMPTS.anomalous))
    features.states[0, 0].backward()
    assert features.context.grad[:, :2].abs().min() > 0


def test_baked_states_are_in_the_state():
    features = TextFeatures(2, 3, 4)
    features.embed(FakeTower(), PROMPTS)
    features.embed_with_context(FakeTower(), (PROMPTS.normal, PROMPTS.anomalous))
    loaded = TextFeatures(2, 3, 4)
    loaded.load_state_dict(features.state_dict())
    assert torch.equal(loaded.states, features.states)
    assert torch.equal(loaded.defects, features.defects)
    assert torch.equal(loaded.context, features.context)


def test_refuses_embeddings_of_another_width():
    features = TextFeatures(2, 3, 0)
    features.embed(FakeTower(), PROMPTS)
    with pytest.raises(RuntimeError, match="size mismatch"):
        TextFeatures(3, 3, 0).load_state_dict(features.state_dict())
