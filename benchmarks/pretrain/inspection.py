"""Stage "inspection": synthetic defects, words for them, and matching against a clean reference."""

from __future__ import annotations

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_vtfusion import prompting
from anomalib_vtfusion.synthesis import AnomalySynthesizer
from benchmarks.pretrain import losses
from benchmarks.pretrain.batches import names_batch, paired_crops, photometric, uniform
from benchmarks.pretrain.config import TEMPLATES, StageConfig
from benchmarks.pretrain.procedural import KINDS, product_pairs, uneven_light
from benchmarks.pretrain.sources import Corpus
from benchmarks.pretrain.train import (
    Normalise,
    Objective,
    Texts,
    Vocabulary,
    encode_text,
    shrink_embedding,
    tokenize,
    trim,
)

FAMILY_PHRASES: dict[str, tuple[str, ...]] = {
    "perlin": ("contamination", "a rough surface"),
    "cutpaste": ("a misplaced part", "a foreign object"),
    "scar": ("a foreign object", "a loose thread"),
    "poisson": ("a misplaced part", "a deformation"),
    "scratch": ("a scratch", "a cut"),
    "crack": ("a crack",),
    "stain": ("a stain", "contamination"),
    "hole": ("a hole",),
    "spot": ("a burn mark", "a bubble"),
    "blur": ("a worn surface",),
    "intensity": ("discoloration",),
    "colour": ("a wrong color", "discoloration"),
    "dent": ("a dent", "a bump", "a deformation"),
    "missing": ("a missing part", "a broken piece", "a chip"),
}
"""What a person would call the defects of each synthetic family."""

# Sides of the images of a step, in parts of the stage's size; there are fewer of the larger ones, so that every step
# takes about as long. Real parts are seen at every scale.
SCALES = (0.75, 1.0, 1.5, 2.0)
# How often a product comes from each pool or is rendered.
SHARES = {"textures": 0.28, "photographs": 0.32, "tiny-imagenet": 0.05, "procedural": 0.35}
# Weights of the parts of the loss.
WEIGHTS = {"match": 2.0, "rank": 1.0, "mask": 0.5, "phrase": 0.5, "names": 0.5}
WEIGHTS |= {"state": 1.0, "dense": 1.0, "order": 1.0}
GENERIC_NAMES = ("object", "part", "product", "surface", "texture", "material", "item", "component")
STRIDES = (8, 16)


def words_of_training(class_names: tuple[str, ...]) -> list[str]:
    """Prompts that hold every token the stage can meet, for the vocabulary."""
    names = (*class_names, *GENERIC_NAMES, *KINDS.values())
    return [
        *(f"a photo of a {name}." for name in names),
        *TEMPLATES,
        *prompting.TEMPLATES,
        *(state.format("object") for state in (*prompting.NORMAL_STATES, *prompting.ANOMALOUS_STATES)),
        *prompting.DEFECT_TEMPLATES,
        *prompting.DEFECTS,
    ]


class ProductBatch:
    """Queries, clean references of the same product, and the products' names.

    Args:
        corpus: Image pools.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def draw(self, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[str]]:
        """Return clean queries and references ``(count, 3, size, size)`` in [0, 1] and names."""
        shares = torch.tensor([*SHARES.values()])
        pools = torch.multinomial(shares, count, replacement=True, generator=generator).bincount(minlength=len(SHARES))
        queries, references, names = [], [], []
        # A surface looks much the same nearby, so its reference may come from a little further than a photograph's.
        ranges = {"textures": ((0.08, 0.7), 0.3), "photographs": ((0.15, 0.8), 0.1), "tiny-imagenet": ((0.5, 1.0), 0.1)}
        for name, number in zip(SHARES, pools.tolist(), strict=True):
            if not number:
                continue
            if name == "procedural":
                first, second, titles = product_pairs(number, size, generator)
            else:
                source, (area, apart) = self.corpus.training[name], ranges[name]
                rows = torch.randint(len(source.labels), (number,), generator=generator)
                first, second = paired_crops(source.take(rows), size, generator, area, apart)
                titles = [self.corpus.class_names[i] for i in source.labels[rows].tolist()]
            queries.append(first)
            references.append(second)
            names += titles
        pairs = torch.cat([torch.cat(queries), torch.cat(references)])
        first, second = self._light(pairs, generator).chunk(2)
        return first, second, names

    @staticmethod
    def _light(pairs: Tensor, generator: torch.Generator) -> Tensor:
        """Light and colour: the product's own first, the same for both views, then a little for every view."""
        count = len(pairs) // 2
        state = generator.get_state()
        first = photometric(pairs[:count], generator, 0.4, grey=0.4)
        generator.set_state(state)
        second = photometric(pairs[count:], generator, 0.4, grey=0.4)
        both = photometric(torch.cat([first, second]), generator, 0.15, grey=0.0)
        return uneven_light(both, generator)


