"""Views of the references: exact turns, whose they are, and variations that replay and stay in range."""

import pytest
import torch

from anomalib_vtfusion.synthesis.views import ViewSampler, reference_views


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed))


def symmetries(image):
    """All distinct arrangements of a square image's pixels under flips and turns, by indexing."""
    transposed = image.transpose(1, 2)
    return [
        candidate
        for base in (image, transposed)
        for candidate in (base, base.flip(1), base.flip(2), base.flip(1).flip(2))
    ]


class TestReferenceViews:
    def test_square_images_give_all_eight_symmetries(self):
        images = rand(2, 3, 4, 4)
        views, owners = reference_views(images, turn=True)
        assert views.shape == (16, 3, 4, 4)
        assert owners.tolist() == [0, 1] * 8
        for owner in (0, 1):
            own = views[owners == owner]
            for expected in symmetries(images[owner]):
                assert sum(torch.equal(view, expected) for view in own) == 1

    def test_oblong_images_give_the_four_that_fit(self):
        images = rand(1, 3, 2, 4)
        views, owners = reference_views(images, turn=True)
        assert owners.tolist() == [0] * 4
        image = images[0]
        for expected in (image, image.flip(1), image.flip(2), image.flip(1).flip(2)):
            assert sum(torch.equal(view, expected) for view in views) == 1

    def test_without_turns_the_images_stay_alone(self):
        images = rand(3, 3, 4, 4)
        views, owners = reference_views(images, turn=False)
        assert torch.equal(views, images)
        assert owners.tolist() == [0, 1, 2]


class TestViewSampler:
    def still(self, **changed):
        """A sampler that changes nothing but what it is told to."""
        return ViewSampler(**{"turn": False, "angle": 0, "zoom": 0, "shift": 0, "light": 0, "noise": 0} | changed)

    @pytest.mark.parametrize("shape", [(4, 3, 16, 16), (4, 3, 12, 20)])
    def test_replays_and_stays_in_range(self, shape):
        images, sampler = rand(*shape), ViewSampler(turn=True)
        before = images.clone()
        parameters = sampler.sample(len(images), generator(3))
        views = sampler.apply(images, parameters)
        assert torch.equal(views, sampler.apply(images, parameters))
        assert torch.equal(views, sampler(images, generator(3)))
        assert torch.equal(images, before)
        assert views.shape == images.shape
        assert views.min() >= 0
        assert views.max() <= 1
        assert not torch.equal(views, sampler(images, generator(4)))

    def test_all_randomness_comes_from_the_generator(self):
        images, sampler, state = rand(2, 3, 16, 16), ViewSampler(turn=True), torch.random.get_rng_state()
        first = sampler(images, generator(1))
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(99)
        assert torch.equal(first, sampler(images, generator(1)))

    def test_a_sampler_that_varies_nothing_returns_the_image(self):
        images = rand(2, 3, 16, 16)
        # Up to the 1e-4 that keeps gamma's gradient finite at black.
        torch.testing.assert_close(self.still()(images, generator()), images, atol=2e-4, rtol=0)

    def test_turns_are_exact(self):
        images = rand(8, 3, 16, 16)
        sampler = self.still(turn=True)
        parameters = sampler.sample(8, generator())
        assert parameters.turns.unique().numel() > 1
        assert parameters.flips.unique().numel() == 2
        for image, view in zip(images, sampler.apply(images, parameters), strict=True):
            nearest = min(float((view - candidate).abs().max()) for candidate in symmetries(image))
            assert nearest < 2e-4

    def test_oblong_images_turn_by_half(self):
        images = rand(16, 3, 8, 16)
        sampler = self.still(turn=True)
        views = sampler(images, generator())
        for image, view in zip(images, views, strict=True):
            fitting = (image, image.flip(1), image.flip(2), image.flip(1).flip(2))
            assert min(float((view - candidate).abs().max()) for candidate in fitting) < 2e-4

    def test_no_turns_where_orientation_matters(self):
        parameters = ViewSampler(turn=False).sample(50, generator())
        assert not parameters.turns.any()
        assert not parameters.flips.any()

    def test_turning_or_not_draws_the_same_variations(self):
        """So that the ablation of turned references changes nothing else."""
        with_turns, without = (ViewSampler(turn=turn).sample(5, generator()) for turn in (True, False))
        assert torch.equal(with_turns.angle, without.angle)
        assert with_turns.noise_seed == without.noise_seed

    def test_shift_moves_the_picture(self):
        images = torch.zeros(1, 3, 16, 16)
        images[:, :, 8, 8] = 1
        sampler = self.still(shift=0.25)
        parameters = sampler.sample(1, generator(5))
        step = (parameters.shift * 16)[0]
        moved = sampler.apply(images, parameters)[0, 0]
        weight = (moved - moved.min()).clamp_min(0)
        grid = torch.arange(16.0)
        x = float((weight.sum(dim=0) * grid).sum() / weight.sum())
        y = float((weight.sum(dim=1) * grid).sum() / weight.sum())
        assert (x, y) == pytest.approx((8 + float(step[0]), 8 + float(step[1])), abs=0.05)

    def test_light_changes_gain_and_gamma(self):
        images = torch.full((4, 3, 8, 8), 0.5)
        sampler = self.still(light=0.12)
        parameters = sampler.sample(4, generator())
        expected = (0.5 * parameters.gain) ** parameters.gamma[:, None]
        torch.testing.assert_close(sampler.apply(images, parameters).mean(dim=(2, 3)), expected, rtol=1e-3, atol=1e-3)
        assert expected.std() > 0.01

    def test_noise_has_its_deviation(self):
        images = torch.full((1, 3, 64, 64), 0.5)
        sampler = self.still(noise=0.02)
        parameters = sampler.sample(1, generator(1))
        noise = sampler.apply(images, parameters) - 0.5
        assert float(noise.std()) == pytest.approx(float(parameters.noise), rel=0.05)

    def test_parameters_stay_within_their_limits(self):
        sampler = ViewSampler(turn=True)
        parameters = sampler.sample(500, generator())
        assert parameters.angle.abs().max() <= sampler.angle
        assert (parameters.scale - 1).abs().max() <= sampler.zoom
        assert torch.equal(parameters.scale[:, 0], parameters.scale[:, 1])
        assert parameters.shift.abs().max() <= sampler.shift
        assert (parameters.gain - 1).abs().max() <= sampler.light * 4 / 3 + 1e-6
        assert parameters.noise.min() >= 0
        assert parameters.noise.max() <= sampler.noise
