"""Prompts: exact strings and counts, and every way a user's phrases can be wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_vtfusion.prompting import (
    ANOMALOUS_STATES,
    DEFECT_TEMPLATES,
    DEFECTS,
    NORMAL_STATES,
    TEMPLATES,
    build_prompts,
    clean_class_name,
)

WORDS = st.text(st.characters(whitelist_categories=("Ll", "Lu", "Nd")), min_size=1, max_size=8)
NAMES = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)


@pytest.mark.parametrize(
    ("category", "name"),
    [
        ("bottle", "bottle"),
        ("metal_nut", "metal nut"),
        ("hazelnut_toy", "hazelnut toy"),
        ("pcb1", "pcb"),
        ("macaroni2", "macaroni"),
        ("Capsules_02", "Capsules"),
        ("part_1_2", "part"),
        ("pipe-fryum", "pipe fryum"),
        ("MetalNut", "Metal Nut"),
        ("PCB", "PCB"),
        ("iPhone", "iPhone"),
        ("M8_screw", "M8 screw"),
        ("parts/lid", "parts lid"),
        ("  odd   spaces ", "odd spaces"),
        ("{}cap", "cap"),
        ("42", "object"),
        ("_-_", "object"),
        ("", "object"),
    ],
)
def test_clean_class_name(category, name):
    assert clean_class_name(category) == name


@given(st.text(max_size=20))
@settings(deadline=None, max_examples=200)
def test_clean_class_name_is_usable_and_stable(category):
    name = clean_class_name(category)
    assert name
    assert clean_class_name(name) == name
    assert build_prompts(name).normal[0]


def test_counts_are_states_times_templates():
    prompts = build_prompts("bottle")
    assert (len(NORMAL_STATES), len(ANOMALOUS_STATES), len(TEMPLATES)) == (7, 4, 22)
    assert len(prompts.normal) == 7 * 22
    assert len(prompts.anomalous) == 4 * 22
    assert 20 <= len(DEFECTS) <= 30
    assert list(prompts.defects) == list(DEFECTS)
    assert {len(texts) for texts in prompts.defects.values()} == {len(DEFECT_TEMPLATES)}


def test_known_prompts_are_there():
    prompts = build_prompts("metal nut")
    assert "a photo of a metal nut." in prompts.normal
    assert "a jpeg corrupted photo of the flawless metal nut." in prompts.normal
    assert "a photo of the small metal nut without damage." in prompts.normal
    assert "a close-up photo of a damaged metal nut." in prompts.anomalous
    assert "a photo of a metal nut with defect for visual inspection." in prompts.anomalous
    assert prompts.defects["a scratch"][0] == "a photo of a metal nut with a scratch."
    assert "a close-up photo of a scratch on the metal nut." in prompts.defects["a scratch"]


def test_a_class_may_be_called_like_a_word_of_the_templates():
    assert build_prompts("DEFECT").defects["a burr"][0] == "a photo of a DEFECT with a burr."


@given(NAMES)
@settings(deadline=None, max_examples=60)
def test_every_prompt_is_unique_and_names_the_class(name):
    prompts = build_prompts(name)
    everything = [*prompts.normal, *prompts.anomalous, *(text for texts in prompts.defects.values() for text in texts)]
    assert len({text.casefold() for text in everything}) == len(everything)
    assert all(name in text for text in everything)
    assert not any("{" in text or "ARTICLE" in text.replace(name, "") for text in everything)


def test_user_phrases_replace_the_built_ones_on_their_side_only():
    prompts = build_prompts(
        "bottle cap",
        normal_prompts=["a  clean {} from our line", "nothing to complain about"],
        anomaly_prompts=["a {} with flash on the {}"],
        defects=["flash", "a short shot"],
    )
    assert prompts.normal == ("a clean bottle cap from our line", "nothing to complain about")
    assert prompts.anomalous == ("a bottle cap with flash on the bottle cap",)
    assert list(prompts.defects) == ["flash", "a short shot"]
    assert prompts.defects["flash"][0] == "a photo of a bottle cap with flash."
    assert len(build_prompts("bottle cap", normal_prompts=["fine"]).anomalous) == 88


@pytest.mark.parametrize("argument", ["normal_prompts", "anomaly_prompts", "defects"])
@pytest.mark.parametrize(
    ("phrases", "error", "message"),
    [
        ([], ValueError, "empty list"),
        (["fine", "  "], ValueError, "empty phrase"),
        (["a Fine one", "a  fine ONE"], ValueError, "twice"),
        (["a {name} here"], ValueError, "placeholder"),
        (["a {0} here"], ValueError, "placeholder"),
        (["a } here"], ValueError, "placeholder"),
        ("a single string", TypeError, "list of strings"),
        (["fine", 3], TypeError, "list of strings"),
    ],
)
def test_bad_user_phrases(argument, phrases, error, message):
    with pytest.raises(error, match=message):
        build_prompts("bottle", **{argument: phrases})


def test_placeholder_is_not_for_defects():
    with pytest.raises(ValueError, match="without a placeholder"):
        build_prompts("bottle", defects=["a {} with a burr"])


def test_duplicates_are_found_after_the_name_is_put_in():
    with pytest.raises(ValueError, match="twice"):
        build_prompts("bottle", normal_prompts=["a good {}", "A good Bottle"])


def test_a_prompt_cannot_be_on_both_sides():
    with pytest.raises(ValueError, match="both normal and anomalous"):
        build_prompts("bottle", normal_prompts=["a {} as it comes"], anomaly_prompts=["A bottle as it comes"])
    with pytest.raises(ValueError, match="both normal and anomalous"):
        build_prompts("bottle", normal_prompts=["a photo of a damaged {}."])


@pytest.mark.parametrize("name", ["", "   ", "a {} b"])
def test_bad_class_name(name):
    with pytest.raises(ValueError, match="class_name"):
        build_prompts(name)
