"""VTFusion torch model: references in, images in, anomaly map and score out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_vtfusion.components.adapters import ImageAdapter, TextAdapter, local_aggregation, resize_map, to_map
from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.components.feature_noise import FeatureNoise, add_feature_noise
from anomalib_vtfusion.components.frozen_state import leave_out_of_state
from anomalib_vtfusion.components.fusion import FusionBlock
from anomalib_vtfusion.components.predictions import base_logits, text_margin, top_mean
from anomalib_vtfusion.components.prior import load_prior
from anomalib_vtfusion.components.reference_bank import ReferenceBank
from anomalib_vtfusion.components.segmentation import ImageHead, SegmentationNet
from anomalib_vtfusion.components.text_features import TextFeatures
from anomalib_vtfusion.prompting import PromptSet

# Share of the text in the training-free evidence; the network may use it as it likes.
TEXT_WEIGHT = 0.15
# Share of the learned residual that inference keeps. What a network learns from a few images is overconfident: half of
# it beats all of it and none of it in AUPRO on most demo parts.
RESIDUAL_SHARE = 0.5
# Share of the residual's mean over the image that inference takes off: the network knows better where damage is than
# whether there is any.
RESIDUAL_MEAN_SHARE = 0.5
# Images encoded at once while the references are taken in.
CHUNK = 16


class Components(NamedTuple):
    """The paper's components that can be switched off one by one.

    Attributes:
        image_adapter: Adaptive image features (RQ1).
        text_adapter: Adaptive text features (RQ1).
        fusion_block: Cross-modal exchange (RQ2).
        text_guidance: Text in the segmentation network (RQ4).
    """

    image_adapter: bool = True
    text_adapter: bool = True
    fusion_block: bool = True
    text_guidance: bool = True


class Prediction(NamedTuple):
    """All that the losses and the explanation need of a batch.

    Attributes:
        logits: Refined map ``(B, 1, 4h, 4w)``.
        score: Image logit ``(B, 1)``.
        base: Training-free map ``(B, 1, h', w')`` on the finest encoder grid.
        text_logits: Learned text maps ``(B, T, h', w')``.
        distances: Standardised distances ``(B, L, h', w')``.
        joint_tokens: Unit tokens in the joint space ``(B, D, h, w)``, as the tower made them.
    """

    logits: Tensor
    score: Tensor
    base: Tensor
    text_logits: Tensor
    distances: Tensor
    joint_tokens: Tensor


class VTFusionModel(nn.Module):
    """Vision-text fusion network for few-shot anomaly detection (arXiv 2601.16381).

    Images are RGB in ``[0, 1]``; the encoder normalises them.

    Args:
        encoder: Frozen image and text towers.
        components: Which of the paper's components are on.
        learnable_context: Number of learnable context tokens in front of the state prompts; 0 for none.
        dim: Width ``d`` of the fused map.
        bank_size: Most rows of the reference bank a layer.
        seed: Seed of the initial weights.
        prior: Start from the weights that the encoder brings along, where it does.

    Attributes:
        has_prior: Whether the segmentation network started from a prior.

    Raises:
        ValueError: If ``learnable_context`` is negative or leaves no room for words, or ``bank_size`` is not positive.
    """

    def __init__(
        self,
        encoder: VisionTextEncoder,
        components: Components = Components(),  # noqa: B008 - immutable
        learnable_context: int = 0,
        dim: int = 256,
        bank_size: int = 4096,
        seed: int = 0,
        prior: bool = False,
    ) -> None:
        super().__init__()
        room = encoder.context_length - 3  # start, one word, end
        if not 0 <= learnable_context <= room:
            msg = f"learnable_context must be 0 (none) to {room} tokens for this encoder; got {learnable_context}."
            raise ValueError(msg)
        self.components = components
        self.encoder = encoder
        self.grid = max(encoder.grids)
        self.finest = encoder.grids.index(self.grid)
        self.fine = [layer for layer, grid in enumerate(encoder.grids) if grid == self.grid]
        layers = len(encoder.channels)
        text_maps = layers if components.image_adapter else 1
        evidence = layers + 1 + text_maps + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.image_adapter = ImageAdapter(
                encoder.channels, encoder.grids, encoder.embed_dim, dim, components.image_adapter
            )
            self.text_features = TextFeatures(encoder.embed_dim, encoder.text_width, learnable_context)
            self.text_adapter = TextAdapter(encoder.embed_dim, components.text_adapter)
            self.text_projection = nn.Linear(encoder.embed_dim, dim)
            self.reference_bank = ReferenceBank(encoder.channels, bank_size)
            self.fusion_block = FusionBlock(dim, evidence) if components.fusion_block else None
            guided_evidence = evidence if components.text_guidance else layers + 1
            self.segmentation = SegmentationNet(
                dim, encoder.channels[self.finest], guided_evidence, components.text_guidance
            )
            self.image_head = ImageHead(dim)
        self.text_scale = nn.Parameter(torch.full((text_maps,), 20.0).log())
        self.text_bias = nn.Parameter(torch.full((text_maps,), -2.0))
        self.register_buffer("margin_mean", torch.zeros(()))
        self.register_buffer("margin_std", torch.ones(()))
        self.margin_mean: Tensor
        self.margin_std: Tensor
        leave_out_of_state(self, "encoder")
        taken = load_prior(self, encoder.prior, encoder.weights_hash) if prior and encoder.prior is not None else []
        self.has_prior = "segmentation" in taken

    def forward(self, images: Tensor) -> InferenceBatch:
        """Anomaly map ``(B, 1, H, W)`` and score ``(B, 1)`` in ``(0, 1)`` of images ``(B, 3, H, W)``."""
        scores, maps = self.to_probabilities(self.predict(images), images.shape[-2:])
        return InferenceBatch(pred_score=scores, anomaly_map=maps)

    def predict(
        self,
        images: Tensor,
        own: Tensor | None = None,
        noise: FeatureNoise | None = None,
    ) -> Prediction:
        """The network from end to end.

        Args:
            images: ``(B, 3, H, W)`` in ``[0, 1]``.
            own: Index ``(B,)`` of the reference that each image shows, which it is not matched against.
            noise: Feature noise to add (training).
        """
        features = self.encoder.encode_image(images)
        maps = [feature_map.float() for feature_map in features.maps]
        if noise is not None:
            maps = [add_feature_noise(feature_map, noise) for feature_map in maps]
        tokens = self._adapted(maps)
        states = self.text_adapter(self.text_features.states)
        joint = self.image_adapter.joint_tokens(tokens) or [features.tokens.float()]

        visual = self._visual_prediction(tokens, own)
        margin = self._text_margin(features.tokens.float())
        text_logits = self._text_prediction(joint, states)
        # A CNN's coarser layers see too much around a patch to find small defects; they are evidence for the network.
        base = base_logits(visual[:, self.fine], margin, TEXT_WEIGHT)

        evidence = _compress(torch.cat([visual, margin, text_logits, base], dim=1))
        fused, guide = self._fuse(tokens, states, evidence)
        logits = self._refine(fused, tokens, evidence, base, guide)
        score = top_mean(logits) + self.image_head(fused, logits, base)
        return Prediction(logits, score, base, text_logits, visual, features.tokens)

    @staticmethod
    def to_probabilities(prediction: Prediction, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Scores ``(B, 1)`` and maps ``(B, 1, *size)`` of a prediction, in ``(0, 1)``."""
        logits = resize_map(prediction.logits.float(), (size[0], size[1]))
        return prediction.score.float().sigmoid(), logits.sigmoid()

    # -- parts of the forward pass ------------------------------------------------------------------------------------

    def _adapted(self, maps: list[Tensor]) -> list[Tensor]:
        """Adapted unit tokens ``(B, N_l, C_l)`` of the feature maps ``(B, C_l, h_l, w_l)``."""
        tokens = [local_aggregation(feature_map) for feature_map in maps]
        return self.image_adapter(self.reference_bank.centred(tokens))

    def _visual_prediction(self, tokens: list[Tensor], own: Tensor | None) -> Tensor:
        """Standardised distances ``(B, L, h', w')`` from the references."""
        keys = self._training_keys() if self.training else None
        distances = self.reference_bank.standardise(self.reference_bank.distances(tokens, keys, own))
        maps = [to_map(d[..., None], grid) for d, grid in zip(distances, self.encoder.grids, strict=True)]
        return torch.cat([resize_map(m, self.grid) for m in maps], dim=1)

    def _text_margin(self, joint_tokens: Tensor) -> Tensor:
        """Training-free text evidence ``(B, 1, h', w')``, in deviations of the references' own."""
        margin = text_margin(joint_tokens, self.text_features.states.detach())
        return resize_map((margin - self.margin_mean) / self.margin_std, self.grid)

    def _text_prediction(self, joint_tokens: list[Tensor], states: Tensor) -> Tensor:
        """Learned text logits ``(B, T, h', w')``."""
        maps = torch.cat([resize_map(text_margin(tokens, states), self.grid) for tokens in joint_tokens], dim=1)
        return maps * self.text_scale.exp()[:, None, None] + self.text_bias[:, None, None]

    def _fuse(self, tokens: list[Tensor], states: Tensor, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Fused map ``(B, d, h, w)`` and text guide ``(B, d)``."""
        fused = self.image_adapter.fuse(tokens)
        text = torch.cat([states, self.text_features.defects])
        text = self.text_projection(text)[None].expand(fused.shape[0], -1, -1)
        if self.fusion_block is not None:
            fused, text = self.fusion_block(fused, text, resize_map(evidence, self.image_adapter.grid))
        return fused, text[:, 1] - text[:, 0]

    def _refine(self, fused: Tensor, tokens: list[Tensor], evidence: Tensor, base: Tensor, guide: Tensor) -> Tensor:
        """Refined logits ``(B, 1, 4h, 4w)``: the training-free ones plus a bounded residual."""
        skip = to_map(tokens[self.finest], self.grid)
        if not self.components.text_guidance:
            visual = evidence[:, : len(tokens)]
            evidence = torch.cat([visual, evidence[:, -1:]], dim=1)
        residual = self.segmentation(fused, skip, evidence, guide)
        if not self.training:
            residual = RESIDUAL_SHARE * (residual - RESIDUAL_MEAN_SHARE * residual.mean(dim=(2, 3), keepdim=True))
        return resize_map(base, (residual.shape[-2], residual.shape[-1])) + residual

    def _training_keys(self) -> list[Tensor] | None:
        """Rows of the bank under the adapter as it is now, or None when it never changes."""
        if not self.components.image_adapter:
            return None
        return [
            self.reference_bank.weighted(layer, self.image_adapter.adapt(layer, self.reference_bank.frozen(layer)))
            for layer in range(len(self.encoder.channels))
        ]

    # -- references ---------------------------------------------------------------------------------------------------

    def set_prompts(self, prompts: PromptSet) -> None:
        """Embed the prompts of a class; the text tower is needed for this alone."""
        self.text_features.embed(self.encoder, prompts)

    @torch.no_grad()
    def set_references(self, views: Tensor, owners: Tensor, generator: torch.Generator) -> None:
        """Fill the reference bank.

        Args:
            views: All views ``(V, 3, H, W)`` of the references, in ``[0, 1]``.
            owners: Reference index ``(V,)`` of each view.
            generator: CPU generator of the thinning.
        """
        maps = zip(*(self._aggregated(chunk) for chunk in views.split(CHUNK)), strict=True)
        self.reference_bank.fill([torch.cat(layer) for layer in maps], owners, generator)
        self.refresh_keys()

    @torch.no_grad()
    def refresh_keys(self) -> None:
        """Adapt the rows of the bank with the adapter as it is now, for inference."""
        layers = range(len(self.encoder.channels))
        bank = self.reference_bank
        bank.store_keys([self.image_adapter.adapt(layer, bank.frozen(layer)) for layer in layers])

    @torch.no_grad()
    def set_statistics(self, queries: Tensor, own: Tensor) -> None:
        """Measure how far normal patches lie from the other references, and what the text says of them.

        Args:
            queries: Views ``(Q, 3, H, W)`` of the references that are not in the bank themselves.
            own: Index ``(Q,)`` of the reference that each query shows.
        """
        distances, margins = [], []
        for chunk, chunk_own in zip(queries.split(CHUNK), own.split(CHUNK), strict=True):
            features = self.encoder.encode_image(chunk)
            tokens = self._adapted([feature_map.float() for feature_map in features.maps])
            distances.append(self.reference_bank.distances(tokens, own=chunk_own))
            margins.append(text_margin(features.tokens.float(), self.text_features.states))
        self.reference_bank.store_statistics([torch.cat(layer) for layer in zip(*distances, strict=True)])
        margin = torch.cat(margins)
        self.margin_mean.copy_(margin.mean())
        self.margin_std.copy_(margin.std().clamp_min(1e-4))

    def _aggregated(self, images: Tensor) -> list[Tensor]:
        """Aggregated tokens ``(B, N_l, C_l)`` of each layer, as the tower made them."""
        return [local_aggregation(feature_map.float()) for feature_map in self.encoder.encode_image(images).maps]

    # -- explanation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def explain(self, prediction: Prediction, top: int = 3) -> list[list[str]]:
        """Defect phrases that fit the anomalous region of each image best, best first.

        The region's tokens, weighted by the map, are compared with the rest of the image, so that a phrase that fits
        the whole part does not count.

        Args:
            prediction: What `predict` returned for ``B`` images.
            top: How many phrases to give.
        """
        tokens = prediction.joint_tokens.float().flatten(2)
        weights = F.interpolate(prediction.logits.float(), size=prediction.joint_tokens.shape[-2:], mode="area")
        weights = weights.flatten(1).mul(2).softmax(dim=1)
        region = (tokens * weights[:, None]).sum(dim=2) - tokens.mean(dim=2)
        similarity = region @ self.text_features.defects.t()
        best = similarity.topk(min(top, similarity.shape[1]), dim=1).indices.tolist()
        return [[self.text_features.phrases[i] for i in row] for row in best]

    # -- state --------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, object]:
        """Which encoder the state belongs to, and the phrases behind the defect embeddings."""
        return {
            "encoder": self.encoder.name,
            "weights_hash": self.encoder.weights_hash,
            "phrases": list(self.text_features.phrases),
        }

    def set_extra_state(self, state: dict[str, object]) -> None:
        """Refuse the state of another encoder.

        Raises:
            ValueError: If the state was learned on another encoder or on other weights of it. A folder may have
                moved: the weights count, not the name.
        """
        if state["weights_hash"] != self.encoder.weights_hash:
            msg = (
                f"This checkpoint was trained on encoder {state['encoder']!r} "
                f"(weights {_short(state['weights_hash'])}), "
                f"but this model has {self.encoder.name!r} (weights {_short(self.encoder.weights_hash)}). "
                "Build VTFusion with the encoder and the weights of the checkpoint."
            )
            raise ValueError(msg)
        self.text_features.phrases = tuple(state["phrases"])  # type: ignore[arg-type]
        # The embeddings come with the state, those behind a learnable context too.
        self.encoder.drop_text_tower()


def _compress(evidence: Tensor) -> Tensor:
    """Signed logarithm: evidence of thirty deviations must not drown the features beside it."""
    return evidence.sign() * evidence.abs().log1p()


def _short(weights_hash: object) -> str:
    return f"{str(weights_hash)[:12]}…"
