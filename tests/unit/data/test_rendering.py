"""The renderer: geometry, light, camera, and defects that change what their mask says and nothing else."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFilter

from anomalib_vtfusion.data import rendering
from anomalib_vtfusion.data.demo import CATEGORIES, GOOD, NUM_PER_DEFECT, defects_of, render
from anomalib_vtfusion.data.rendering import CANVAS, LEVEL_STEP, PIXEL, SIZE, Light, Surface

OVERHEAD = Light(direction=(0.0, 0.0, 1.0), ambient=0.4, color=(1.0, 1.0, 1.0), falloff=(0.0, 0.0), exposure=1.0)
FROM_LEFT = Light(direction=(-0.6, 0.0, 0.8), ambient=0.4, color=(1.0, 1.0, 1.0), falloff=(0.0, 0.0), exposure=1.0)


def flat_surface(albedo: float = 0.5) -> Surface:
    zero = np.zeros((CANVAS, CANVAS), dtype=np.float32)
    return Surface(np.full((CANVAS, CANVAS, 3), albedo, dtype=np.float32), zero, zero, zero + 1)


def test_coordinates_are_centered_image_widths() -> None:
    x, y = rendering.coordinates()
    assert x[0, 0] == y[0, 0] == pytest.approx(-0.5 + PIXEL / 2)
    assert x[0, -1] == pytest.approx(0.5 - PIXEL / 2)
    assert x.sum() == pytest.approx(0.0, abs=1e-2)
    assert not x.flags.writeable


def test_smoothstep_runs_either_way() -> None:
    values = np.array([-1.0, 0.0, 0.5, 1.0, 2.0], dtype=np.float32)
    assert rendering.smoothstep(0.0, 1.0, values).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert rendering.smoothstep(1.0, 0.0, values).tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_box_distance() -> None:
    u, v = np.array([0.0, 0.5, 0.5, 0.2]), np.array([0.0, 0.0, 0.5, 0.3])
    expected = [-0.1, 0.3, math.hypot(0.3, 0.4), 0.2]
    assert rendering.box_distance(u, v, 0.2, 0.1) == pytest.approx(expected)
    # A box with corners as round as it is wide is a disc.
    assert rendering.box_distance(u, v, 0.2, 0.2, 0.2) == pytest.approx(np.hypot(u, v) - 0.2)


def test_inside_is_half_at_the_edge() -> None:
    assert rendering.inside(np.array([-1.0, 0.0, 1.0])).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(("cells", "octaves", "stretch"), [(4, 1, 1.0), (40, 3, 1.0), (200, 1, 1.0), (30, 1, 8.0)])
def test_noise_is_standardised(cells: int, octaves: int, stretch: float) -> None:
    samples = [rendering.noise(np.random.default_rng(i), cells, octaves, stretch=stretch) for i in range(4)]
    assert np.mean(samples) == pytest.approx(0.0, abs=0.25)
    assert np.std(samples) == pytest.approx(1.0, abs=0.4)
    assert samples[0].dtype == np.float32
    assert np.array_equal(samples[0], rendering.noise(np.random.default_rng(0), cells, octaves, stretch=stretch))


def test_lookup_interpolates_along_and_wraps() -> None:
    table = np.array([[0.0, 1.0, 2.0, 3.0], [10.0, 10.0, 10.0, 10.0]], dtype=np.float32)
    u = np.array([0.0, 0.5, 3.5, 4.25, 0.0], dtype=np.float32)
    v = np.array([0.0, 0.9, 0.0, 2.0, 1.0], dtype=np.float32)
    assert rendering.lookup(table, u, v).tolist() == [0.0, 0.5, 1.5, 0.25, 10.0]


def test_paint_lines_covers_length_times_width() -> None:
    covered = rendering.paint_lines([(-0.25, 0.0), (0.25, 0.0)], [0.02, 0.02])
    assert covered.mean() == pytest.approx(0.5 * 0.02, rel=0.06)
    assert covered[CANVAS // 2, CANVAS // 2] == 1.0
    assert covered[: CANVAS // 2 - 10].max() == 0.0


def test_smooth_blob_is_a_disc() -> None:
    x, y = rendering.coordinates()
    blob = rendering.blob_distance(np.random.default_rng(0), (0.1, 0.0), 0.2, roughness=0.0)
    assert blob == pytest.approx(np.hypot(x - 0.1, y) - 0.2, abs=1e-5)


def test_flat_matte_surface_obeys_lambert() -> None:
    assert rendering.shade(flat_surface(), OVERHEAD) == pytest.approx(0.5)
    assert rendering.shade(flat_surface(), FROM_LEFT) == pytest.approx(0.5 * (0.4 + 0.6 * 0.8))


def test_slope_towards_the_lamp_is_brighter() -> None:
    surface = flat_surface()
    x, _ = rendering.coordinates()
    surface.height = np.where(x < 0, x, -x) * np.float32(0.5)
    lit = rendering.shade(surface, FROM_LEFT)[..., 0]
    towards = 0.5 * (0.4 + 0.6 * (0.8 + 0.5 * 0.6) / math.sqrt(1.25))
    assert lit[:, 10] == pytest.approx(towards)
    assert lit[:, -10].max() < 0.5 * (0.4 + 0.6 * 0.8) < towards


def test_shadow_falls_away_from_the_lamp() -> None:
    part = np.zeros((CANVAS, CANVAS), dtype=np.float32)
    part[200:300, 200:300] = 1.0
    shadow = rendering.cast_shadow(part, FROM_LEFT, reach=50 * PIXEL, blur=2 * PIXEL)
    assert shadow[250, 320] == pytest.approx(1.0, abs=0.05)
    assert shadow[250, 220] == pytest.approx(0.0, abs=0.05)


def test_shrink_averages() -> None:
    values = np.zeros((CANVAS, CANVAS), dtype=np.float32)
    values[0, 1], values[1, 1] = 1.0, 3.0
    small = rendering.shrink(values)
    assert small.shape == (SIZE, SIZE)
    assert small[0, 0] == 1.0
    assert small.sum() == 1.0


def test_photograph_of_a_grey_card() -> None:
    image = rendering.photograph(np.full((CANVAS, CANVAS, 3), 0.2, np.float32), OVERHEAD, np.random.default_rng(0))
    assert (image.shape, image.dtype) == ((SIZE, SIZE, 3), np.uint8)
    assert not (image % LEVEL_STEP).any()
    middle, corner = image[118:138, 118:138].mean(), image[:10, :10].mean()
    assert middle == pytest.approx(255 * 0.2 ** (1 / 2.2), abs=1.5)
    assert corner < 0.97 * middle
    assert 0.2 < image[118:138, 118:138, 1].std() < 4.0


ALL = [(category, kind) for category in CATEGORIES for kind in defects_of(category)]


def grown(mask: np.ndarray, radius: int) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * radius + 1))) > 0


@pytest.mark.parametrize(("category", "kind"), ALL)
def test_defect_changes_what_its_mask_says(category: str, kind: str) -> None:
    for index in (0, NUM_PER_DEFECT - 1):
        image, mask = render(category, "test", kind, index)
        without, nothing = render(category, "test", kind, index, twin=True)
        change = np.abs(image.astype(int) - without.astype(int)).max(axis=-1)
        assert not nothing.any()
        assert 2e-4 < mask.mean() < 0.08
        # Light falls on the edge of a defect as well: allow its shadow, and nothing farther away.
        assert (change[~grown(mask, 7)] > 2 * LEVEL_STEP).mean() < 1e-3
        assert change[mask].mean() > 3 * (change[~grown(mask, 7)].mean() + 1)


@pytest.mark.parametrize("category", sorted(CATEGORIES))
def test_pictures_are_reproducible_and_differ(category: str) -> None:
    first, mask = render(category, "train", GOOD, 0)
    assert np.array_equal(first, render(category, "train", GOOD, 0)[0])
    assert not mask.any()
    assert first.shape == (SIZE, SIZE, 3)
    assert 25 < first.mean() < 200
    assert (first >= 250).mean() < 0.02
    for other in (render(category, "train", GOOD, 1)[0], render(category, "test", GOOD, 0)[0]):
        assert np.abs(first.astype(int) - other.astype(int)).mean() > 2


def test_stronger_defects_are_larger() -> None:
    sizes = [render("washer", "test", "stain", index)[1].sum() for index in (0, NUM_PER_DEFECT - 1)]
    assert sizes[1] > 2 * sizes[0]
