"""A frozen submodule stays out of the state, wherever its parent sits, and is not missed when loading."""

import pickle

import pytest
import torch
from torch import nn

from anomalib_vtfusion.components.frozen_state import leave_out_of_state


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.towering = nn.Linear(2, 1)  # begins with the same letters
        leave_out_of_state(self, "tower")


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential])
def test_state_holds_the_rest_alone_and_loads_strictly(wrap):
    inner, other_inner = Model(), Model()
    model, other = wrap(inner), wrap(other_inner)
    state = model.state_dict()
    assert [name.removeprefix("0.") for name in state] == ["towering.weight", "towering.bias"]
    tower = other_inner.tower[0].weight.clone()
    other.load_state_dict(state, strict=True)
    assert torch.equal(other_inner.towering.weight, inner.towering.weight)
    assert torch.equal(other_inner.tower[0].weight, tower)
    assert len(state) == 2  # what was passed in is left as it was


def test_what_is_missing_otherwise_is_still_missed():
    state = Model().state_dict()
    del state["towering.bias"]
    with pytest.raises(RuntimeError, match=r"towering\.bias"):
        Model().load_state_dict(state)


def test_pickling_takes_the_tower_along_and_keeps_it_out_of_the_state():
    model = Model()
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied.tower[0].weight, model.tower[0].weight)
    assert set(copied.state_dict()) == {"towering.weight", "towering.bias"}
