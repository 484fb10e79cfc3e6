"""Text prompts from a class name: strings in, strings out.

The compositional ensemble of Jeong et al. 2023, "WinCLIP: Zero-/Few-Shot Anomaly Classification and Segmentation"
(Sec. 4.1 and App. A), states of an object times templates of a photo, with every template once. A vocabulary of
industrial defects gives one small ensemble per defect, for naming what was found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PLACEHOLDER = "{}"
FALLBACK_NAME = "object"

NORMAL_STATES = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)

ANOMALOUS_STATES = (
    "damaged {}",
    "{} with flaw",
    "{} with defect",
    "{} with damage",
)

TEMPLATES = tuple(
    scene.replace("ARTICLE", article)
    for scene in (
        "a cropped photo of ARTICLE {}.",
        "a close-up photo of ARTICLE {}.",
        "a bright photo of ARTICLE {}.",
        "a dark photo of ARTICLE {}.",
        "a jpeg corrupted photo of ARTICLE {}.",
        "a blurry photo of ARTICLE {}.",
        "a photo of ARTICLE {}.",
        "a photo of ARTICLE small {}.",
        "a photo of ARTICLE large {}.",
        "a photo of ARTICLE {} for visual inspection.",
        "a photo of ARTICLE {} for anomaly detection.",
    )
    for article in ("a", "the")
)

DEFECTS = (
    "a scratch",
    "a crack",
    "a hole",
    "a dent",
    "a stain",
    "a chip",
    "a cut",
    "a broken piece",
    "a missing part",
    "a bent part",
    "a misplaced part",
    "a foreign object",
    "a burr",
    "a bubble",
    "a burn mark",
    "a fold",
    "a tear",
    "a loose thread",
    "a bump",
    "a wrong color",
    "a print error",
    "contamination",
    "corrosion",
    "discoloration",
    "a rough surface",
    "a worn surface",
    "a leak",
    "a deformation",
)

DEFECT_TEMPLATES = (
    "a photo of a {} with DEFECT.",
    "a photo of the {} with DEFECT.",
    "a close-up photo of a {} with DEFECT.",
    "a cropped photo of the {} with DEFECT.",
    "a photo of DEFECT on a {}.",
    "a close-up photo of DEFECT on the {}.",
)


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one class, every one unique.

    Attributes:
        normal: Prompts for a good object.
        anomalous: Prompts for a defective object.
        defects: Prompts for each defect phrase, in the order of the phrases.
    """

    normal: tuple[str, ...]
    anomalous: tuple[str, ...]
    defects: dict[str, tuple[str, ...]]


def clean_class_name(category: str) -> str:
    """Words that a person would use for a dataset category.

    Underscores, hyphens and slashes become spaces, ``MetalNut`` becomes ``Metal Nut`` and a running number at the end
    is dropped.

    Args:
        category: Category or folder name such as ``"metal_nut"``, ``"pcb1"`` or ``"Capsules_02"``.

    Returns:
        The name, never empty: what holds no letter becomes ``"object"``. Cleaning it again changes nothing.
    """
    name = re.sub(r"[_\-/\\{}\s]+", " ", category)
    name = re.sub(r"(?<=[a-z]{2})(?=[A-Z][a-z])", " ", name)
    name = re.sub(r"[\d\s]+$", "", name).strip()
    return name if any(character.isalpha() for character in name) else FALLBACK_NAME


def build_prompts(
    class_name: str,
    *,
    normal_prompts: Sequence[str] | None = None,
    anomaly_prompts: Sequence[str] | None = None,
    defects: Sequence[str] | None = None,
) -> PromptSet:
    """Build all prompts of one class.

    Args:
        class_name: Name put into the prompts as it is; see ``clean_class_name``.
        normal_prompts: Whole prompts for a good object in place of the 154 built ones; ``{}`` stands for the name.
        anomaly_prompts: The same for a defective object, in place of the 88 built ones.
        defects: Defect phrases such as ``"a scratch"`` in place of ``DEFECTS``; they complete "an object with ...".

    Returns:
        The prompts.

    Raises:
        TypeError: If a list of phrases is a single string or holds something else than strings.
        ValueError: If the class name or a list or a phrase is empty, a phrase occurs twice (case and spaces aside), a
            prompt is both normal and anomalous, or a phrase has a placeholder other than ``{}``.
    """
    name = _squeeze(class_name)
    if not name or "{" in name or "}" in name:
        raise ValueError(f"class_name must be a name without braces and not empty, got {class_name!r}.")
    normal = _user_prompts("normal_prompts", normal_prompts, name) or _ensemble(NORMAL_STATES, name)
    anomalous = _user_prompts("anomaly_prompts", anomaly_prompts, name) or _ensemble(ANOMALOUS_STATES, name)
    both = {_key(prompt) for prompt in normal} & {_key(prompt) for prompt in anomalous}
    if both:
        raise ValueError(f"Prompts cannot be both normal and anomalous: {sorted(both)}.")
    phrases = DEFECTS if defects is None else _checked("defects", defects)
    if any("{" in phrase or "}" in phrase for phrase in phrases):
        raise ValueError("defects must be phrases such as 'a scratch', without a placeholder for the class name.")
    # The name goes in last: it is the only part that could hold a word of the templates.
    return PromptSet(
        normal=normal,
        anomalous=anomalous,
        defects={
            phrase: tuple(text.replace("DEFECT", phrase).replace(PLACEHOLDER, name) for text in DEFECT_TEMPLATES)
            for phrase in phrases
        },
    )


def _ensemble(states: Sequence[str], name: str) -> tuple[str, ...]:
    objects = [state.replace(PLACEHOLDER, name) for state in states]
    return tuple(template.replace(PLACEHOLDER, phrase) for phrase in objects for template in TEMPLATES)


def _user_prompts(argument: str, phrases: Sequence[str] | None, name: str) -> tuple[str, ...]:
    if phrases is None:
        return ()
    for phrase in _checked(argument, phrases):
        rest = phrase.replace(PLACEHOLDER, "")
        if "{" in rest or "}" in rest:
            raise ValueError(f"{argument}: the only placeholder is {PLACEHOLDER} for the class name, got {phrase!r}.")
    # Checked again with the name in place: "a {}" and "a bottle" are the same prompt for a bottle.
    return _checked(argument, [phrase.replace(PLACEHOLDER, name) for phrase in phrases])


def _checked(argument: str, phrases: Sequence[str]) -> tuple[str, ...]:
    if isinstance(phrases, str) or not all(isinstance(phrase, str) for phrase in phrases):
        raise TypeError(f"{argument} must be a list of strings, got {phrases!r}.")
    if not phrases:
        raise ValueError(f"{argument} is an empty list: leave it out for the built-in phrases, or give at least one.")
    seen: dict[str, str] = {}
    for phrase in phrases:
        key = _key(phrase)
        if not key:
            raise ValueError(f"{argument} holds an empty phrase: {list(phrases)!r}.")
        if key in seen:
            raise ValueError(f"{argument} holds the same phrase twice: {seen[key]!r} and {phrase!r}.")
        seen[key] = phrase
    return tuple(_squeeze(phrase) for phrase in phrases)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _key(text: str) -> str:
    return _squeeze(text).casefold()
