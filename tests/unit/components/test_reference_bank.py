"""Reference bank: coverage, nearest rows, leave-one-out, and what survives a round trip through the state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from anomalib_vtfusion.components import reference_bank
from anomalib_vtfusion.components.reference_bank import (
    FARTHEST,
    ReferenceBank,
    greedy_coreset,
    nearest_distance,
    spacing_weights,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


def naive_distance(queries, rows, blocked=None):
    """Weight of a row, its length, times cosine distance, by loops."""
    result = []
    for b, image in enumerate(queries):
        for token in image:
            allowed = [row for r, row in enumerate(rows) if blocked is None or not blocked[b, r]]
            distances = [row.norm() * (1 - (token * row / row.norm()).sum()) for row in allowed]
            result.append(torch.stack(distances or [torch.tensor(FARTHEST)]).min())
    return torch.stack(result).view(queries.shape[:2])


def relative(distances):
    """Less half of the image's mean."""
    return distances - distances.mean(dim=1, keepdim=True) / 2


class TestGreedyCoreset:
    def test_takes_the_far_ends_of_a_line_first(self):
        """On a line every projection keeps the order of distances, so the farthest points are known exactly."""
        rows = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 10.0])[:, None]
        for seed in range(5):
            first = int(greedy_coreset(rows, 1, generator(seed))[0])
            kept = [first]
            while len(kept) < 4:
                gaps = [min(abs(float(rows[i] - rows[j])) for j in kept) for i in range(len(rows))]
                kept.append(max(range(len(rows)), key=lambda i: gaps[i]))
            # 1, 2 and 3 can be equally far from what is kept; the covering radius is what counts.
            chosen = greedy_coreset(rows, 4, generator(seed))
            assert self.radius(rows, chosen) == self.radius(rows, torch.tensor(kept)) == 1.0
            assert 5 in chosen

    @staticmethod
    def radius(rows, chosen):
        return float(torch.cdist(rows, rows[chosen]).amin(dim=1).max())

    @settings(max_examples=20, deadline=None)
    @given(count=st.integers(1, 30), size=st.integers(1, 40), seed=st.integers(0, 1000))
    def test_size_order_and_repeatability(self, count, size, seed):
        rows = torch.randn(count, 5, generator=generator(seed))
        chosen = greedy_coreset(rows, size, generator(seed))
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert len(chosen) == min(size, count)
        assert torch.equal(chosen, greedy_coreset(rows, size, generator(seed)))

    def test_copies_do_not_crowd_out_other_rows(self):
        rows = torch.cat([torch.zeros(50, 3), torch.eye(3)])
        kept = rows[greedy_coreset(rows, 4, generator())]
        assert {tuple(row) for row in kept.tolist()} == {(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)}

    def test_of_copies_alone_takes_as_many_as_asked_for(self):
        assert len(set(greedy_coreset(torch.ones(9, 3), 4, generator()).tolist())) == 4

    def test_leaves_the_global_random_state_alone(self):
        rows, before = unit(9, 3), torch.random.get_rng_state()
        greedy_coreset(rows, 4, generator())
        assert torch.equal(torch.random.get_rng_state(), before)


class TestNearestDistance:
    def test_equals_loops(self):
        queries, rows = unit(2, 5, 6), unit(7, 6, seed=1)
        torch.testing.assert_close(nearest_distance(queries, rows), naive_distance(queries, rows))
        cosine = 1 - (queries.flatten(0, 1) @ rows.t()).amax(dim=1).view(2, 5)
        torch.testing.assert_close(nearest_distance(queries, rows), cosine)

    def test_a_longer_row_is_farther_away(self):
        queries, rows = unit(2, 5, 6), unit(7, 6, seed=1) * torch.linspace(0.5, 2, 7)[:, None]
        torch.testing.assert_close(nearest_distance(queries, rows), naive_distance(queries, rows))
        one = nearest_distance(queries, rows[-1:])
        torch.testing.assert_close(one, 2 * nearest_distance(queries, rows[-1:] / 2))

    def test_nothing_is_farther_than_when_all_rows_are_blocked(self):
        queries = unit(1, 3, 4)
        blocked = nearest_distance(queries, unit(2, 4), torch.ones(1, 2, dtype=torch.bool))
        assert blocked.tolist() == [[FARTHEST] * 3]
        opposite = nearest_distance(queries[:, :1], -queries[0, :1] * 2)
        torch.testing.assert_close(opposite, torch.tensor([[FARTHEST]]))

    def test_blocked_rows_do_not_count(self):
        queries, rows = unit(2, 5, 6), unit(7, 6, seed=1)
        blocked = torch.rand(2, 7, generator=generator(2)) < 0.5
        expected = naive_distance(queries, rows, blocked)
        torch.testing.assert_close(nearest_distance(queries, rows, blocked), expected)
        with_gradient = nearest_distance(queries.requires_grad_(), rows, blocked)
        torch.testing.assert_close(with_gradient.detach(), expected)
        assert (expected > naive_distance(queries.detach(), rows)).any()

    def test_own_row_is_at_distance_zero(self):
        rows = unit(7, 6)
        torch.testing.assert_close(nearest_distance(rows[None], rows), torch.zeros(1, 7), atol=1e-6, rtol=0)

    def test_gradients_equal_those_of_the_whole_search(self):
        gradients = []
        for function in (nearest_distance, naive_distance):
            queries, rows = unit(2, 5, 6).requires_grad_(), unit(7, 6, seed=1).requires_grad_()
            (function(queries, rows) * torch.arange(10.0).view(2, 5)).sum().backward()
            gradients.append((queries.grad, rows.grad))
        torch.testing.assert_close(gradients[0], gradients[1])


