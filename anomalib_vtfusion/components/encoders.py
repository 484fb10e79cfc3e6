"""Frozen image and text towers of a CLIP-like model behind one small interface.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", by way of ``open_clip``.
A second image tower, a ViT of ``timm``, may make the maps; what text is compared with always comes from the first.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .encoder_text import TextTower
from .encoder_towers import build_image_tower
from .encoder_vit import AntialiasedResize, AveragedViT
from .encoder_weights import SHIPPED_ENCODER, hash_state, load_clip

__all__ = ["SHIPPED_ENCODER", "ImageFeatures", "VisionTextEncoder"]


@dataclass
class ImageFeatures:
    """What one pass of the image tower gives.

    Attributes:
        maps: Features of the chosen layers in ascending order of layer, each ``(B, C_l, h_l, w_l)``. With an image
            encoder: averages of its lower and its upper chosen blocks.
        tokens: Dense tokens in the joint image-text space ``(B, D, h, w)``, unit length over ``D``.
        pooled: Embedding of the whole image in the joint space ``(B, D)``, unit length.
    """

    maps: list[Tensor]
    tokens: Tensor
    pooled: Tensor


class VisionTextEncoder(nn.Module):
    """Image and text towers that never train.

    All parameters have ``requires_grad=False`` and the towers stay in eval mode whatever ``train()`` is asked. Building
    leaves torch's global random state as it was.

    Args:
        encoder: ``open_clip`` model name, ``"vtfusion-tiny"``, a folder in ``open_clip`` format (``"local-dir:PATH"``
            or the path itself), a weights file in such a folder, or ``"hf-hub:ORG/REPO"``.
        weights: ``open_clip`` pretrained tag or path to a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file.
            ``None`` means the default weights of a model name and the folder's own for a folder; ``""`` means random
            weights (always the same) for a model name.
        layers: Layers whose maps are returned: blocks of a transformer, feature stages of a CNN, counted from 0.
            ``None`` takes four spread blocks or the stages of stride 8 and 16. With an image encoder: its blocks, the
            first half of which is averaged in one map and the rest in another; ``None`` takes the middle two thirds.
        image_size: Side or ``(H, W)`` of input images in pixels; ``None`` takes what the model was made for, with an
            image encoder what that was made for. Position embeddings are interpolated.
        image_encoder: A ViT of ``timm`` that makes the maps: a name with or without a pretrained tag, a folder in
            ``timm`` format (``"local-dir:PATH"`` or the path itself), or ``"hf-hub:ORG/REPO"``. It sees the images at
            ``image_size``, a multiple of its patch size; the CLIP tower sees them resized to the size it was made for,
            and its tokens are interpolated to the grid of the maps. Each has its own normalisation.
        image_weights: Path to a weights file of the image encoder. ``None`` means the tag's, folder's or repository's
            own; ``""`` means random weights (always the same).

    Attributes:
        name: ``encoder`` as given, and ``image_encoder``.
        image_size: Input ``(H, W)``.
        layers: Indices of the layers in ``ImageFeatures.maps``, or of the blocks averaged in them.
        embed_dim: Size ``D`` of the joint space.
        channels: Channels ``C_l`` of each map.
        grids: Size ``(h_l, w_l)`` of each map.
        token_grid: Size ``(h, w)`` of the dense tokens.
        prior: File with initial weights for the rest of the network that came with the weights, or None.
        weights_hash: SHA-256 of all towers' weights as loaded, the same for every image size.
        logit_scale: Factor on cosine similarity that the model was trained with.
        text_width: Size of a text token, and so of a context vector.
        context_length: Number of tokens of a prompt, context included.

    Raises:
        ValueError: If an encoder, tag or a layer is unknown, weights do not fit, or the image size does not, or if
            there are weights for an image encoder but none to put them in.
        FileNotFoundError: If a file is missing and cannot be downloaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: str = "ViT-B-16-plus-240",
        weights: str | None = None,
        layers: Sequence[int] | None = None,
        image_size: int | tuple[int, int] | None = None,
        image_encoder: str | None = None,
        image_weights: str | None = None,
    ) -> None:
        super().__init__()
        if image_encoder is None and image_weights is not None:
            raise ValueError(f"image_weights is {image_weights!r}, but there is no image_encoder to load them into.")
        size = None if image_size is None else _as_pair(image_size)
        self.name = encoder if image_encoder is None else f"{encoder} with {image_encoder}"
        self._encoder, self._weights = encoder, weights
        self.vit = None if image_encoder is None else AveragedViT(image_encoder, image_weights, layers, size)
        loaded = load_clip(encoder, weights)
        visual: Any = loaded.model.visual  # its kind is found out by build_image_tower
        self.prior = loaded.prior if self.vit is None else None
        self.text: TextTower | None = TextTower(loaded.model, loaded.tokenizer)
        # Before position embeddings are resized, so that it names the weights whatever the image size.
        self._clip_hash = self.weights_hash = hash_state([visual.state_dict(), self.text.state_dict()])
        self.image_size: tuple[int, int] = size or _as_pair(visual.image_size)
        if self.vit is None:
            self.image = build_image_tower(visual, layers, self.image_size)
            self.layers = self.image.layers
        else:
            self.weights_hash = hashlib.sha256(f"{self._clip_hash}{self.vit.weights_hash}".encode()).hexdigest()
            self.image_size, self.layers = self.vit.image_size, self.vit.layers
            self.image = build_image_tower(visual, None, _as_pair(visual.image_size))
            self.resize = AntialiasedResize(self.image_size, self.image.image_size)
        self.requires_grad_(requires_grad=False)
        self.train(mode=False)

        # Not in the state: checkpoints name the encoder instead of holding it.
        self.register_buffer("mean", torch.tensor(loaded.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(loaded.std).view(1, 3, 1, 1), persistent=False)
        self.logit_scale: float = self.text.logit_scale
        self.text_width: int = self.text.width
        self.context_length: int = self.text.context_length

        map_shapes, token_shape, pooled_shape = self._shapes()
        self.embed_dim: int = pooled_shape[1]
        self.channels: list[int] = [shape[1] for shape in map_shapes]
        self.grids: list[tuple[int, int]] = [(shape[2], shape[3]) for shape in map_shapes]
        self.token_grid: tuple[int, int] = (token_shape[2], token_shape[3])
        if self.vit is not None:
            self.channels, self.token_grid = self.vit.channels, self.vit.grid
            self.grids = [self.vit.grid] * len(self.channels)

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """Run the image towers once.

        Args:
            images: RGB images ``(B, 3, H, W)`` in ``[0, 1]``, of the encoder's ``image_size``.

        Returns:
            Layer maps, dense joint-space tokens and pooled embedding.

        Raises:
            ValueError: If the images have another size.
        """
        if torch.jit.is_tracing():
            maps, tokens, pooled = self._trace_image(images)
        elif tuple(images.shape[1:]) == (3, *self.image_size):
            maps, tokens, pooled = self._run_image(images)
        else:
            raise ValueError(
                f"Expected images (B, 3, {self.image_size[0]}, {self.image_size[1]}), got {tuple(images.shape)}."
            )
        return ImageFeatures(maps=maps, tokens=F.normalize(tokens, dim=1), pooled=F.normalize(pooled, dim=-1))

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Turn prompts into token ids.

        Args:
            prompts: At least one prompt; what exceeds the context length is cut off.

        Returns:
            Token ids ``(N, context_length)``, int64, on the CPU.

        Raises:
            ValueError: If there is no prompt or one is empty.
        """
        return self._text_tower().tokenize(prompts)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts in the joint space, without gradients.

        Args:
            prompts: At least one prompt.

        Returns:
            Embeddings ``(N, D)`` of unit length.

        Raises:
            ValueError: If there is no prompt or one is empty.
        """
        with torch.no_grad():
            return self._text_tower()(prompts)

    def encode_text_with_context(self, prompts: Sequence[str], context: Tensor) -> Tensor:
        """Embed prompts with learnable vectors put in front of their words, after the start token.

        Zhou et al. 2022, "Learning to Prompt for Vision-Language Models", Eq. 2 with the class name kept as words.

        Args:
            prompts: At least one prompt.
            context: Context vectors ``(M, text_width)``; gradients flow to them.

        Returns:
            Embeddings ``(N, D)`` of unit length.

        Raises:
            ValueError: If the context has another width or leaves no room for words.
        """
        return self._text_tower()(prompts, context)

    def drop_text_tower(self) -> None:
        """Free the text tower's memory; it is loaded again if a text is to be encoded after all."""
        self.text = None

    def train(self, mode: bool = True) -> "VisionTextEncoder":  # noqa: ARG002
        """Stay in eval mode: batch statistics and dropout of a frozen tower must not change with training."""
        return super().train(mode=False)

    def _text_tower(self) -> TextTower:
        """The text tower, loaded again from where it came if it was dropped.

        Raises:
            ValueError: If there are other weights by now.
            FileNotFoundError: If the weights are gone.
        """
        if self.text is None:
            loaded = load_clip(self._encoder, self._weights)
            visual: Any = loaded.model.visual
            text = TextTower(loaded.model, loaded.tokenizer).requires_grad_(requires_grad=False).eval()
            if hash_state([visual.state_dict(), text.state_dict()]) != self._clip_hash:
                raise ValueError(f"The weights of {self._encoder!r} have changed since it was built; build it anew.")
            self.text = text.to(self.mean.device)
        return self.text

    def _run_image(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Maps, dense tokens and pooled embedding of images ``(B, 3, H, W)`` in ``[0, 1]``."""
        if self.vit is None:
            return self.image((images - self.mean) / self.std)
        _, tokens, pooled = self.image((self.resize(images) - self.mean) / self.std)
        # Directions are interpolated: CLIP's few tokens of great length must not outweigh their neighbours.
        tokens = F.interpolate(F.normalize(tokens, dim=1), size=self.vit.grid, mode="bilinear", align_corners=False)
        return self.vit(images), tokens, pooled

    def _trace_image(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run the image tower for the TorchScript-based ONNX exporter, which cannot translate fused attention."""
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return self._run_image(images)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    def _shapes(self) -> tuple[list[torch.Size], torch.Size, torch.Size]:
        """Shapes of the CLIP tower's output for one image, by a pass on tensors without storage."""
        state = {
            name: torch.empty_like(tensor, device="meta")
            for name, tensor in [*self.image.named_parameters(), *self.image.named_buffers()]
        }
        try:
            with torch.no_grad():
                images = torch.empty(1, 3, *self.image.image_size, device="meta")
                maps, tokens, pooled = torch.func.functional_call(self.image, state, (images,))
        except (AssertionError, RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(
                f"The image tower of {self._encoder!r} cannot take images of {self.image.image_size}: {error}"
            ) from error
        return [feature.shape for feature in maps], tokens.shape, pooled.shape


def _as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"image_size must be a positive side or (height, width) in pixels, got {size!r}.")
    return pair[0], pair[1]
