"""Adapters: the identity before training, local aggregation against an explicit loop, and the fused map's layout."""

import pytest
import torch
from torch.nn import functional as F

from anomalib_vtfusion.components.adapters import (
    ImageAdapter,
    ResidualAdapter,
    TextAdapter,
    local_aggregation,
    resize_map,
    to_map,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 1, 6), (1, 1, 1, 1)])
def test_local_aggregation_is_the_mean_of_the_neighbours_inside_the_map(shape):
    feature_map = randn(*shape)
    _, _, height, width = shape
    rows = []
    for y in range(height):
        for x in range(width):
            window = feature_map[:, :, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            rows.append(window.mean(dim=(2, 3)))
    torch.testing.assert_close(local_aggregation(feature_map), torch.stack(rows, dim=1))


def test_tokens_go_back_to_where_they_came_from():
    tokens = torch.arange(12.0).view(1, 6, 2)
    grid = to_map(tokens, (2, 3))
    assert grid.shape == (1, 2, 2, 3)
    assert grid[0, :, 1, 2].tolist() == tokens[0, 1 * 3 + 2].tolist()


def test_resize_map():
    feature_map = torch.tensor([[[[0.0, 1.0]]]])
    assert resize_map(feature_map, (1, 2)) is feature_map
    assert resize_map(feature_map, (1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]


class TestResidualAdapter:
    def test_is_the_identity_at_first(self):
        features = 100 * randn(2, 5, 8)
        assert torch.equal(ResidualAdapter(8, 4)(features), features)

    def test_is_the_stated_formula_once_trained(self):
        adapter = ResidualAdapter(8, 4, scale=0.3)
        with torch.no_grad():
            for parameter in adapter.mlp[-1].parameters():
                parameter.copy_(randn(*parameter.shape, seed=3))
        x = randn(6, 8)
        centred = x - x.mean(dim=1, keepdim=True)
        normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        first, _, last = adapter.mlp
        hidden = F.gelu(normed @ first.weight.T + first.bias)
        expected = x + 0.3 * x.square().sum(dim=1, keepdim=True).sqrt() * (hidden @ last.weight.T + last.bias)
        torch.testing.assert_close(adapter(x), expected)

    def test_the_residual_grows_with_the_features(self):
        """Towers differ by orders of magnitude: the adapter must act on all of them alike."""
        adapter = ResidualAdapter(8, 4)
        torch.nn.init.normal_(adapter.mlp[-1].weight, generator=torch.Generator().manual_seed(0))
        x = randn(3, 8)
        torch.testing.assert_close(adapter(1000 * x), 1000 * adapter(x), rtol=1e-3, atol=1e-1)

    def test_zero_start_still_learns(self):
        adapter = ResidualAdapter(8, 4)
        adapter(randn(3, 8)).sum().backward()
        assert adapter.mlp[-1].weight.grad.abs().max() > 0


class TestImageAdapter:
    def make(self, adapt=True):
        torch.manual_seed(0)
        return ImageAdapter([5, 7], [(4, 6), (2, 3)], embed_dim=6, dim=16, adapt=adapt)

    def tokens(self):
        return [randn(2, 24, 5), randn(2, 6, 7, seed=1)]

    @pytest.mark.parametrize("adapt", [True, False])
    def test_untrained_tokens_are_the_towers_at_unit_length(self, adapt):
        tokens = self.tokens()
        for adapted, original in zip(self.make(adapt)(tokens), tokens, strict=True):
            torch.testing.assert_close(adapted, original / original.norm(dim=2, keepdim=True))

    def test_fused_map_lies_on_the_coarsest_grid(self):
        adapter = self.make()
        adapted = adapter(self.tokens())
        fused = adapter.fuse(adapted)
        assert fused.shape == (2, 16, 2, 3)
        # Cell (1, 2): the finer layer is halved, so a cell is the mean of four of its own.
        fine = adapter.norms[0](adapted[0]).view(2, 4, 6, 5)[:, 2:4, 4:6].mean(dim=(1, 2))
        coarse = adapter.norms[1](adapted[1]).view(2, 2, 3, 7)[:, 1, 2]
        torch.testing.assert_close(fused[:, :, 1, 2], adapter.to_fused(torch.cat([fine, coarse], dim=1)))

    def test_joint_tokens_are_unit_vectors_of_each_layer(self):
        adapter = self.make()
        adapted = adapter(self.tokens())
        joint = adapter.joint_tokens(adapted)
        assert [tuple(tokens.shape) for tokens in joint] == [(2, 6, 4, 6), (2, 6, 2, 3)]
        torch.testing.assert_close(joint[1].norm(dim=1), torch.ones(2, 2, 3))
        expected = F.normalize(adapter.to_joint[1](adapter.norms[1](adapted[1][:, 5])), dim=-1)
        torch.testing.assert_close(joint[1][:, :, 1, 2], expected)

    def test_without_adaptation_there_is_less_to_learn(self):
        adapter = self.make(adapt=False)
        assert adapter.joint_tokens(adapter(self.tokens())) == []
        learned = {name.split(".")[0] for name, _ in adapter.named_parameters()}
        assert learned == {"norms", "to_fused"}


class TestTextAdapter:
    def test_returns_unit_length(self):
        embeddings = F.normalize(randn(2, 6), dim=1)
        torch.testing.assert_close(TextAdapter(6)(embeddings), embeddings)
        adapter = TextAdapter(6)
        torch.nn.init.normal_(adapter.adapter.mlp[-1].weight)
        adapted = adapter(embeddings)
        torch.testing.assert_close(adapted.norm(dim=1), torch.ones(2))
        assert (adapted - embeddings).abs().max() > 1e-3

    def test_without_adaptation_there_is_nothing_to_learn(self):
        assert not list(TextAdapter(6, adapt=False).parameters())