class TestSpacingWeights:
    def test_rows_in_a_crowd_count_more(self):
        crowd = F.normalize(unit(1, 6) + 0.05 * torch.randn(40, 6, generator=generator()), dim=-1)
        scattered = unit(40, 6, seed=3)
        weights = spacing_weights(torch.cat([crowd, scattered]))
        assert weights[:40].min() > 1 > weights[40:].median()

    @pytest.mark.parametrize("chunk", [7, 1000])
    def test_is_the_root_of_the_mean_distance_to_the_neighbours(self, chunk, monkeypatch):
        monkeypatch.setattr(reference_bank, "CHUNK", chunk)
        rows = unit(50, 6)
        distances = [[float(1 - row @ other) for o, other in enumerate(rows) if o != r] for r, row in enumerate(rows)]
        spacing = torch.tensor([sum(sorted(to_others)[:32]) / 32 for to_others in distances])
        torch.testing.assert_close(spacing_weights(rows), (spacing.mean() / spacing).sqrt())

    @pytest.mark.parametrize("rows", [torch.eye(6), torch.eye(6)[:1], torch.ones(9, 4) / 2])
    def test_rows_equally_far_apart_count_the_same(self, rows):
        torch.testing.assert_close(spacing_weights(rows), torch.ones(len(rows)))


