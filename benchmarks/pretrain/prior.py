"""Stage "prior": VTFusion's own network on many small few-shot tasks, each with references, queries and a class name.

The encoder is frozen by now. Every step is one task: a product is drawn, some views of it are the references, others
are queries on which the synthesizer draws defects. Views differ harmlessly in pose, place, light and noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from anomalib_vtfusion.calibration import calibration_views
from anomalib_vtfusion.components.encoder_weights import PRIOR_NAME
from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.components.prior import save_prior, trained_parameters
from anomalib_vtfusion.loss import VTFusionLoss
from anomalib_vtfusion.prompting import build_prompts
from anomalib_vtfusion.synthesis import AnomalySynthesizer
from anomalib_vtfusion.synthesis.views import ViewSampler, reference_views
from anomalib_vtfusion.torch_model import VTFusionModel
from benchmarks.pretrain import workers
from benchmarks.pretrain.batches import crops_alike, photometric
from benchmarks.pretrain.config import StageConfig
from benchmarks.pretrain.inspection import GENERIC_NAMES
from benchmarks.pretrain.procedural import KINDS, render, uneven_light
from benchmarks.pretrain.sources import Corpus
from benchmarks.pretrain.train import Objective, run_stage

# How often a product comes from each pool or is rendered.
SHARES = {"textures": 0.35, "photographs": 0.25, "procedural": 0.4}
# Part of the image that a view covers, and how far views lie apart: a surface looks much the same all over.
VIEWS = {"textures": ((0.1, 0.7), 1.0), "photographs": ((0.3, 0.9), 0.1)}
SHOTS = (1, 2, 4)


class PriorObjective(Objective):
    """Loss of one small task.

    Args:
        encoder: Frozen encoder.
        corpus: Image pools.
        stage: Settings; ``stage.batch`` queries of ``stage.size`` pixels, the encoder's image size, make a task.

    Attributes:
        encoder: What trains, by name.
    """

    encoder: Parameters

    def __init__(self, encoder: VisionTextEncoder, corpus: Corpus, stage: StageConfig) -> None:
        super().__init__()
        model = VTFusionModel(encoder, bank_size=1024, prior=True)
        self._model = (model,)  # not a child: its bank changes in size and belongs to the task
        self.encoder = Parameters(trained_parameters(model))
        self.corpus, self.stage = corpus, stage
        self.synthesizer = AnomalySynthesizer()
        self.loss = VTFusionLoss()
        self.texts: dict[str, tuple[Tensor, Tensor]] = {}
        for name in dict.fromkeys((*KINDS.values(), *GENERIC_NAMES)):
            model.set_prompts(build_prompts(name))
            self.texts[name] = (model.text_features.states, model.text_features.defects)

    def forward(self, generator: torch.Generator, device: torch.device) -> tuple[Tensor, dict[str, float]]:
        """Draw one task and return its loss with figures for the log."""
        (model,) = self._model
        model.to(device)
        shots = SHOTS[int(torch.randint(len(SHOTS), (1,), generator=generator))]
        turn = bool(torch.rand(1, generator=generator) < 0.5)
        views, name = self._product(shots + self.stage.batch, generator)
        sampler = ViewSampler(turn)
        references, queries = views[:shots].to(device), views[shots:].to(device)
        if turn:
            queries = sampler(queries, generator)
        model.text_features.states, model.text_features.defects = (text.to(device) for text in self.texts[name])
        model.eval()
        model.set_references(*reference_views(references, turn), generator)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        model.set_statistics(*calibration_views(references, sampler, seed))
        model.train()
        damaged = self.synthesizer(queries, generator)
        found = model.predict(damaged.images)
        parts = self.loss(found.logits, found.text_logits, found.distances, found.score, damaged.masks)
        with torch.no_grad():
            untrained = self.loss.map_loss(found.base, damaged.masks)
        figures = {key: value.item() for key, value in parts.items()} | {"untrained_map": untrained.item()}
        return parts["total"], figures

    def _product(self, count: int, generator: torch.Generator) -> tuple[Tensor, str]:
        """Views ``(count, 3, S, S)`` of one product in [0, 1] and its name."""
        pools, size = list(SHARES), self.stage.size
        pool = pools[int(torch.multinomial(torch.tensor([*SHARES.values()]), 1, generator=generator))]
        if pool == "procedural":
            kind = list(KINDS)[int(torch.randint(len(KINDS), (1,), generator=generator))]
            views, name = render(kind, count, size, generator), KINDS[kind]
        else:
            source = self.corpus.training[pool]
            row = torch.randint(len(source.labels), (1,), generator=generator)
            views = crops_alike(source.take(row)[0], count, size, generator, *VIEWS[pool])
            name = GENERIC_NAMES[int(torch.randint(len(GENERIC_NAMES), (1,), generator=generator))]
        # The product's own light and colour, the same for all views of it, then a little for every view.
        strip = views.clamp(0, 1).transpose(0, 1).flatten(1, 2)[None]
        strip = photometric(strip, generator, 0.4, grey=0.4)
        views = strip[0].unflatten(1, (count, size)).transpose(0, 1)
        views = photometric(views, generator, 0.1, grey=0.0)
        return uneven_light(views, generator, 0.15), name


class Parameters(nn.Module):
    """Parameters of another module under their own names, as a module."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.names = list(parameters)
        self.values = nn.ParameterList(parameters.values())

    def by_name(self) -> dict[str, Tensor]:
        """Values by name."""
        return dict(zip(self.names, self.values, strict=True))


def train_prior(
    folder: Path,
    corpus: Corpus,
    stage: StageConfig,
    output: Path,
    *,
    seed: int,
    device: torch.device,
    resume: bool = False,
) -> Path:
    """Learn a prior for an encoder and write it beside the encoder's weights; one that lies there is gone on from.

    Args:
        folder: Encoder in open_clip's local-dir format.
        corpus: Image pools.
        stage: Settings.
        output: Folder for checkpoint and log.
        seed: Seed of initial weights and tasks.
        device: Device that trains.
        resume: Go on from the checkpoint in ``output``.

    Returns:
        The file.
    """
    workers.wait_for_all()
    encoder = VisionTextEncoder(f"local-dir:{folder}", image_size=stage.size)
    objective = PriorObjective(encoder, corpus, stage)

    def export(average: nn.Module, step: int) -> None:  # noqa: ARG001
        save_prior(cast("Parameters", average).by_name(), folder / PRIOR_NAME, encoder.weights_hash)

    run_stage(objective, stage, output, seed=seed, device=device, resume=resume, after_checkpoint=export)
    return folder / PRIOR_NAME
