"""VTFusion in Anomalib: wires the torch model, the synthesizer and the losses to the trainer."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Score
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor
from torchvision.transforms.v2 import Compose, Resize

from anomalib_vtfusion.calibration import calibrate, calibration_views
from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.components.feature_noise import sample_feature_noise
from anomalib_vtfusion.data.deep_images import restore_deep_images
from anomalib_vtfusion.data.references import References, choose_references
from anomalib_vtfusion.loss import VTFusionLoss
from anomalib_vtfusion.post_processor import FewShotPostProcessor
from anomalib_vtfusion.prompting import ANOMALOUS_STATES, NORMAL_STATES, build_prompts, clean_class_name
from anomalib_vtfusion.synthesis import AnomalySynthesizer
from anomalib_vtfusion.synthesis.views import ViewSampler, reference_views
from anomalib_vtfusion.torch_model import Components, VTFusionModel
from anomalib_vtfusion.trainer_setup import (
    TrainingDataSwap,
    check_counts,
    checked_datamodule,
    checked_transform,
    fit_settings,
    replace_trainer_defaults,
)

logger = logging.getLogger(__name__)


class VTFusion(AnomalibModule):
    """Few-shot anomaly detection from a handful of normal images and the name of the part.

    Args:
        class_name: What the images show, for the text prompts. None takes the datamodule's category.
        k_shot: Number of normal training images to use as references; None for all.
        few_shot_source: Folder of normal images to use instead of the datamodule's training images.
        encoder: open_clip model name, ``vtfusion-tiny`` (shipped, needs no download) or ``local-dir:PATH``.
        weights: Tag or file of the encoder's weights; None for the encoder's default, "" for random ones.
        layers: Layers of the image tower to use; None for the tower's default.
        image_size: Side or (height, width) that images are resized to; None for the encoder's own.
        image_encoder: timm name of a ViT (DINOv2, DINOv3) whose averaged blocks are the patch features; None for none.
        image_weights: File of the image encoder's weights; None for its own, "" for random ones.
        normal_prompts: Phrases of the normal state instead of the built-in ensemble; ``{}`` stands for the class name.
        anomaly_prompts: Phrases of the anomalous state instead of the built-in ensemble.
        defects: Defect phrases for the explanation instead of the built-in vocabulary.
        learnable_context: Number of learnable context tokens in the state prompts.
        image_adapter: Adapt the image features (paper's RQ1).
        text_adapter: Adapt the text features (paper's RQ1).
        synthetic_anomalies: Train on synthetic anomalies (paper's RQ3). Without them there are no labels to learn the
            map, the score or the text from: only the image adapter trains, by pulling the references together.
        fusion_block: Exchange between image and text tokens (paper's RQ2).
        text_guidance: Text guidance of the segmentation network (paper's RQ4).
        anomaly_families: Families of synthetic anomalies to draw from; None for all.
        texture_source: Folder of texture images to blend into synthetic anomalies; None takes them from the references.
        rotate_references: Flipped and turned references count as normal. Switch off where orientation matters.
        bank_size: Most rows of the reference bank a layer.
        prior: Start the fit from weights learned on many small tasks, where the encoder brings them along.
        num_steps: Optimiser steps of the fit; None for 20 from a prior, else 60. 0 without a prior gives the
            training-free detector.
        learning_rate: Highest learning rate of the one-cycle schedule; None for 2e-4 from a prior, else 1e-3.
        seed: Seed of the references, initial weights and synthetic anomalies.
        pre_processor: Anomalib pre-processor or flag; the default only resizes, the encoder normalises.
        post_processor: Anomalib post-processor or flag.
        evaluator: Anomalib evaluator or flag.
        visualizer: Anomalib visualizer or flag.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib_vtfusion import VTFusion
        >>> model = VTFusion(encoder="vtfusion-tiny", k_shot=2)
        >>> Engine().train(model, datamodule=MVTecAD(category="grid"))  # doctest: +SKIP
    """

    def __init__(
        self,
        class_name: str | None = None,
        k_shot: int | None = None,
        few_shot_source: str | None = None,
        encoder: str = "ViT-B-16-plus-240",
        weights: str | None = None,
        layers: Sequence[int] | None = None,
        image_size: int | tuple[int, int] | None = None,
        image_encoder: str | None = None,
        image_weights: str | None = None,
        normal_prompts: list[str] | None = None,
        anomaly_prompts: list[str] | None = None,
        defects: list[str] | None = None,
        learnable_context: int = 0,
        image_adapter: bool = True,
        text_adapter: bool = True,
        synthetic_anomalies: bool = True,
        fusion_block: bool = True,
        text_guidance: bool = True,
        anomaly_families: list[str] | None = None,
        texture_source: str | None = None,
        rotate_references: bool = True,
        bank_size: int = 2048,
        prior: bool = True,
        num_steps: int | None = None,
        learning_rate: float | None = None,
        seed: int = 0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Everything that can be wrong with the arguments shows before the weights are loaded.
        check_counts(k_shot, num_steps)
        prompt_options = {"normal_prompts": normal_prompts, "anomaly_prompts": anomaly_prompts, "defects": defects}
        build_prompts(class_name or "object", **prompt_options)
        synthesizer = AnomalySynthesizer(anomaly_families, texture_source=texture_source)
        towers = VisionTextEncoder(encoder, weights, layers, image_size, image_encoder, image_weights)
        super().__init__(
            pre_processor=self.configure_pre_processor(towers.image_size) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.class_name = class_name
        self.k_shot = k_shot
        self.few_shot_source = few_shot_source
        self.prompt_options = prompt_options
        self.seed = seed
        self.rotate_references = rotate_references
        self.synthetic_anomalies = synthetic_anomalies
        self.model: VTFusionModel = VTFusionModel(
            towers,
            Components(image_adapter, text_adapter, fusion_block, text_guidance),
            learnable_context=learnable_context,
            bank_size=bank_size,
            seed=seed,
            prior=prior,
        )
        self.num_steps, self.learning_rate = fit_settings(self.model.has_prior, num_steps, learning_rate)
        self.loss = VTFusionLoss()
        self.synthesizer = synthesizer
        self.view_sampler = ViewSampler(turn=rotate_references)
        self._references: References | None = None
        self._training_data = TrainingDataSwap()
        self._settled_at: int | None = None

    # -- fit: references and data -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Choose and read the references, embed the prompts and lay out one epoch of ``num_steps`` batches."""
        if stage != "fit":
            return
        datamodule = checked_datamodule(self.trainer)
        size = self.model.encoder.image_size
        transform = checked_transform(self.pre_processor, size)
        replace_trainer_defaults(self.trainer, datamodule)
        self._references = choose_references(datamodule, self.k_shot, self.seed, self.few_shot_source, transform, size)
        class_name = self.class_name or clean_class_name(datamodule.category or datamodule.name)
        logger.info("%s: %d references, prompts for %r.", self.name, len(self._references.paths), class_name)
        prompts = build_prompts(class_name, **self.prompt_options)
        self.model.set_prompts(prompts)
        # A learnable context takes the place of the templates, so it stands in front of the bare states.
        self._state_phrases = (
            prompts.normal if self.prompt_options["normal_prompts"] else [s.format(class_name) for s in NORMAL_STATES],
            prompts.anomalous
            if self.prompt_options["anomaly_prompts"]
            else [s.format(class_name) for s in ANOMALOUS_STATES],
        )
        if self.model.text_features.context is None:
            self.model.encoder.drop_text_tower()
        rows = max(1, self.num_steps if self._trains else 1) * datamodule.train_batch_size
        self._training_data.replace(datamodule, self._references.repeated(datamodule.train_data, rows))

    def on_fit_start(self) -> None:
        """Fill the reference bank and measure its statistics."""
        # The order of the loader and the workers' augmentations come from the global generator.
        torch.manual_seed(self.seed)
        self._generator = torch.Generator().manual_seed(self.seed)
        images = self._reference_images
        views, owners = reference_views(images, self.rotate_references)
        self.model.eval()
        self.model.set_references(views, owners, torch.Generator().manual_seed(self.seed))
        if self._trains:  # else `_settle` measures the same
            self.model.set_statistics(*calibration_views(images, self.view_sampler, self.seed))
        self.model.train()  # Lightning leaves the mode as it finds it
        self._settled_at = None

    def on_fit_end(self) -> None:
        """Free the text tower: what it said is stored, behind a learnable context too."""
        self.model.encoder.drop_text_tower()

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's own, and the one that gives the datamodule its training data back."""
        return [*super().configure_callbacks(), self._training_data]  # type: ignore[misc]

    # -- fit: steps ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Vary the references of the batch, damage most of them, and compare the prediction with the damage."""
        del args, kwargs
        if not self._trains or self._references is None:
            return None
        own = self._references.indices(batch.image_path).to(self.device)
        views = self.view_sampler(restore_deep_images(batch), self._generator)
        mask = views.new_zeros(len(views), 1, *views.shape[-2:])
        noise = None
        if self.synthetic_anomalies:
            damaged = self.synthesizer(views, self._generator)
            views, mask = damaged.images, damaged.masks
            noise = sample_feature_noise(len(views), self.model.grid, self._generator)
            noise.region.mul_(1 - damaged.labels.cpu()[:, None, None, None])
            mask = torch.maximum(mask, torch.nn.functional.interpolate(noise.region.to(mask), size=mask.shape[-2:]))
        self.model.text_features.embed_with_context(self.model.encoder, self._state_phrases)
        prediction = self.model.predict(views, own, noise)
        losses = self.loss(prediction.logits, prediction.text_logits, prediction.distances, prediction.score, mask)
        if not self.synthetic_anomalies:
            losses = {"distance": losses["distance"], "total": losses["distance"]}
        total = losses.pop("total")
        self.log("train_loss", total.detach(), prog_bar=True, batch_size=len(views))
        self.log_dict({f"train_{name}_loss": part.detach() for name, part in losses.items()}, batch_size=len(views))
        return total

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a one-cycle schedule over the whole fit; nothing when no component trains."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not self._trains:
            return None
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.1,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_validation_start(self) -> None:
        """During the fit, bring bank, statistics and thresholds up to date with the adapters before they are used."""
        if self.trainer.training or self.trainer.sanity_checking:
            self._settle()

    def on_train_epoch_end(self) -> None:
        """Bring bank, statistics and thresholds up to date before the checkpoint is written."""
        self._settle()

    def _settle(self) -> None:
        """Store what inference needs: adapted bank, baked text, statistics, thresholds."""
        if self._settled_at == self.global_step or self._references is None:
            return
        self._settled_at = self.global_step
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            self.model.text_features.embed_with_context(self.model.encoder, self._state_phrases)
            self.model.refresh_keys()
            views, own = calibration_views(self._reference_images, self.view_sampler, self.seed)
            self.model.set_statistics(views, own)
            if isinstance(self.post_processor, FewShotPostProcessor):
                calibrate(self.post_processor, self.model, views, own, seed=self.seed + 1)
        self.model.train(training)

    @property
    def _reference_images(self) -> Tensor:
        if self._references is None:
            msg = "The references are read when a fit is set up."
            raise RuntimeError(msg)
        return self._references.images.to(self.device)

    @property
    def _trains(self) -> bool:
        """Whether there is anything to learn, and something to learn it from."""
        return self.num_steps > 0 and (self.synthetic_anomalies or self.model.components.image_adapter)

    # -- validation, test, prediction ---------------------------------------------------------------------------------

    def validation_step(self, batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict maps and scores."""
        del args, kwargs
        return batch.update(**self.model(restore_deep_images(batch))._asdict())

    def test_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict maps, scores and explanations."""
        del batch_idx, args, kwargs
        return self._explained(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Predict maps, scores and explanations."""
        del batch_idx, dataloader_idx
        return self._explained(batch)

    def _explained(self, batch: Any) -> Any:
        """Predictions, and for each image called anomalous the defect phrases that fit its anomaly best."""
        prediction = self.model.predict(restore_deep_images(batch))
        scores, maps = self.model.to_probabilities(prediction, batch.image.shape[-2:])
        post_processor = self.post_processor if isinstance(self.post_processor, PostProcessor) else None
        labels = post_processor(InferenceBatch(pred_score=scores)).pred_label if post_processor else None
        phrases = self.model.explain(prediction)
        anomalous = (scores > 0.5 if labels is None else labels)[:, 0].tolist()
        explanation = [", ".join(found) if called else "" for found, called in zip(phrases, anomalous, strict=True)]
        return batch.update(pred_score=scores, anomaly_map=maps, explanation=explanation)

    # -- what Anomalib asks of a model --------------------------------------------------------------------------------

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Nothing: what is set here would override the user's own ``--trainer.*``."""
        return {}

    @property
    def learning_type(self) -> LearningType:
        """One-class: Anomalib's engine does not train models that call themselves few-shot."""
        return LearningType.ONE_CLASS

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize only: the encoder normalises, so that images stay in ``[0, 1]`` for the synthetic anomalies."""
        return PreProcessor(transform=Compose([Resize(image_size or (256, 256), antialias=True)]))

    def configure_post_processor(self) -> PostProcessor:
        """Thresholds that need no anomalous image."""
        return FewShotPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Image and pixel AUROC, AUPR and F1, and AUPRO."""
        image = [metric(fields=["pred_score", "gt_label"], prefix="image_") for metric in (AUROC, AUPR)]
        pixel = [
            metric(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False) for metric in (AUROC, AUPR, AUPRO)
        ]
        image_f1 = F1Score(fields=["pred_label", "gt_label"], prefix="image_")
        pixel_f1 = F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False)
        return Evaluator(test_metrics=[*image, image_f1, *pixel, pixel_f1])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the optimiser's state out: the fit is short, its last step is kept, and it would triple the file."""
        super().on_save_checkpoint(checkpoint)
        checkpoint.pop("optimizer_states", None)
        checkpoint.pop("lr_schedulers", None)
