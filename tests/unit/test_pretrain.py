"""The pretraining recipe: sources, losses, a run of a few steps, resuming and export."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from anomalib_vtfusion import prompting
from anomalib_vtfusion.components.encoder_weights import PRIOR_NAME
from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.components.prior import trained_parameters
from anomalib_vtfusion.synthesis import FAMILIES
from anomalib_vtfusion.torch_model import VTFusionModel
from benchmarks.pretrain import losses
from benchmarks.pretrain.batches import crops_alike, names_batch, paired_crops
from benchmarks.pretrain.config import StageConfig, encoder_config
from benchmarks.pretrain.export import CONFIG_NAME, WEIGHTS_NAME
from benchmarks.pretrain.inspection import FAMILY_PHRASES, InspectionObjective
from benchmarks.pretrain.procedural import product_pairs
from benchmarks.pretrain.recipe import FOLDER, train
from benchmarks.pretrain.sources import Corpus, load_corpus
from benchmarks.pretrain.train import NamesObjective, Vocabulary, create_encoder, encode_text, one_cycle, run_stage

CPU = torch.device("cpu")
NAMES = StageConfig("names", steps=3, minutes=None, size=32, batch=8, learning_rate=1e-3)
INSPECTION = StageConfig("inspection", steps=2, minutes=None, size=64, batch=8, learning_rate=1e-3)
PRIOR = StageConfig("prior", steps=2, minutes=None, size=64, batch=2, learning_rate=1e-3)
STAGES = (NAMES, INSPECTION, PRIOR)


def write_image(path: Path, seed: int, size: int = 64) -> None:
    """Write a picture of smooth random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Read three small sources laid out as their publishers do."""
    root = tmp_path_factory.mktemp("sources")
    tiny = root / "tiny"
    for number, synset in enumerate(("n01443537", "n01629819")):
        for image in range(4):
            write_image(tiny / "train" / synset / "images" / f"{synset}_{image}.JPEG", 10 * number + image)
    (tiny / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n")
    for name in ("banded", "cracked"):
        for image in range(10):
            write_image(root / "textures" / name / f"{name}_{image:04d}.jpg", image, 80)
    write_image(root / "textures" / "images" / "logo.png", 0)
    for image, name in enumerate(["goldfish", *(f"thing_{number}" for number in range(1, 10))]):
        write_image(root / "photographs" / f"n0144{image:04d}_{name}.JPEG", image)
    return load_corpus(tiny, root / "textures", root / "photographs", root / "cache")


def test_sources_share_names_and_hold_out_every_tenth(corpus: Corpus) -> None:
    assert corpus.class_names[:4] == ("goldfish", "European fire salamander", "banded texture", "cracked texture")
    assert "thing 3" in corpus.class_names
    assert corpus.class_names.count("goldfish") == 1
    assert {name: len(source.labels) for name, source in corpus.training.items()} == {
        "tiny-imagenet": 8,
        "textures": 18,
        "photographs": 9,
    }
    assert {name: len(source.labels) for name, source in corpus.held_out.items()} == {"textures": 2, "photographs": 1}
    assert corpus.training["photographs"].labels[0] == 0


def test_take_keeps_the_order_asked_for(corpus: Corpus) -> None:
    source = corpus.training["tiny-imagenet"]
    taken = source.take(torch.tensor([5, 0, 5]))
    assert torch.equal(taken[0], taken[2])
    assert torch.equal(taken[1].permute(1, 2, 0), torch.from_numpy(source.images[0]))


def test_missing_source_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"words\.txt"):
        load_corpus(tmp_path, tmp_path, tmp_path, tmp_path / "cache")


def test_batches_depend_on_the_generator_alone(corpus: Corpus) -> None:
    draws = [names_batch(corpus.training, 8, 32, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert draws[0][0].shape == (8, 3, 32, 32)
    assert 0 <= draws[0][0].min() < draws[0][0].max() <= 1


def test_paired_crops_show_the_same_place_when_not_apart(corpus: Corpus) -> None:
    images = corpus.training["photographs"].take(torch.arange(8))
    near = paired_crops(images, 32, torch.Generator().manual_seed(0), (0.2, 0.4), 0.0)
    far = paired_crops(images, 32, torch.Generator().manual_seed(0), (0.2, 0.4), 1.0)
    assert torch.equal(near[0], far[0])
    assert (near[0] - near[1]).abs().mean() < 0.5 * (far[0] - far[1]).abs().mean()


def test_rendered_products_come_in_pairs() -> None:
    first, second, names = product_pairs(12, 32, torch.Generator().manual_seed(0))
    assert first.shape == second.shape == (12, 3, 32, 32)
    assert len(names) == 12
    assert len(set(names)) > 4
    assert not torch.equal(first, second)
    # Two views of one product are alike in colour; those of different products are not.
    means, others = first.mean((2, 3)), second.mean((2, 3))
    assert (means - others).abs().mean() < 0.3 * (means - others.roll(1, 0)).abs().mean()


def test_every_family_has_words_of_the_prompt_builder() -> None:
    assert set(FAMILY_PHRASES) == set(FAMILIES)
    assert {phrase for phrases in FAMILY_PHRASES.values() for phrase in phrases} <= set(prompting.DEFECTS)


def test_references_count_as_flawless_images(corpus: Corpus) -> None:
    torch.manual_seed(0)
    objective = InspectionObjective(create_encoder(encoder_config()), corpus, INSPECTION, None)
    tokens = torch.nn.functional.normalize(torch.randn(4, 192, 2, 2), dim=1)
    masks, labels = torch.zeros(4, 1, 8, 8), torch.tensor([1.0, 0.0, 0.0, 0.0])
    masks[0, :, :4, :4] = 1

    def found(references: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = torch.cat([tokens[:2], references])
        pooled = torch.nn.functional.normalize(seen.mean((2, 3)), dim=1)
        generator = torch.Generator().manual_seed(1)  # the same prompts
        return objective._words(["a", "b"], ("crack", "clean"), seen, pooled, masks, labels, generator)

    ahead, opposite = found(tokens[2:]), found(-tokens[2:])
    assert torch.equal(ahead["phrase"], opposite["phrase"])  # the word for a defect is asked of queries alone
    for part in ("state", "dense", "order"):
        assert not torch.isclose(ahead[part], opposite[part]), part


def test_candidates_hold_every_label() -> None:
    labels = torch.tensor([7, 3, 7, 90])
    classes, targets = losses.candidate_classes(labels, 100, 10, torch.Generator().manual_seed(0))
    assert len(classes) == 10
    assert torch.equal(classes[targets], labels)


def test_nearest_distance_finds_the_moved_patch() -> None:
    references = torch.nn.functional.one_hot(torch.arange(4), 4).float().view(1, 2, 2, 4).permute(0, 3, 1, 2)
    queries = references.flip(3).clone()
    queries[0, :, 1, 1] = torch.tensor([0.0, 0.0, 0.0, -1.0])
    expected = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]])
    assert torch.allclose(losses.nearest_distance(queries, references), expected)


def test_mask_loss_ignores_the_rim_and_keeps_tiny_defects() -> None:
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 33, 33] = 1  # one pixel of the cell (4, 4) of an 8 x 8 grid
    right = torch.full((1, 1, 8, 8), -20.0)
    right[..., 4, 4] = 20.0
    assert losses.mask_loss(right, masks) < 1e-6
    rim = right.clone()
    rim[..., 3, 3] = 20.0
    assert losses.mask_loss(rim, masks) < 1e-6
    assert losses.mask_loss(-right, masks) > 19


def test_ranking_loss_counts_wrong_pairs() -> None:
    logits = torch.tensor([10.0, -10.0, 30.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert losses.ranking_loss(logits, torch.tensor([1.0, 0.0, 1.0])) < 1e-6
    assert losses.ranking_loss(logits, torch.tensor([0.0, 1.0, 0.0])) == pytest.approx(30.0, abs=1e-3)


def test_any_of_loss_lets_the_answers_share() -> None:
    logits = torch.tensor([[20.0, 20.0, 0.0]])
    assert losses.any_of_loss(logits, torch.tensor([[1.0, 1.0, 0.0]])) < 1e-6
    assert losses.any_of_loss(logits, torch.tensor([[1.0, 0.0, 0.0]])) == pytest.approx(0.6931, abs=1e-3)


def test_one_cycle_rises_and_falls() -> None:
    assert one_cycle(0.05, 0.05) == pytest.approx(1.0)
    assert one_cycle(0.025, 0.05) == pytest.approx(0.5)
    assert one_cycle(1.0, 0.05) == pytest.approx(0.01)


def test_short_text_gives_the_vector_of_the_full_one() -> None:
    torch.manual_seed(0)
    encoder = create_encoder(encoder_config()).eval()
    tokens = open_clip.SimpleTokenizer(context_length=32)(["a photo of a brick", "a grid"])
    with torch.no_grad():
        full = encoder.encode_text(tokens, normalize=True)
        short = encode_text(encoder, tokens[:, :8])
    assert torch.allclose(full, short, atol=1e-5)


def test_vocabulary_keeps_the_end_token_largest() -> None:
    tokens = torch.tensor([[49406, 320, 49407, 0]])
    vocabulary = Vocabulary(tokens)
    assert vocabulary(tokens).tolist() == [[2, 1, 3, 0]]


@pytest.fixture(scope="module")
def uninterrupted(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train all stages for a few steps."""
    output = tmp_path_factory.mktemp("run")
    train(corpus, STAGES, output)
    return output


