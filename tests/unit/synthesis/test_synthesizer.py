"""Properties of synthetic anomalies: exact masks, replay, ranges, statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from anomalib_vtfusion.synthesis import FAMILIES, AnomalySynthesizer
from anomalib_vtfusion.synthesis.synthesizer import VISIBLE


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def textured(batch: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Coloured low-frequency texture with some grain."""
    noise = generator(seed)
    coarse = torch.rand(batch, 3, 9, 9, generator=noise)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0.0, 1.0)
    return (0.15 + 0.6 * smooth + 0.1 * torch.rand(batch, 3, height, width, generator=noise)).clamp(0.0, 1.0)


SIZES = st.sampled_from([(32, 32), (48, 80), (64, 64), (97, 61)])


@given(family=st.sampled_from(FAMILIES), size=SIZES, batch=st.integers(1, 3), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_batch_is_consistent_for_every_family(family: str, size: tuple[int, int], batch: int, seed: int) -> None:
    images = textured(batch, *size, seed=seed)
    result = AnomalySynthesizer([family], clean_fraction=0.2)(images, generator(seed))

    assert result.images.shape == images.shape
    assert result.images.dtype == torch.float32
    assert result.masks.shape == (batch, 1, *size)
    assert set(result.masks.unique().tolist()) <= {0.0, 1.0}
    assert result.images.isfinite().all()
    assert float(result.images.min()) >= 0.0
    assert float(result.images.max()) <= 1.0
    outside = (result.masks == 0.0).expand_as(images)
    assert torch.equal(result.images[outside], images[outside])
    assert torch.equal(result.labels, result.masks.flatten(1).amax(1))
    expected = tuple(family if label else "clean" for label in result.labels.tolist())
    assert result.families == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_strong_defects_are_seen_and_masks_mark_visible_change(family: str) -> None:
    images = textured(6, 96, 96, seed=3)
    synthesizer = AnomalySynthesizer([family], area=(0.02, 0.05), strength=(0.9, 1.0), clean_fraction=0.0)
    result = synthesizer(images, generator(5))
    assert result.labels.sum() == 6
    assert result.families == (family,) * 6
    change = (result.images - images).abs().amax(1, keepdim=True)
    marked = result.masks == 1.0
    # Closed pinholes are the only marked pixels without a visible change.
    assert (change[marked] > VISIBLE).float().mean() > 0.75
    assert change[marked].mean() > 2.0 * VISIBLE


@given(seed=st.integers(0, 1_000_000))
@settings(max_examples=10, deadline=None)
def test_same_seed_gives_the_same_batch_and_replay_repeats_it(seed: int) -> None:
    images = textured(3)
    synthesizer = AnomalySynthesizer(clean_fraction=0.0)
    params = synthesizer.sample((3, 64, 64), generator(seed))
    first, again = synthesizer(images, generator(seed)), synthesizer.apply(images, params)
    replay = AnomalySynthesizer().apply(images, params)
    for other in (again, replay):
        assert torch.equal(first.images, other.images)
        assert torch.equal(first.masks, other.masks)
        assert first.families == other.families


def test_different_seeds_differ_and_input_is_left_alone() -> None:
    images = textured(3)
    before = images.clone()
    synthesizer = AnomalySynthesizer(clean_fraction=0.0)
    first, second = synthesizer(images, generator(0)), synthesizer(images, generator(1))
    assert not torch.equal(first.masks, second.masks)
    assert torch.equal(images, before)


def test_random_state_outside_the_generator_is_not_used() -> None:
    images = textured(2)
    synthesizer = AnomalySynthesizer(clean_fraction=0.0)
    torch.manual_seed(1)
    first = synthesizer(images, generator(4))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = synthesizer(images, generator(4))
    assert torch.equal(first.images, second.images)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_strength_is_clean(family: str) -> None:
    images = textured(3)
    result = AnomalySynthesizer([family], strength=(0.0, 0.0), clean_fraction=0.0)(images, generator(0))
    assert torch.equal(result.images, images)
    assert result.labels.tolist() == [0.0, 0.0, 0.0]
    assert result.families == ("clean", "clean", "clean")


def test_stronger_means_more_change() -> None:
    images = textured(6, seed=9)

    def mean_change(strength: float) -> float:
        synthesizer = AnomalySynthesizer(["intensity"], strength=(strength, strength), clean_fraction=0.0)
        return float((synthesizer(images, generator(2)).images - images).abs().mean())

    assert mean_change(0.2) < mean_change(0.5) < mean_change(1.0)


@pytest.mark.parametrize("family", ["cutpaste", "stain", "hole", "intensity", "dent", "missing", "perlin"])
def test_area_follows_the_requested_fraction(family: str) -> None:
    # A texture: defects may lie anywhere, the image's border cuts some of them.
    images = textured(12, 96, 96, seed=1)
    wanted = 0.04
    synthesizer = AnomalySynthesizer(
        [family], area=(wanted, wanted), strength=(1.0, 1.0), defects_per_image=(1, 1), clean_fraction=0.0
    )
    shares = synthesizer(images, generator(0)).masks.mean((1, 2, 3))
    assert 0.4 * wanted < float(shares.median()) < 2.0 * wanted
    assert float(shares.max()) < 3.5 * wanted


@pytest.mark.parametrize("family", ["scratch", "crack", "scar"])
def test_strokes_stay_thin(family: str) -> None:
    synthesizer = AnomalySynthesizer(
        [family], area=(0.08, 0.08), strength=(1.0, 1.0), defects_per_image=(1, 1), clean_fraction=0.0
    )
    shares = synthesizer(textured(4, 128, 128), generator(0)).masks.mean((1, 2, 3))
    assert float(shares.max()) < 0.16
    assert float(shares.min()) > 0.0


def test_blowholes_of_a_few_pixels_are_possible() -> None:
    images = torch.full((8, 3, 128, 128), 0.5)
    synthesizer = AnomalySynthesizer(
        ["spot", "hole"], area=(0.0005, 0.001), strength=(1.0, 1.0), defects_per_image=(1, 1), clean_fraction=0.0
    )
    pixels = synthesizer(images, generator(0)).masks.sum((1, 2, 3))
    assert float(pixels.min()) >= 3.0
    assert float(pixels.max()) < 0.006 * 128 * 128


def test_sampled_parameters_keep_to_their_ranges() -> None:
    synthesizer = AnomalySynthesizer(
        ["scar", "hole"], area=(0.002, 0.05), strength=(0.4, 0.6), defects_per_image=(2, 4), clean_fraction=0.25
    )
    params = synthesizer.sample((800, 64, 64), generator(0))
    assert params.shape == (800, 64, 64)
    counts = torch.bincount(torch.tensor([defect.image for defect in params.defects]), minlength=800)
    assert set(counts.tolist()) == {0, 2, 3, 4}
    assert abs(float((counts == 0).float().mean()) - 0.25) < 0.05
    assert {defect.family for defect in params.defects} == {"scar", "hole"}
    areas = torch.tensor([defect.area for defect in params.defects])
    assert float(areas.min()) >= 0.002
    assert float(areas.max()) <= 0.05
    # Log-uniform: the median is the geometric mean of the bounds.
    assert float(areas.median()) == pytest.approx(math.sqrt(0.002 * 0.05), rel=0.12)
    assert all(0.4 <= defect.strength <= 0.6 for defect in params.defects)
    assert all(0.0 <= defect.place < 1.0 for defect in params.defects)
    assert len({defect.seed for defect in params.defects}) == len(params.defects)


def test_about_a_third_is_clean_by_default_and_every_family_occurs() -> None:
    params = AnomalySynthesizer().sample((3000, 32, 32), generator(1))
    defective = {defect.image for defect in params.defects}
    assert abs(1.0 - len(defective) / 3000 - 1 / 3) < 0.03
    assert {defect.family for defect in params.defects} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_grey_images_stay_grey(family: str) -> None:
    grey = textured(2, seed=4).mean(1, keepdim=True).repeat(1, 3, 1, 1)
    result = AnomalySynthesizer([family], strength=(1.0, 1.0), area=(0.02, 0.05), clean_fraction=0.0)(
        grey, generator(3)
    )
    assert float((result.images.amax(1) - result.images.amin(1)).max()) < 1e-5
    assert result.labels.sum() == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_defects_stay_on_the_object(family: str) -> None:
    rows, cols = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    radius = torch.hypot(rows - 48.0, cols - 48.0)
    disc = (radius < 26.0).float()
    images = (0.9 - 0.5 * disc + 0.05 * disc * torch.sin(rows)).expand(4, 3, 96, 96).contiguous()
    result = AnomalySynthesizer([family], area=(0.01, 0.05), clean_fraction=0.0)(images, generator(8))
    assert result.masks.sum() > 0
    assert float(result.masks[:, 0, radius > 32.0].sum()) == 0.0


def test_autocast_computes_in_float32() -> None:
    images = textured(2)
    synthesizer = AnomalySynthesizer(clean_fraction=0.0)
    expected = synthesizer(images, generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = synthesizer(images, generator(0))
    assert result.images.dtype == torch.float32
    assert torch.equal(result.images, expected.images)


def test_module_apply_reaches_a_synthesizer_inside_a_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), AnomalySynthesizer())
    seen: list[str] = []
    model.apply(lambda module: seen.append(type(module).__name__))
    assert seen == ["Linear", "AnomalySynthesizer", "Sequential"]


def test_all_clean_leaves_the_batch_as_it_is() -> None:
    images = textured(3)
    result = AnomalySynthesizer(clean_fraction=1.0)(images, generator(0))
    assert torch.equal(result.images, images)
    assert float(result.masks.sum()) == 0.0
    assert result.families == ("clean",) * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_same_defects_on_the_gpu(family: str) -> None:
    images = textured(3)
    synthesizer = AnomalySynthesizer([family], clean_fraction=0.0)
    cpu, gpu = synthesizer(images, generator(0)), synthesizer(images.cuda(), generator(0))
    assert gpu.images.is_cuda
    assert float((cpu.masks - gpu.masks.cpu()).abs().mean()) < 0.01
    assert float((cpu.images - gpu.images.cpu()).abs().mean()) < 0.01
