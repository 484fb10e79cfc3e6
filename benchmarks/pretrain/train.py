"""Training loop: time-boxed, resumable, the same on CPU and GPU."""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.pretrain import workers
from benchmarks.pretrain.batches import names_batch
from benchmarks.pretrain.config import IMAGE_MEAN, IMAGE_STD, TEMPLATES, StageConfig
from benchmarks.pretrain.losses import candidate_classes, names_loss
from benchmarks.pretrain.sources import Corpus

EMA_DECAY = 0.998


def create_encoder(config: dict) -> open_clip.CustomTextCLIP:
    """Build the open_clip model of an ``open_clip_config.json`` with random weights."""
    return open_clip.CustomTextCLIP(**{k: v for k, v in config["model_cfg"].items() if k != "custom_text"})


def trim(tokens: Tensor) -> Tensor:
    """Cut token rows ``(..., L)`` after the longest text; shorter rows are much cheaper."""
    return tokens[..., : int((tokens != 0).sum(-1).max())]


def encode_text(encoder: open_clip.CustomTextCLIP, tokens: Tensor) -> Tensor:
    """Unit text vectors ``(N, D)`` of trimmed token rows ``(N, L)``.

    open_clip's text tower wants rows of full length; with a causal mask what follows the end token changes nothing,
    so the same vectors come from short rows at a fraction of the cost.
    """
    text = encoder.text
    embedded = text.token_embedding(tokens) + text.positional_embedding[: tokens.shape[1]]
    mask = text.attn_mask[: tokens.shape[1], : tokens.shape[1]]
    with sdpa_kernel(SDPBackend.MATH):  # three times faster than the fused kernel at this length on a CPU
        states = text.ln_final(text.transformer(embedded, attn_mask=mask))
    ends = states[torch.arange(len(tokens), device=tokens.device), tokens.argmax(-1)]
    return nn.functional.normalize(ends.float() @ text.text_projection, dim=-1)


class Vocabulary:
    """The tokens that training ever sees, renumbered without gaps.

    The embedding table of the standard tokenizer has 49,408 rows of which a few thousand are used; training only those
    makes a step on two cores a good deal cheaper. Rising order keeps the end token the largest, as open_clip expects.

    Args:
        tokens: Token ids of all prompts, any shape; id 0 (padding) is always included.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.ids = torch.unique(torch.cat([tokens.flatten(), torch.zeros(1, dtype=torch.long)]))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Renumber token ids."""
        return torch.searchsorted(self.ids, tokens.contiguous())


@functools.cache
def _tokenizer(context_length: int) -> open_clip.SimpleTokenizer:
    """The standard tokenizer; reading its table takes longer than a step should."""
    return open_clip.SimpleTokenizer(context_length=context_length)


def tokenize(prompts: Sequence[str], context_length: int) -> Tensor:
    """Token ids ``(N, context_length)`` of the standard tokenizer."""
    return _tokenizer(context_length)(list(prompts))


def shrink_embedding(
    encoder: open_clip.CustomTextCLIP, vocabulary: Vocabulary, current: Vocabulary | None = None
) -> None:
    """Give the text tower a token table with one row for each token of ``vocabulary``.

    Args:
        encoder: open_clip model, changed in place.
        vocabulary: Tokens to keep rows for.
        current: Vocabulary of the table the encoder has; None for the full table. New tokens get fresh rows.
    """
    table = encoder.text.token_embedding.weight.detach()
    rows = torch.empty(len(vocabulary.ids), table.shape[1]).normal_(std=0.02)
    if current is None:
        rows.copy_(table[vocabulary.ids])
    else:
        rows[vocabulary(current.ids)] = table.cpu()
    encoder.text.token_embedding = nn.Embedding.from_pretrained(rows, freeze=False)