class InspectionObjective(Objective):
    """Names, states, defect words, defect masks and matching in one loss.

    Args:
        encoder: open_clip model with the token table of ``vocabulary``; it is brought to this stage's words.
        corpus: Image pools.
        stage: Settings; ``stage.batch`` products are drawn in a step at ``stage.size`` pixels.
        vocabulary: Vocabulary of the encoder; None for the full table.
        names_images: Images for the class-name contrast, at 64 px.
    """

    encoder: open_clip.CustomTextCLIP

    def __init__(
        self,
        encoder: open_clip.CustomTextCLIP,
        corpus: Corpus,
        stage: StageConfig,
        vocabulary: Vocabulary | None,
        names_images: int = 16,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalise = Normalise()
        self.corpus = corpus
        self.names_images = names_images
        self.context_length = encoder.text.context_length
        wanted = tokenize(words_of_training(corpus.class_names), self.context_length)
        known = vocabulary.ids if vocabulary else wanted.new_empty(0)
        self.vocabulary = Vocabulary(torch.cat([known, wanted.flatten()]))
        shrink_embedding(encoder, self.vocabulary, vocabulary)
        self.texts = Texts(corpus.class_names, self.context_length, self.vocabulary)
        self.stage = stage
        self.products = ProductBatch(corpus)
        # At the stage's size the smallest defects are a few pixels and the faintest hard to see, as real ones are.
        self.synthesizer = AnomalySynthesizer(area=(0.0015, 0.08), strength=(0.25, 1.0), clean_fraction=0.2)
        reductions = {
            info["reduction"]: (i, info["num_chs"]) for i, info in enumerate(encoder.visual.trunk.feature_info)
        }
        self.indices = [reductions[stride][0] for stride in (*STRIDES, 32)]
        self.heads = nn.ModuleList(nn.Conv2d(reductions[stride][1], 1, 1) for stride in STRIDES)
        # One pair for each map and one for both together: logit = exp(gain) * distance - offset.
        self.gains = nn.Parameter(torch.full((3,), 2.5))
        self.offsets = nn.Parameter(torch.full((3,), 3.0))
        self.phrases = tuple(dict.fromkeys(p for phrases in FAMILY_PHRASES.values() for p in phrases))

    def forward(self, generator: torch.Generator, device: torch.device) -> tuple[Tensor, dict[str, float]]:
        """Draw one batch and return its loss with figures for the log."""
        scale = SCALES[int(torch.randint(len(SCALES), (1,), generator=generator))]
        products = max(4, round(self.stage.batch / scale**2))
        queries, references, names = self.products.draw(products, round(self.stage.size * scale), generator)
        damaged = self.synthesizer(queries, generator)
        noise = uniform(generator, (2 * len(queries), 1, 1, 1), 0.0, 0.02)
        pictures = torch.cat([damaged.images, references])
        pictures = pictures + noise * torch.randn(pictures.shape, generator=generator)
        maps, tokens, pooled = self._image(pictures.to(device))
        masks, labels = damaged.masks.to(device), damaged.labels.to(device)
        parts = self._matching(maps, masks, labels)
        # Without a reference to look at, every reference is one more flawless image, of the same products.
        masks, labels = torch.cat([masks, torch.zeros_like(masks)]), torch.cat([labels, torch.zeros_like(labels)])
        pairs = zip(self.heads, maps, strict=True)
        parts["mask"] = torch.stack([losses.mask_loss(head(features), masks) for head, features in pairs]).mean()
        parts |= self._words(names, damaged.families, tokens, pooled, masks, labels, generator)
        parts["names"] = self._names(generator, device)
        loss = torch.stack([WEIGHTS[name] * value for name, value in parts.items()]).sum()
        return loss, {name: value.item() for name, value in parts.items()}

    def _image(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Maps of both strides, dense joint-space tokens ``(B, D, h, w)`` and pooled vectors ``(B, D)`` (unit)."""
        visual = self.encoder.visual
        images = self.normalise(images).contiguous(memory_format=torch.channels_last)
        *maps, last = visual.trunk.forward_intermediates(images, indices=self.indices, intermediates_only=True)
        tokens = visual.head(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        pooled = visual.head(last.mean((2, 3)))
        return [m.float() for m in maps], F.normalize(tokens.float(), dim=1), F.normalize(pooled.float(), dim=1)

    def _matching(self, maps: list[Tensor], masks: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Distance of query patches to the nearest reference patch, for each map and for both together."""
        count = len(masks)
        units = losses.patch_vectors(maps)
        match, rank = masks.new_zeros(()), masks.new_zeros(())
        for number, features in enumerate([*units, torch.cat(units, 1) * 0.5**0.5]):
            distance = losses.nearest_distance(features[:count], features[count:])
            logits = self.gains[number].exp() * distance - self.offsets[number]
            match = match + losses.matching_loss(logits, masks) / 3
            rank = rank + losses.ranking_loss(logits, labels) / 3
        return {"match": match, "rank": rank}

    def _words(
        self,
        names: list[str],
        families: tuple[str, ...],
        tokens: Tensor,
        pooled: Tensor,
        masks: Tensor,
        labels: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """State of the image, state of every location, and the word for the defect.

        Args:
            names: Name of each of ``N`` products.
            families: Synthetic family drawn on each query.
            tokens: Dense tokens of queries and references ``(2N, D, h, w)``.
            pooled: Pooled vectors of the same ``(2N, D)``.
            masks: Defect masks of the same ``(2N, 1, H, W)``, zero for references.
            labels: 1 for damaged images ``(2N,)``.
            generator: Source of the choice of prompts.
        """

        def pick(options: tuple[str, ...]) -> str:
            return options[int(torch.randint(len(options), (1,), generator=generator))]

        own = [pick(GENERIC_NAMES) if torch.rand(1, generator=generator) < 0.4 else name for name in names]
        normal = [pick(prompting.TEMPLATES).format(pick(prompting.NORMAL_STATES).format(name)) for name in own]
        anomalous = [pick(prompting.TEMPLATES).format(pick(prompting.ANOMALOUS_STATES).format(name)) for name in own]
        object_name = pick(GENERIC_NAMES)
        phrases = [pick(prompting.DEFECT_TEMPLATES).replace("DEFECT", p).format(object_name) for p in self.phrases]
        phrases.append(pick(prompting.TEMPLATES).format(pick(prompting.NORMAL_STATES).format(object_name)))
        ids = self.vocabulary(trim(tokenize([*normal, *anomalous, *phrases], self.context_length)))
        vectors = encode_text(self.encoder, ids.to(tokens.device))
        normal_vectors, anomalous_vectors, phrase_vectors = vectors.split([len(own), len(own), len(phrases)])
        scale = self.encoder.logit_scale.exp().clamp(max=100)
        direction = scale * (anomalous_vectors - normal_vectors).repeat(2, 1)
        positives = torch.zeros(len(own), len(phrases))
        for row, family in enumerate(families):
            for phrase in FAMILY_PHRASES.get(family, ()):
                positives[row, self.phrases.index(phrase)] = 1
            if family == "clean":
                positives[row, -1] = 1
        dense = torch.einsum("bdhw,bd->bhw", tokens, direction)[:, None]
        return {
            "state": losses.balanced_bce((pooled * direction).sum(1), labels, 1 - labels),
            "dense": losses.mask_loss(dense, masks),
            "order": losses.ranking_loss(dense, labels, top=1),
            "phrase": losses.any_of_loss(scale * pooled[: len(own)] @ phrase_vectors.T, positives.to(tokens.device)),
        }

    def _names(self, generator: torch.Generator, device: torch.device) -> Tensor:
        images, labels = names_batch(self.corpus.training, self.names_images, 64, generator)
        classes, targets = losses.candidate_classes(labels, len(self.corpus.class_names), 48, generator)
        images = self.normalise(images.to(device)).contiguous(memory_format=torch.channels_last)
        vectors = F.normalize(self.encoder.visual(images).float(), dim=1)
        texts = encode_text(self.encoder, self.texts.draw(classes, generator).to(device))
        return losses.names_loss(vectors, texts, targets.to(device), self.encoder.logit_scale.exp().clamp(max=100))
