"""Post-processor: 0.5 means the threshold, order is kept, and normal validation images do not spoil the calibration."""

from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_vtfusion.post_processor import NORMAL_PIXELS, FewShotPostProcessor

FIT = SimpleNamespace(sanity_checking=False)


def predictions(scores, maps=None):
    """Predictions with one score an image; maps of 2 x 2, each at its score unless given."""
    scores = torch.tensor(scores)[:, None]
    return InferenceBatch(
        pred_score=scores,
        anomaly_map=scores[:, :, None, None].expand(-1, 1, 2, 2) if maps is None else torch.tensor(maps),
    )


def labelled(scores, labels, maps=None):
    """Batch as validation gives it: labels, full masks for anomalous images, raw predictions."""
    gt_label = torch.tensor(labels, dtype=torch.bool)
    raw = predictions(scores, maps)
    height, width = raw.anomaly_map.shape[-2:]
    batch = ImageBatch(
        image=torch.zeros(len(labels), 3, height, width),
        gt_label=gt_label,
        gt_mask=gt_label[:, None, None].expand(-1, height, width),
    )
    return batch.update(pred_score=raw.pred_score, anomaly_map=raw.anomaly_map)


def calibrated(scores=(0.1, 0.2, 0.7, 0.9), labels=(0, 0, 1, 1), maps=None):
    post_processor = FewShotPostProcessor()
    post_processor.calibrate(labelled(scores, labels, maps))
    return post_processor


def validate(post_processor, scores, labels, trainer=FIT):
    post_processor.on_validation_batch_end(trainer, None, labelled(scores, labels))
    post_processor.on_validation_epoch_end(trainer, None)


class TestCalibration:
    def test_threshold_separates_normal_from_damaged(self):
        post_processor = calibrated()
        for threshold in (post_processor.image_threshold, post_processor.pixel_threshold):
            assert 0.15 < float(threshold) < 0.75
        result = post_processor(predictions([0.2, 0.71]))
        assert result.pred_label.flatten().tolist() == [False, True]
        assert result.pred_mask.flatten(1).any(dim=1).tolist() == [False, True]

    def test_calibrating_again_forgets_the_first_time(self):
        post_processor = calibrated()
        post_processor.calibrate(labelled([0.01, 0.02, 0.03, 0.04], [0, 0, 1, 1]))
        assert 0.015 < float(post_processor.image_threshold) < 0.035
        assert 0.015 < float(post_processor.pixel_threshold) < 0.035

    def test_anomalies_that_cannot_be_seen_do_not_pull_normal_images_above_the_threshold(self):
        """The best F1 alone would call everything anomalous here."""
        scores, labels = [0.3, 0.4, 0.2, 0.25, 0.3, 0.35], [0, 0, 1, 1, 1, 1]
        post_processor = calibrated(scores, labels)
        result = post_processor(predictions(scores))
        assert not result.pred_label[:2].any()
        assert not result.pred_mask[:2].any()

    def test_normal_pixels_stay_below_the_pixel_threshold(self):
        count = 400
        normal = torch.linspace(0.1, 0.5, count).view(1, 1, 20, 20)
        maps = torch.cat([normal, 0.5 * normal])
        post_processor = calibrated([0.5, 0.5], [0, 1], maps.tolist())
        below = normal.flatten() <= post_processor.pixel_threshold
        assert float(below.float().mean()) == pytest.approx(NORMAL_PIXELS, abs=1.01 / count)

    def test_needs_predictions_and_ground_truth(self):
        batch = ImageBatch(image=torch.zeros(1, 3, 2, 2), gt_label=torch.tensor([0]))
        with pytest.raises(ValueError, match="Calibration needs pred_score"):
            FewShotPostProcessor().calibrate(batch)