class Texts:
    """Tokenised prompts of the class names, one table per template.

    Args:
        class_names: Readable names.
        context_length: Tokens in a prompt.
        vocabulary: Vocabulary of the text tower; None for one that holds just these prompts.
    """

    def __init__(self, class_names: tuple[str, ...], context_length: int, vocabulary: Vocabulary | None = None) -> None:
        tables = [tokenize([t.format(name) for name in class_names], context_length) for t in TEMPLATES]
        self.vocabulary = vocabulary or Vocabulary(torch.stack(tables))
        self.tokens = self.vocabulary(torch.stack(tables))

    def draw(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Return one prompt ``(N, L)`` for each class, its template drawn at random."""
        template = torch.randint(len(self.tokens), (len(classes),), generator=generator)
        return trim(self.tokens[template, classes])


class Normalise(nn.Module):
    """Bring images in [0, 1] to the mean and deviation the tower expects."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise ``(B, 3, H, W)``."""
        return (images - self.mean) / self.std


class Objective(nn.Module):
    """What a stage minimises; called with a generator and a device, it returns a loss and figures for the log.

    Attributes:
        encoder: What is kept of the stage, as a running average.
    """

    encoder: nn.Module


class NamesObjective(Objective):
    """Stage "names": image-text contrast over class names."""

    encoder: open_clip.CustomTextCLIP

    def __init__(self, encoder: open_clip.CustomTextCLIP, corpus: Corpus, stage: StageConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalise = Normalise()
        self.corpus = corpus
        self.stage = stage
        self.texts = Texts(corpus.class_names, encoder.text.context_length)
        shrink_embedding(encoder, self.texts.vocabulary)

    def forward(self, generator: torch.Generator, device: torch.device) -> tuple[Tensor, dict[str, float]]:
        """Draw one batch and return its loss with figures for the log."""
        images, labels = names_batch(self.corpus.training, self.stage.batch, self.stage.size, generator)
        classes, targets = candidate_classes(labels, len(self.corpus.class_names), 160, generator)
        tokens = self.texts.draw(classes, generator).to(device)
        images = self.normalise(images.to(device)).contiguous(memory_format=torch.channels_last)
        targets = targets.to(device)
        image_vectors = self.encoder.encode_image(images, normalize=True)
        text_vectors = encode_text(self.encoder, tokens)
        scale = self.encoder.logit_scale.exp().clamp(max=100)
        loss = names_loss(image_vectors.float(), text_vectors.float(), targets, scale)
        hits = (image_vectors @ text_vectors.T).argmax(1) == targets
        return loss, {"names": loss.item(), "accuracy": hits.float().mean().item()}


def one_cycle(position: float, warm_up: float) -> float:
    """Factor on the peak learning rate at ``position`` in [0, 1]: linear rise, then half a cosine to 1%."""
    if position < warm_up:
        return max(0.02, position / warm_up)
    fall = (position - warm_up) / (1 - warm_up)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))


def _optimiser(objective: nn.Module, stage: StageConfig) -> torch.optim.Optimizer:
    """AdamW; vectors and scalars (norms, biases, logit scale) are not decayed."""
    named = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if p.ndim > 1 and "positional" not in n and "token_embedding" not in n]
    ids = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": stage.weight_decay},
        {"params": [p for _, p in named if id(p) not in ids], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move the running average of all weights and buffers towards the model."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    source = model.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.lerp_(source[name], 1 - decay)
        else:
            value.copy_(source[name])


def _save(path: Path, state: Mapping[str, object]) -> None:
    """Write a checkpoint whole or not at all."""
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)


class _Running:
    """Means of the figures since the last line of the log."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.count = 0
        self.sums: dict[str, float] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        self.count += 1
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def write(self, line: dict[str, float]) -> None:
        line |= {name: round(total / self.count, 4) for name, total in self.sums.items()}
        if workers.rank() == 0:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.count, self.sums = 0, {}


def run_stage(
    objective: Objective,
    stage: StageConfig,
    output: Path,
    *,
    seed: int,
    device: torch.device,
    resume: bool = False,
    save_every_s: float = 90.0,
    log_every: int = 20,
    after_checkpoint: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Train one stage and return the running average of what it keeps.

    Every step draws its batch from a generator seeded by ``(seed, step)``, so a resumed run goes on exactly as an
    uninterrupted one (with ``stage.minutes=None`` and the same number of processes). With several processes each draws
    its own batch and gradients are averaged; batch statistics are kept by process 0.

    Args:
        objective: What to minimise.
        stage: Settings.
        output: Folder for ``<stage>.pt`` (checkpoint) and ``<stage>.jsonl`` (log).
        seed: Seed of the stage.
        device: Device that trains.
        resume: Go on from the checkpoint in ``output`` when there is one.
        save_every_s: Seconds between checkpoints.
        log_every: Steps between lines of the log.
        after_checkpoint: Called with the average and the step after every checkpoint.
    """
    output.mkdir(parents=True, exist_ok=True)
    checkpoint, log = output / f"{stage.name}.pt", output / f"{stage.name}.jsonl"
    objective.to(device)
    optimiser = _optimiser(objective, stage)
    average = copy.deepcopy(objective.encoder).eval().requires_grad_(False)
    step, seconds = 0, 0.0
    if resume and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        objective.load_state_dict(state["objective"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, seconds = state["step"], state["seconds"]
    objective.train()
    began, saved_at = time.monotonic() - seconds, time.monotonic()
    running = _Running(log)

    def save() -> None:
        if workers.rank() > 0:
            return
        parts = {"objective": objective.state_dict(), "average": average.state_dict()}
        _save(checkpoint, parts | {"optimiser": optimiser.state_dict(), "step": step, "seconds": seconds})
        if after_checkpoint is not None:
            after_checkpoint(average, step)

    while True:
        boxed = 0.0 if stage.minutes is None else seconds / (60 * stage.minutes)
        position = max(step / stage.steps, boxed)
        if position >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = stage.learning_rate * one_cycle(position, stage.warm_up)
        draw = step * workers.world_size() + workers.rank()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
        with torch.autocast(device.type, torch.bfloat16):
            loss, figures = objective(generator, device)
        loss.backward()
        now = workers.average_gradients(objective.parameters(), time.monotonic() - began)
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        seconds = now
        _update_average(average, objective.encoder, step)
        running.add(figures)
        if running.count == log_every:
            running.write({"step": step, "seconds": round(seconds, 1), "lr": optimiser.param_groups[0]["lr"]})
        if time.monotonic() - saved_at > save_every_s:
            save()
            saved_at = time.monotonic()
    save()
    return average
