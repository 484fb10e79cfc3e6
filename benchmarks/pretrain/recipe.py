"""The stages in order, and the processes they run in."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import open_clip
import torch
from safetensors.torch import load_file
from torch import nn

from anomalib_vtfusion.components.encoder_weights import PRIOR_NAME
from anomalib_vtfusion.components.encoders import VisionTextEncoder
from anomalib_vtfusion.components.prior import save_prior
from benchmarks.pretrain import workers
from benchmarks.pretrain.config import StageConfig, encoder_config
from benchmarks.pretrain.export import CONFIG_NAME, WEIGHTS_NAME, export_encoder
from benchmarks.pretrain.inspection import InspectionObjective
from benchmarks.pretrain.prior import train_prior
from benchmarks.pretrain.sources import Corpus, load_corpus
from benchmarks.pretrain.train import NamesObjective, Vocabulary, create_encoder, run_stage

FOLDER = "vtfusion-tiny"


def train(
    corpus: Corpus,
    stages: tuple[StageConfig | None, StageConfig | None, StageConfig],
    output: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    start: Path | None = None,
) -> Path:
    """Run the stages in order and export the encoder and its prior.

    Args:
        corpus: Image pools.
        stages: Settings of the stages "names", "inspection" and "prior"; with ``start``, the first is None, and None
            for the second leaves the encoder as it is.
        output: Folder for checkpoints, logs and the encoder.
        seed: Seed of weights and batches.
        resume: Go on from the checkpoints in ``output``.
        start: Folder of a trained encoder, maybe with a prior, to go on from.

    Returns:
        Folder of the encoder in open_clip's local-dir format.

    Raises:
        ValueError: If the encoder in ``start`` is built otherwise, or the first stage is given beside it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names, inspection, prior = stages
    if (names is None) == (start is None):
        raise ValueError('Give either the stage "names" or a trained encoder to start from, not both or neither.')
    if start is not None:
        take_over(start, output / FOLDER)
    if inspection is not None:
        run = functools.partial(run_stage, output=output, device=device, resume=resume)
        train_encoder(corpus, names, inspection, output / FOLDER, seed, run)
        if start is not None:
            hand_on_prior(output / FOLDER)
    train_prior(output / FOLDER, corpus, prior, output, seed=seed + 2, device=device, resume=resume)
    return output / FOLDER


def train_encoder(
    corpus: Corpus,
    names: StageConfig | None,
    inspection: StageConfig,
    folder: Path,
    seed: int,
    run: Callable[..., nn.Module],
) -> None:
    """Train the towers and export them to ``folder``, without ``names`` from the encoder that lies there."""
    config = encoder_config()
    torch.manual_seed(seed)
    encoder = create_encoder(config).to(memory_format=torch.channels_last)
    vocabulary: Vocabulary | None = None

    def export(average: nn.Module, step: int, vocabulary: Vocabulary) -> None:  # noqa: ARG001
        export_encoder(average, vocabulary.ids, config, folder)

    if names is None:
        encoder.load_state_dict(load_file(folder / WEIGHTS_NAME))
    else:
        first = NamesObjective(encoder, corpus, names)
        vocabulary = first.texts.vocabulary
        after = functools.partial(export, vocabulary=vocabulary)
        encoder = cast("open_clip.CustomTextCLIP", run(first, names, seed=seed, after_checkpoint=after))
        encoder.cpu().requires_grad_(requires_grad=True)
    torch.manual_seed(seed + 1)
    second = InspectionObjective(encoder, corpus, inspection, vocabulary)
    after = functools.partial(export, vocabulary=second.vocabulary)
    run(second, inspection, seed=seed + 1, after_checkpoint=after)


def take_over(start: Path, folder: Path) -> None:
    """Copy an encoder in open_clip's local-dir format, and its prior where it has one."""
    found = json.loads((start / CONFIG_NAME).read_text(encoding="utf-8"))["model_cfg"]
    wanted = encoder_config()["model_cfg"]
    if found != wanted:
        raise ValueError(f"{start} holds {found}, but the recipe trains {wanted}.")
    if workers.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_NAME, WEIGHTS_NAME, PRIOR_NAME):
            if (start / name).exists():
                shutil.copyfile(start / name, folder / name)
    workers.wait_for_all()


def hand_on_prior(folder: Path) -> None:
    """Let the prior of the encoder's former weights be where the stage "prior" starts from.

    It still fits the features of an encoder that has only gone on: see "A prior for a changed encoder" in the notes.
    """
    path = folder / PRIOR_NAME
    if workers.rank() == 0 and path.exists():
        save_prior(load_file(path), path, VisionTextEncoder(f"local-dir:{folder}").weights_hash)


def work(args: argparse.Namespace) -> None:
    """Train in one process."""
    torch.set_num_threads(args.threads)
    names_part = 0 if args.start_from else args.names_part
    inspection_part = 1 - names_part - args.prior_part
    names = None
    if not args.start_from:
        names = StageConfig("names", 20_000, args.minutes * names_part, size=64, batch=96, learning_rate=2e-3)
    inspection = StageConfig(
        "inspection", 20_000, args.minutes * inspection_part, size=128, batch=12, learning_rate=1e-3
    )
    prior = StageConfig("prior", 20_000, args.minutes * args.prior_part, size=160, batch=8, learning_rate=1e-3)
    stages = (names, inspection if inspection_part > 0 else None, prior)
    train(read_corpus(args), stages, args.output, seed=args.seed, resume=args.resume, start=args.start_from)


def read_corpus(args: argparse.Namespace) -> Corpus:
    """Decode or open the image pools that the command line names."""
    return load_corpus(args.tiny_imagenet, args.textures, args.photographs, args.output / "cache")