def test_resuming_gives_the_same_weights(corpus: Corpus, uninterrupted: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(encoder_config()).to(memory_format=torch.channels_last)
    objective = NamesObjective(encoder, corpus, NAMES)

    def stop(average: torch.nn.Module, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(objective, NAMES, tmp_path, seed=0, device=CPU, save_every_s=0, after_checkpoint=stop)
    assert torch.load(tmp_path / "names.pt", weights_only=True)["step"] == 1
    train(corpus, STAGES, tmp_path, resume=True)
    for stage in ("names", "inspection", "prior"):
        expected = torch.load(uninterrupted / f"{stage}.pt", weights_only=True)
        found = torch.load(tmp_path / f"{stage}.pt", weights_only=True)
        assert found["step"] == expected["step"]
        for name, value in expected["average"].items():
            assert torch.equal(found["average"][name], value), name


def test_going_on_from_an_encoder_keeps_what_it_knows(corpus: Corpus, uninterrupted: Path, tmp_path: Path) -> None:
    still = (None, replace(INSPECTION, steps=1, learning_rate=0.0), replace(PRIOR, steps=1))
    train(corpus, still, tmp_path, start=uninterrupted / FOLDER)
    assert not (tmp_path / "names.pt").exists()
    expected, found = (load_file(folder / FOLDER / WEIGHTS_NAME) for folder in (uninterrupted, tmp_path))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if "running_" not in name and "num_batches" not in name:  # statistics of the one batch it saw
            assert torch.equal(found[name], value), name


def test_the_prior_alone_goes_on_from_what_lies_there(corpus: Corpus, uninterrupted: Path, tmp_path: Path) -> None:
    train(corpus, (None, None, replace(PRIOR, steps=1, learning_rate=0.0)), tmp_path, start=uninterrupted / FOLDER)
    before, after = uninterrupted / FOLDER, tmp_path / FOLDER
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (after / name).read_bytes() == (before / name).read_bytes()
    expected, found = load_file(before / PRIOR_NAME), load_file(after / PRIOR_NAME)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_changed_encoder_goes_on_from_its_former_prior(corpus: Corpus, uninterrupted: Path, tmp_path: Path) -> None:
    stages = (None, replace(INSPECTION, steps=1), replace(PRIOR, steps=1, learning_rate=0.0))
    train(corpus, stages, tmp_path, start=uninterrupted / FOLDER)
    before, after = uninterrupted / FOLDER, tmp_path / FOLDER
    assert (after / WEIGHTS_NAME).read_bytes() != (before / WEIGHTS_NAME).read_bytes()
    expected, found = load_file(before / PRIOR_NAME), load_file(after / PRIOR_NAME)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert VTFusionModel(VisionTextEncoder(f"local-dir:{after}", image_size=64), prior=True).has_prior


def test_an_encoder_built_otherwise_is_refused(corpus: Corpus, uninterrupted: Path, tmp_path: Path) -> None:
    config = encoder_config(embed_dim=64)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'embed_dim': 64.* but the recipe trains .*'embed_dim': 192"):
        train(corpus, (None, *STAGES[1:]), tmp_path / "run", start=tmp_path)


def test_class_names_are_not_trained_again(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either the stage"):
        train(corpus, STAGES, tmp_path, start=tmp_path)


def test_export_loads_in_open_clip(uninterrupted: Path) -> None:
    folder = uninterrupted / FOLDER
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert config == encoder_config()
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    average = torch.load(uninterrupted / "inspection.pt", weights_only=True)["average"]
    for name, value in model.state_dict().items():
        if name != "text.token_embedding.weight":
            assert torch.allclose(value.float(), average[name].float(), rtol=1e-3, atol=1e-6), name
    rows = model.text.token_embedding.weight
    seen = rows.abs().sum(1) > 0
    assert seen.sum() == len(average["text.token_embedding.weight"])
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    tokens = tokenizer(["a photo of a goldfish with a scratch."])
    assert seen[tokens].all()
    trained = create_encoder(config).eval()
    trained.load_state_dict(average | {"text.token_embedding.weight": rows})
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same_image = (model.encode_image(images, normalize=True) * trained.encode_image(images, normalize=True)).sum(1)
        same_text = (model.encode_text(tokens, normalize=True) * trained.encode_text(tokens, normalize=True)).sum(1)
    assert same_image.min() > 0.999
    assert same_text.min() > 0.999


def test_the_prior_belongs_to_the_encoder(uninterrupted: Path) -> None:
    encoder = VisionTextEncoder(f"local-dir:{uninterrupted / FOLDER}", image_size=64)
    model = VTFusionModel(encoder, prior=True)
    average = torch.load(uninterrupted / "prior.pt", weights_only=True)["average"]
    for value, expected in zip(trained_parameters(model).values(), average.values(), strict=True):
        assert torch.equal(value, expected.half().float())
    assert any(
        (value - start).abs().max() > 0
        for value, start in zip(
            trained_parameters(model).values(), trained_parameters(VTFusionModel(encoder)).values(), strict=True
        )
    )


def test_crops_alike_show_one_place_or_anywhere() -> None:
    ramp = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100)
    spread = {}
    for apart in (0.0, 1.0):
        crops = crops_alike(ramp, 8, 16, torch.Generator().manual_seed(0), (0.1, 0.1), apart)
        assert crops.shape == (8, 3, 16, 16)
        spread[apart] = (255 * crops.mean((1, 2, 3))).std().item()
    assert spread[0.0] < 3 < 10 < spread[1.0]
