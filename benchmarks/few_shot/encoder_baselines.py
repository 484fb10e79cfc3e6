"""PatchCore and PaDiM on an image tower of VTFusion, so that method and encoder can be told apart.

The methods are Anomalib's own; only the network that the features come from is another. Both also run where the
reference is a single image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.models import Padim, Patchcore
from anomalib.models.components import MultiVariateGaussian
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms.v2 import Resize

from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.components.frozen_state import leave_out_of_state


class EncoderFeatures(nn.Module):
    """Maps of an image tower in the form that Anomalib's feature extractors have.

    Args:
        encoder: Name of the encoder, as :class:`~anomalib_vtfusion.VTFusion` takes it.
        weights: Its weights.
        layers: Its layers; None for the tower's default, which is VTFusion's too.
        image_size: Input size; None for the encoder's own.

    Attributes:
        layers: Names of the maps, the finest first.
        out_dims: Channels of the maps, in that order.
        image_size: Input ``(H, W)``.
    """

    def __init__(
        self,
        encoder: str,
        weights: str | None = None,
        layers: Sequence[int] | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = VisionTextEncoder(encoder, weights, layers, image_size)
        self.encoder.drop_text_tower()
        grids = self.encoder.grids
        self._order = sorted(range(len(grids)), key=lambda i: -grids[i][0] * grids[i][1])
        self.layers = [f"layer{self.encoder.layers[i]}" for i in self._order]
        self.out_dims = [self.encoder.channels[i] for i in self._order]
        self.image_size = self.encoder.image_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of ``images`` ``(B, 3, H, W)`` in ``[0, 1]`` by name, each ``(B, C, h, w)``."""
        maps = self.encoder.encode_image(images).maps
        return {name: maps[i].float() for name, i in zip(self.layers, self._order, strict=True)}


class EncoderPatchcore(Patchcore):
    """PatchCore (Roth et al. 2022) on a vision-text encoder's image tower.

    Args:
        encoder: Name of the encoder.
        weights: Its weights.
        layers: Its layers; None for the tower's default.
        image_size: Input size; None for the encoder's own.
        coreset_sampling_ratio: Share of the patches to keep. 1, all of them, is right for a handful of references.
        num_neighbors: Neighbours in the weight of the image score.
        **parts: Anomalib's ``post_processor``, ``evaluator`` and ``visualizer``.
    """

    def __init__(
        self,
        encoder: str = "vtfusion-tiny",
        weights: str | None = None,
        layers: list[int] | None = None,
        image_size: int | tuple[int, int] | None = None,
        coreset_sampling_ratio: float = 1.0,
        num_neighbors: int = 9,
        **parts: Any,
    ) -> None:
        features = EncoderFeatures(encoder, weights, layers, image_size)
        super().__init__(
            backbone="resnet18",
            layers=["layer1"],
            pre_trained=False,
            coreset_sampling_ratio=coreset_sampling_ratio,
            num_neighbors=num_neighbors,
            pre_processor=resize_to(features.image_size),
            **parts,
        )
        model: Any = self.model
        model.feature_extractor = features  # in place of the network that the line above made
        self.model.layers = features.layers
        leave_out_of_state(self.model, "feature_extractor")

    def fit(self) -> None:
        """Make the memory bank; without subsampling there is nothing to choose, and choosing is slow."""
        if self.coreset_sampling_ratio < 1:
            super().fit()
            return
        self.model.memory_bank = torch.vstack(self.model.embedding_store)
        self.model.embedding_store.clear()


class FewShotGaussian(MultiVariateGaussian):
    """Anomalib's Gaussian, whose covariance of a single image divides zero by zero; here it is zero."""

    @staticmethod
    def _cov(observations: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(observations) == 1:
            return observations.new_zeros(observations.shape[1], observations.shape[1])
        return MultiVariateGaussian._cov(observations, *args, **kwargs)


class FewShotPadim(Padim):
    """PaDiM (Defard et al. 2021) as Anomalib has it, which also takes a single reference.

    Args:
        *args: As Anomalib's.
        **kwargs: As Anomalib's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.gaussian = FewShotGaussian()


class EncoderPadim(FewShotPadim):
    """PaDiM on a vision-text encoder's image tower.

    Args:
        encoder: Name of the encoder.
        weights: Its weights.
        layers: Its layers; None for the tower's default.
        image_size: Input size; None for the encoder's own.
        n_features: Channels to keep, chosen at random; at most as many as there are.
        **parts: Anomalib's ``post_processor``, ``evaluator`` and ``visualizer``.
    """

    def __init__(
        self,
        encoder: str = "vtfusion-tiny",
        weights: str | None = None,
        layers: list[int] | None = None,
        image_size: int | tuple[int, int] | None = None,
        n_features: int = 100,
        **parts: Any,
    ) -> None:
        features = EncoderFeatures(encoder, weights, layers, image_size)
        super().__init__(
            backbone="resnet18",
            layers=["layer1"],
            pre_trained=False,
            n_features=1,
            pre_processor=resize_to(features.image_size),
            **parts,
        )
        channels = sum(features.out_dims)
        model: Any = self.model
        model.feature_extractor = features  # in place of the network that the line above made
        self.model.layers = features.layers
        self.model.n_features_original = channels
        self.model.n_features = min(n_features, channels)
        self.model.idx = torch.randperm(channels)[: self.model.n_features]
        leave_out_of_state(self.model, "feature_extractor")


def resize_to(size: tuple[int, int]) -> PreProcessor:
    """Pre-processor that resizes and does not normalise, which the encoder does itself."""
    return PreProcessor(transform=Resize(size, antialias=True))
