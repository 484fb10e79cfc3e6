"""The stages in order, and the processes they run in."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import open_clip
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.pretrain.config import StageConfig, encoder_config
from benchmarks.pretrain.export import CONFIG_NAME, WEIGHTS_NAME, export_encoder
from benchmarks.pretrain.inspection import InspectionObjective
from benchmarks.pretrain.prior import train_prior
from benchmarks.pretrain.sources import Corpus, load_corpus
from benchmarks.pretrain.train import NamesObjective, Objective, Vocabulary, create_encoder, run_stage

FOLDER = "vtfusion-tiny"


def train(
    corpus: Corpus,
    stages: tuple[StageConfig, StageConfig, StageConfig],
    output: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    start: Path | None = None,
) -> Path:
    """Run the stages in order and export the encoder and its prior.

    Args:
        corpus: Image pools.
        stages: Settings of the stages "names", "inspection" and "prior".
        output: Folder for checkpoints, logs and the encoder.
        seed: Seed of weights and batches.
        resume: Go on from the checkpoints in ``output``.
        start: Folder of a trained encoder to go on from, in place of the stage "names".

    Returns:
        Folder of the encoder in open_clip's local-dir format.

    Raises:
        ValueError: If the encoder in ``start`` is built otherwise.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = encoder_config()
    torch.manual_seed(seed)
    encoder = create_encoder(config).to(memory_format=torch.channels_last)

    def run(objective: Objective, stage: StageConfig, number: int, after: Callable) -> nn.Module:
        return run_stage(
            objective, stage, output, seed=seed + number, device=device, resume=resume, after_checkpoint=after
        )

    vocabulary: Vocabulary | None = None
    if start is None:
        names = NamesObjective(encoder, corpus, stages[0])
        vocabulary = names.texts.vocabulary

        def export_names(average: nn.Module, step: int) -> None:  # noqa: ARG001
            export_encoder(average, names.texts.vocabulary.ids, config, output / FOLDER)

        encoder = cast("open_clip.CustomTextCLIP", run(names, stages[0], 0, export_names))
        encoder.cpu().requires_grad_(requires_grad=True)
    else:
        load_encoder(encoder, config, start)
    torch.manual_seed(seed + 1)
    inspection = InspectionObjective(encoder, corpus, stages[1], vocabulary)

    def export(average: nn.Module, step: int) -> None:  # noqa: ARG001
        export_encoder(average, inspection.vocabulary.ids, config, output / FOLDER)

    run(inspection, stages[1], 1, export)
    train_prior(output / FOLDER, corpus, stages[2], output, seed=seed + 2, device=device, resume=resume)
    return output / FOLDER


def load_encoder(encoder: nn.Module, config: dict, folder: Path) -> None:
    """Take the weights of an encoder in open_clip's local-dir format."""
    found = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if found["model_cfg"] != config["model_cfg"]:
        raise ValueError(f"{folder} holds {found['model_cfg']}, but the recipe trains {config['model_cfg']}.")
    encoder.load_state_dict(load_file(folder / WEIGHTS_NAME))


def work(args: argparse.Namespace) -> None:
    """Train in one process."""
    torch.set_num_threads(args.threads)
    names_part = 0 if args.start_from else args.names_part
    parts = names_part, 1 - names_part - args.prior_part, args.prior_part
    boxes = [args.minutes * part for part in parts]
    stages = (
        StageConfig("names", 20_000, boxes[0], size=64, batch=96, learning_rate=2e-3),
        StageConfig("inspection", 20_000, boxes[1], size=128, batch=10, learning_rate=1e-3),
        StageConfig("prior", 20_000, boxes[2], size=160, batch=8, learning_rate=1e-3),
    )
    train(read_corpus(args), stages, args.output, seed=args.seed, resume=args.resume, start=args.start_from)


def read_corpus(args: argparse.Namespace) -> Corpus:
    """Decode or open the image pools that the command line names."""
    return load_corpus(args.tiny_imagenet, args.textures, args.photographs, args.output / "cache")
