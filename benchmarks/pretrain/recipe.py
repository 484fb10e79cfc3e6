"""Both stages in order, and the processes they run in."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from torch import nn

from benchmarks.pretrain.config import StageConfig, encoder_config
from benchmarks.pretrain.export import export_encoder
from benchmarks.pretrain.inspection import InspectionObjective
from benchmarks.pretrain.sources import Corpus, load_corpus
from benchmarks.pretrain.train import NamesObjective, Objective, create_encoder, run_stage

FOLDER = "vtfusion-tiny"


def train(
    corpus: Corpus, stages: tuple[StageConfig, StageConfig], output: Path, *, seed: int = 0, resume: bool = False
) -> Path:
    """Run both stages and export the encoder.

    Args:
        corpus: Image pools.
        stages: Settings of the stages "names" and "inspection".
        output: Folder for checkpoints, logs and the encoder.
        seed: Seed of weights and batches.
        resume: Go on from the checkpoints in ``output``.

    Returns:
        Folder of the encoder in open_clip's local-dir format.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = encoder_config()
    torch.manual_seed(seed)
    encoder = create_encoder(config).to(memory_format=torch.channels_last)
    names = NamesObjective(encoder, corpus, stages[0])

    def export_names(average: nn.Module, step: int) -> None:  # noqa: ARG001
        export_encoder(average, names.texts.vocabulary.ids, config, output / FOLDER)

    def run(objective: Objective, stage: StageConfig, number: int, after: Callable) -> open_clip.CustomTextCLIP:
        return run_stage(
            objective, stage, output, seed=seed + number, device=device, resume=resume, after_checkpoint=after
        )

    encoder = run(names, stages[0], 0, export_names)
    encoder.cpu().requires_grad_(True)
    torch.manual_seed(seed + 1)
    inspection = InspectionObjective(encoder, corpus, stages[1], names.texts.vocabulary)

    def export(average: nn.Module, step: int) -> None:  # noqa: ARG001
        export_encoder(average, inspection.vocabulary.ids, config, output / FOLDER)

    run(inspection, stages[1], 1, export)
    return output / FOLDER


def work(args: argparse.Namespace) -> None:
    """Train in one process."""
    torch.set_num_threads(args.threads)
    boxes = args.minutes * args.names_part, args.minutes * (1 - args.names_part)
    stages = (
        StageConfig("names", 20_000, boxes[0], size=64, batch=96, learning_rate=2e-3),
        StageConfig("inspection", 20_000, boxes[1], size=128, batch=10, learning_rate=1e-3),
    )
    train(read_corpus(args), stages, args.output, seed=args.seed, resume=args.resume)


def read_corpus(args: argparse.Namespace) -> Corpus:
    """Decode or open the image pools that the command line names."""
    return load_corpus(args.tiny_imagenet, args.textures, args.photographs, args.output / "cache")
