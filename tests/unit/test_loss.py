"""Losses against hand-computed values and independent formulations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from anomalib_vtfusion.loss import VTFusionLoss, dice_loss, focal_loss, pull_push_loss


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestFocalLoss:
    def test_without_focus_is_cross_entropy(self):
        logits, target = 3 * randn(2, 1, 4, 5), (randn(2, 1, 4, 5, seed=1) > 0).float()
        expected = F.binary_cross_entropy_with_logits(logits, target)
        torch.testing.assert_close(focal_loss(logits, target, gamma=0), expected)

    @pytest.mark.parametrize(("probability", "target"), [(0.9, 1.0), (0.9, 0.0), (0.25, 1.0)])
    def test_is_equation_four(self, probability, target):
        p_t = probability if target == 1 else 1 - probability
        logit = torch.tensor([math.log(probability / (1 - probability))])
        expected = -((1 - p_t) ** 2) * math.log(p_t)
        assert float(focal_loss(logit, torch.tensor([target]))) == pytest.approx(expected, rel=1e-5)

    @settings(max_examples=30, deadline=None)
    @given(logit=st.floats(-200, 200), target=st.sampled_from([0.0, 0.3, 1.0]))
    def test_value_and_gradient_are_finite(self, logit, target):
        logits = torch.tensor([logit], requires_grad=True)
        loss = focal_loss(logits, torch.tensor([target]))
        loss.backward()
        assert loss.isfinite()
        assert loss >= 0
        assert logits.grad.isfinite().all()


class TestDiceLoss:
    def test_by_hand(self):
        logits = torch.tensor([0.0, 0.0, math.log(3.0), -math.log(3.0)]).view(1, 1, 2, 2)  # 0.5, 0.5, 0.75, 0.25
        target = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 2, 2)
        # Overlap 0.5 + 0.75, sums 2 and 2: 1 - (2 * 1.25 + 1) / (2 + 2 + 1).
        assert float(dice_loss(logits, target)) == pytest.approx(0.3)
        assert float(dice_loss(logits, target, smooth=0)) == pytest.approx(1 - 2.5 / 4)

    def test_images_without_a_target_do_not_count(self):
        logits, target = randn(3, 1, 4, 4), torch.zeros(3, 1, 4, 4)
        target[1, :, :2] = 1
        assert float(dice_loss(logits, target)) == pytest.approx(float(dice_loss(logits[1:2], target[1:2])))
        assert float(dice_loss(logits, torch.zeros_like(target))) == 0.0

    def test_a_perfect_map_costs_nothing(self):
        target = (randn(2, 1, 4, 4) > 0).float()
        assert float(dice_loss(1e4 * (2 * target - 1), target)) == pytest.approx(0.0, abs=1e-6)
        # All wrong leaves the smoothing term alone: 1 - 1 / (16 + 1).
        assert float(dice_loss(-1e4 * (2 * target - 1), target)) == pytest.approx(1 - 1 / 17, abs=1e-6)


class TestPullPushLoss:
    def test_by_hand(self):
        distances = torch.tensor([0.5, 3.0, 4.0, 10.0, 100.0, -2.0]).view(1, 1, 2, 3)
        mask = torch.tensor([0.0, 0.0, 1.0, 0.5, 0.25, 0.0]).view(1, 1, 2, 3)
        # Pull over three normal patches: (0 + 2 + 0) / 3; push over two damaged ones: (2 + 0) / 2; 0.25 is a rim.
        loss = pull_push_loss(distances, mask, pull_margin=1.0, push_margin=6.0)
        assert float(loss) == pytest.approx(2 / 3 + 1)

    def test_normal_images_only_pull(self):
        distances = torch.tensor([2.0, 4.0]).view(1, 1, 1, 2)
        assert float(pull_push_loss(distances, torch.zeros(1, 1, 1, 2), pull_margin=1.0)) == pytest.approx(2.0)

    def test_damaged_everywhere_only_pushes(self):
        distances = torch.tensor([2.0, 4.0]).view(1, 1, 1, 2)
        assert float(pull_push_loss(distances, torch.ones(1, 1, 1, 2), push_margin=6.0)) == pytest.approx(3.0)

    def test_moves_patches_the_right_way(self):
        distances = torch.tensor([3.0, 3.0]).view(1, 1, 1, 2).requires_grad_()
        pull_push_loss(distances, torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)).backward()
        assert distances.grad[0, 0, 0, 0] > 0 > distances.grad[0, 0, 0, 1]


class TestVTFusionLoss:
    def inputs(self):
        mask = torch.zeros(2, 1, 16, 16)
        mask[0, :, 4:8, 4:12] = 1
        return {
            "logits": randn(2, 1, 8, 8),
            "text_logits": randn(2, 3, 4, 4, seed=1),
            "distances": 4 * randn(2, 2, 4, 4, seed=2),
            "image_logits": randn(2, 1, seed=3),
            "mask": mask,
        }

    def test_total_is_the_weighted_sum(self):
        loss = VTFusionLoss(text=0.25, distance=3.0, image=7.0)
        parts = loss(**self.inputs())
        assert set(parts) == {"total", *loss.weights}
        expected = parts["map"] + 0.25 * parts["text"] + 3 * parts["distance"] + 7 * parts["image"]
        torch.testing.assert_close(parts["total"], expected)

    def test_image_part_is_cross_entropy_on_whether_anything_is_damaged(self):
        inputs = self.inputs()
        score = inputs["image_logits"].flatten()
        expected = -(F.logsigmoid(score[0]) + F.logsigmoid(-score[1])) / 2
        torch.testing.assert_close(VTFusionLoss()(**inputs)["image"], expected)

    def test_maps_are_compared_with_the_share_of_damage_in_each_cell(self):
        inputs = self.inputs()
        share = inputs["mask"].view(2, 1, 4, 4, 4, 4).mean(dim=(3, 5))
        assert share[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
        expected = pull_push_loss(inputs["distances"].reshape(4, 1, 4, 4), share.repeat_interleave(2, dim=0))
        torch.testing.assert_close(VTFusionLoss()(**inputs)["distance"], expected)

    def test_every_text_map_counts_alike(self):
        inputs, loss = self.inputs(), VTFusionLoss()
        alone = [loss(**inputs | {"text_logits": inputs["text_logits"][:, i : i + 1]})["text"] for i in range(3)]
        torch.testing.assert_close(loss(**inputs)["text"], torch.stack(alone).mean())

    def test_a_better_map_costs_less(self):
        inputs, loss = self.inputs(), VTFusionLoss()
        fine = F.adaptive_avg_pool2d(inputs["mask"], 8)
        good, bad = (loss(**inputs | {"logits": sign * 6 * (2 * fine - 1)}) for sign in (1, -1))
        assert good["map"] < 0.1 * bad["map"]

    def test_every_input_gets_a_gradient(self):
        inputs = self.inputs()
        predictions = [inputs[name].requires_grad_() for name in ("logits", "text_logits", "distances", "image_logits")]
        VTFusionLoss()(**inputs)["total"].backward()
        assert all(tensor.grad.abs().max() > 0 for tensor in predictions)