class TestNormalisation:
    def test_threshold_becomes_one_half(self):
        post_processor = calibrated()
        threshold = float(post_processor.image_threshold)
        assert float(post_processor(predictions([threshold])).pred_score) == pytest.approx(0.5, abs=1e-6)

    @settings(max_examples=40, deadline=None)
    @given(threshold=st.floats(1e-3, 0.999), score=st.floats(1e-6, 1 - 1e-6))
    def test_shifts_the_log_odds(self, threshold, score):
        tensors = torch.tensor([score, threshold], dtype=torch.float64)
        nan = torch.tensor(float("nan"))
        normalised = FewShotPostProcessor._normalize(tensors[:1], nan, nan, tensors[1])
        # Near one, the spacing of doubles bounds what is left of the log-odds.
        rounding = 4 * torch.finfo(torch.float64).eps / float(1 - normalised)
        expected = tensors[:1].logit() - tensors[1].logit()
        torch.testing.assert_close(normalised.logit(), expected, rtol=1e-9, atol=1e-9 + rounding)

    @pytest.mark.parametrize("threshold", [0.01, 0.5, 0.99])
    def test_no_two_scores_tie(self, threshold):
        """Also beyond the highest score seen in calibration, where Anomalib's own would clip."""
        scores = torch.linspace(-6, 6, 200).sigmoid()
        nan = torch.tensor(float("nan"))
        normalised = FewShotPostProcessor._normalize(scores, nan, nan, torch.tensor(threshold))
        assert (normalised.diff() > 0).all()
        assert normalised.min() >= 0
        assert normalised.max() <= 1

    @pytest.mark.parametrize("threshold", [0.0, 1.0])
    def test_an_impossible_threshold_still_gives_scores_in_order(self, threshold):
        scores = torch.linspace(0, 1, 20)
        nan = torch.tensor(float("nan"))
        normalised = FewShotPostProcessor._normalize(scores, nan, nan, torch.tensor(threshold))
        assert (normalised.diff() >= 0).all()
        assert normalised[[0, -1]].tolist() == [0.0, 1.0]

    def test_extremes_stay_extremes(self):
        nan = torch.tensor(float("nan"))
        assert FewShotPostProcessor._normalize(torch.tensor([0.0, 1.0]), nan, nan, torch.tensor(0.3)).tolist() == [0, 1]

    def test_without_a_threshold_scores_stay_as_they_are(self):
        scores = torch.tensor([0.1, 0.5, 0.9])
        nan = torch.tensor(float("nan"))
        torch.testing.assert_close(FewShotPostProcessor._normalize(scores, nan, nan, nan), scores)
        assert FewShotPostProcessor._normalize(None, nan, nan, nan) is None

    def test_switching_it_off_leaves_raw_scores(self):
        post_processor = calibrated()
        post_processor.enable_normalization = False
        torch.testing.assert_close(post_processor(predictions([0.3])).pred_score, torch.tensor([[0.3]]))


class TestValidation:
    def test_normal_images_alone_change_nothing(self):
        """Anomalib's own post-processor would put the threshold at the highest normal score, 0.95."""
        post_processor = calibrated()
        before = post_processor.image_threshold.clone(), post_processor.pixel_threshold.clone()
        validate(post_processor, [0.95, 0.3], [0, 0])
        assert (post_processor.image_threshold, post_processor.pixel_threshold) == before

    def test_anomalous_images_alone_change_nothing(self):
        post_processor = calibrated()
        before = post_processor.image_threshold.clone()
        validate(post_processor, [0.05, 0.3], [1, 1])
        assert post_processor.image_threshold == before

    def test_both_kinds_set_the_thresholds(self):
        post_processor = calibrated()
        validate(post_processor, [0.01, 0.02, 0.05, 0.06], [0, 0, 1, 1])
        assert 0.02 < float(post_processor.image_threshold) < 0.055
        assert 0.02 < float(post_processor.pixel_threshold) < 0.055

    def test_each_epoch_counts_by_itself(self):
        """Normal images of one epoch must not pair up with anomalous ones of the next."""
        post_processor = calibrated()
        before = post_processor.image_threshold.clone()
        validate(post_processor, [0.01, 0.02], [0, 0])
        validate(post_processor, [0.05, 0.06], [1, 1])
        assert post_processor.image_threshold == before

    def test_a_sanity_check_changes_nothing(self):
        post_processor = calibrated()
        before = post_processor.image_threshold.clone()
        validate(post_processor, [0.01, 0.02, 0.05, 0.06], [0, 0, 1, 1], SimpleNamespace(sanity_checking=True))
        assert post_processor.image_threshold == before

    def test_without_images_nothing_happens(self):
        post_processor = calibrated()
        before = post_processor.image_threshold.clone()
        post_processor.on_validation_epoch_end(FIT, None)
        assert post_processor.image_threshold == before


def test_a_reloaded_post_processor_says_the_same():
    post_processor = calibrated()
    post_processor.image_sensitivity = 0.7
    loaded = FewShotPostProcessor()
    loaded.load_state_dict(post_processor.state_dict())
    loaded.load_checkpoint_config(post_processor.checkpoint_config())
    raw = predictions([0.05, 0.3, 0.6, 0.95])
    for before, after in zip(post_processor(raw), loaded(raw), strict=True):
        assert torch.equal(before, after)
