"""Feature noise: replayed exactly, only inside its region, and as long as it says."""

import torch

from anomalib_vtfusion.components.feature_noise import FeatureNoise, add_feature_noise, sample_feature_noise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sampling_repeats_by_seed_alone():
    torch.manual_seed(1)
    first = sample_feature_noise(4, (8, 8), generator(3))
    torch.manual_seed(2)
    second = sample_feature_noise(4, (8, 8), generator(3))
    assert torch.equal(first.region, second.region)
    assert torch.equal(first.strength, second.strength)
    assert first.seed == second.seed != sample_feature_noise(4, (8, 8), generator(4)).seed


def test_regions_are_a_small_part_of_some_images():
    noise = sample_feature_noise(200, (16, 16), generator(), share=0.25, strength=(0.2, 0.4))
    assert noise.region.shape == (200, 1, 16, 16)
    assert set(noise.region.unique().tolist()) == {0.0, 1.0}
    share = noise.region.mean(dim=(1, 2, 3))
    noisy = share > 0
    assert 0.15 < noisy.float().mean() < 0.35
    assert share[noisy].min() > 0.005
    assert share[noisy].max() <= 0.26
    assert noise.strength.min() >= 0.2
    assert noise.strength.max() <= 0.4
    everywhere = sample_feature_noise(5, (3, 7), generator(), share=1.0)
    assert (everywhere.region.sum(dim=(1, 2, 3)) > 0).all()


def test_noise_stays_inside_its_region_and_has_its_length():
    region = torch.zeros(2, 1, 4, 4)
    region[0, 0, 1, 2] = 1
    noise = FeatureNoise(region, torch.tensor([0.5, 2.0]), seed=7)
    feature_map = torch.randn(2, 6, 8, 8, generator=generator())
    added = add_feature_noise(feature_map, noise) - feature_map
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:4, 4:6] = True  # the cell (1, 2) on a grid twice as fine
    assert not added[0, :, ~inside].any()
    assert not added[1].any()
    expected = 0.5 * feature_map[0, :, inside].norm(dim=0)
    torch.testing.assert_close(added[0, :, inside].norm(dim=0), expected, rtol=1e-4, atol=1e-5)


def test_noise_is_replayed_and_leaves_its_input_alone():
    noise = sample_feature_noise(2, (4, 4), generator(), share=1.0)
    feature_map = torch.randn(2, 6, 8, 8, generator=generator())
    before = feature_map.clone()
    first, second = add_feature_noise(feature_map, noise), add_feature_noise(feature_map, noise)
    assert torch.equal(first, second)
    assert torch.equal(feature_map, before)
    assert not torch.equal(first, feature_map)