class TestReferenceBank:
    def make(self, max_rows=100, references=3):
        """A bank of two layers with ``references`` references, one view each."""
        bank = ReferenceBank([6, 4], max_rows)
        tokens = [
            torch.randn(references, 5, 6, generator=generator()),
            torch.randn(references, 2, 4, generator=generator(1)),
        ]
        bank.fill(tokens, torch.arange(references), generator())
        keys = [F.normalize(bank.frozen(layer), dim=-1) for layer in range(2)]
        bank.store_keys(keys)
        return bank, [F.normalize(layer_tokens, dim=-1) for layer_tokens in bank.centred(tokens)]

    def test_a_reference_is_never_matched_against_itself(self):
        bank, tokens = self.make()
        assert bank.references == 3
        with_itself = bank.distances(tokens)
        assert with_itself[0].abs().max() < 2e-3  # every token is in the bank, rounded to half precision
        left_out = bank.distances(tokens, own=torch.arange(3))
        for reference in range(3):
            rows = bank.keys(0)[bank.owners(0) != reference]
            expected = relative(naive_distance(tokens[0][reference][None], rows))[0]
            torch.testing.assert_close(left_out[0][reference], expected)
        assert left_out[0].mean(dim=1).min() > 1e-2

    def test_the_only_reference_is_matched_against_itself(self):
        bank, tokens = self.make(references=1)
        assert bank.distances(tokens, own=torch.zeros(1, dtype=torch.long))[0].abs().max() < 2e-3

    def test_every_view_of_a_reference_is_left_out(self):
        bank = ReferenceBank([6], 100)
        view = torch.randn(2, 5, 6, generator=generator())
        bank.fill([torch.cat([view, view])], torch.tensor([0, 1, 0, 1]), generator())
        bank.store_keys([F.normalize(bank.frozen(0), dim=-1)])
        query = [F.normalize(tokens, dim=-1) for tokens in bank.centred([view[:1]])]
        expected = relative(naive_distance(query[0], bank.keys(0)[bank.owners(0) == 1]))
        torch.testing.assert_close(
            bank.distances(query, own=torch.zeros(1, dtype=torch.long))[0], expected, atol=2e-3, rtol=0
        )

    def test_rows_keep_their_owner_when_thinned(self):
        bank = ReferenceBank([3], 4)
        tokens = torch.arange(3.0)[:, None, None] * 10 + torch.rand(3, 5, 3, generator=generator()) + 1
        bank.fill([tokens], torch.tensor([7, 8, 9]), generator())
        assert bank.frozen(0).shape == (4, 3)
        for row, owner in zip(bank.frozen(0), bank.owners(0), strict=True):
            assert (bank.centred([tokens])[0][owner - 7] == row).all(dim=1).any()

    def test_takes_off_a_share_of_what_all_patches_have_in_common(self):
        bank = ReferenceBank([2], 10)
        tokens = torch.tensor([[[1.0, 10.0], [3.0, 10.0]]])
        bank.fill([tokens], torch.zeros(1, dtype=torch.long), generator())
        expected = torch.tensor([[0.4, 7.0], [2.4, 7.0]])  # 0.3 of the mean (2, 10)
        torch.testing.assert_close(bank.frozen(0), expected)
        torch.testing.assert_close(bank.centred([tokens])[0][0], expected)

    def test_keys_are_as_long_as_they_count(self):
        bank, _ = self.make()
        rows = F.normalize(bank.frozen(0), dim=-1)
        torch.testing.assert_close(bank.keys(0).norm(dim=-1), spacing_weights(rows), atol=1e-3, rtol=0)
        torch.testing.assert_close(bank.weighted(0, rows), bank.keys(0), atol=1e-3, rtol=0)

    def test_an_image_that_is_farther_all_over_is_half_as_much_farther(self):
        bank, tokens = self.make()
        near, far = bank.distances(tokens)[0], bank.distances([unit(3, 5, 6, seed=7), tokens[1]])[0]
        full = nearest_distance(unit(3, 5, 6, seed=7), bank.keys(0)) - nearest_distance(tokens[0], bank.keys(0))
        torch.testing.assert_close((far - near).mean(dim=1), full.mean(dim=1) / 2)

    def test_other_keys_can_be_matched_against(self):
        bank, tokens = self.make()
        other = [unit(9, 6, seed=5), unit(3, 4, seed=6)]
        torch.testing.assert_close(bank.distances(tokens, other)[1], relative(naive_distance(tokens[1], other[1])))

    def test_statistics(self):
        bank, _ = self.make()
        bank.store_statistics([torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, 5.0, 5.0]])])
        assert bank.mean.tolist() == [2.0, 5.0]
        assert bank.std[0] == pytest.approx(2**0.5)
        assert bank.std[1] == pytest.approx(1e-4)  # equal distances must not divide by zero
        first, second = bank.standardise([torch.tensor([2.0, 4.0]), torch.tensor([5.0])])
        torch.testing.assert_close(first, torch.tensor([0.0, 2**0.5]))
        assert second.tolist() == [0.0]

    def test_a_reloaded_bank_gives_identical_distances(self):
        bank, _ = self.make()
        bank.store_statistics([torch.rand(9), torch.rand(9)])
        state = bank.state_dict()
        assert state["keys_0"].dtype == torch.float16
        assert not any("frozen" in name or "owners" in name for name in state)
        loaded = ReferenceBank([6, 4], 100)
        assert loaded.is_empty
        loaded.load_state_dict(state)
        assert not loaded.is_empty
        assert loaded.keys(0).dtype == torch.float32
        queries = [unit(2, 5, 6, seed=8), unit(2, 2, 4, seed=9)]
        for before, after in zip(bank.distances(queries), loaded.distances(queries), strict=True):
            assert torch.equal(before, after)
        assert torch.equal(bank.mean, loaded.mean)

    def test_a_bank_with_rows_takes_those_of_the_state(self):
        small, _ = self.make(references=2)
        large, _ = self.make(references=3)
        large.load_state_dict(small.state_dict())
        assert large.keys(0).shape == (10, 6)
        assert torch.equal(large.keys(1), small.keys(1))

    def test_refuses_the_rows_of_another_encoder(self):
        bank, _ = self.make()
        with pytest.raises(RuntimeError, match="size mismatch"):
            ReferenceBank([8, 4], 100).load_state_dict(bank.state_dict())

    def test_empty_bank(self):
        with pytest.raises(RuntimeError, match="no reference images yet"):
            ReferenceBank([6], 10).distances([unit(1, 5, 6)])

    @pytest.mark.parametrize("rows", [0, -1])
    def test_no_room(self, rows):
        with pytest.raises(ValueError, match=f"max_rows={rows}"):
            ReferenceBank([6], rows)

    def test_half_precision_queries_are_compared_in_single_precision(self):
        bank, tokens = self.make()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            distances = bank.distances(tokens)
        assert distances[0].dtype == torch.float32
        assert torch.equal(distances[0], bank.distances(tokens)[0])
