"""Train ``vtfusion-tiny``: class names, then inspection, then the prior of VTFusion's own network.

Writes checkpoints, logs (``names.jsonl``, ``inspection.jsonl``, ``prior.jsonl``), the encoder with its prior in
open_clip's local-dir format (``vtfusion-tiny``, after every checkpoint) and the zero-shot check (``zero_shot.json``)
into ``--output``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anomalib_vtfusion.components.encoders import VisionTextEncoder
from benchmarks.pretrain.recipe import FOLDER, read_corpus, work
from benchmarks.pretrain.workers import launch
from benchmarks.pretrain.zero_shot import zero_shot_check
from benchmarks.provenance import provenance, write_json


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain", description=__doc__)
    parser.add_argument("--tiny-imagenet", type=Path, required=True, help="unpacked tiny-imagenet-200")
    parser.add_argument("--textures", type=Path, required=True, help="one folder of images per texture class")
    parser.add_argument("--photographs", type=Path, required=True, help="images named <synset>_<class>.JPEG")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, logs and decoded images")
    parser.add_argument("--minutes", type=float, default=100, help="minutes of training in all")
    first = parser.add_mutually_exclusive_group()
    first.add_argument("--names-part", type=float, default=0.35, help="part of the time for the stage on class names")
    first.add_argument("--start-from", type=Path, help="folder of a trained encoder to go on from, without that stage")
    parser.add_argument(
        "--prior-part",
        type=float,
        default=0.2,
        help="part of the time for the stage on small tasks; 1 with --start-from leaves the encoder as it is",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that train together, each with its batch")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    found = parser.parse_args(arguments)
    if found.prior_part >= 1 and found.start_from is None:
        parser.error("--prior-part 1 leaves no time for an encoder; give one with --start-from")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Train, export and check."""
    args = parse_arguments(arguments)
    corpus = read_corpus(args)
    launch(work, (args,), args.workers)
    encoder = VisionTextEncoder(f"local-dir:{args.output / FOLDER}")
    check = {
        name: zero_shot_check(encoder, source, corpus.class_names, args.seed)
        for name, source in corpus.held_out.items()
    }
    write_json(args.output / "zero_shot.json", {"provenance": provenance(), "zero_shot": check})


if __name__ == "__main__":
    main()
