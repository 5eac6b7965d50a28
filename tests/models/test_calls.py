"""Arguments of denoisers: named tensors of tuples, and what is drawn for a batch."""

from __future__ import annotations

import pytest
import torch

from wanlab.models.calls import described, drawn, flat, gathered, times
from wanlab.models.families.base import Tensor

INPUTS = {
    "hidden_states": Tensor((1, 4, 2)),
    "rope": (Tensor((6, 2)), Tensor((6, 2))),
    "timestep": Tensor((1, 3)),
    "text_mask": Tensor((1, 5), "bool"),
    "block_scale": Tensor((7,)),
    "frames": 3,
    "stretch": (1.5, 2.0),
}


@pytest.fixture
def network():
    network = torch.nn.Linear(2, 2).to(torch.bfloat16)
    network.device, network.dtype = torch.device("cpu"), torch.bfloat16
    return network


def test_parts_of_a_tuple_are_named_and_found_again():
    named = flat(INPUTS)
    assert list(named)[:4] == ["hidden_states", "rope_0", "rope_1", "timestep"]
    assert named["stretch"] == (1.5, 2.0)
    order = ["rope", "hidden_states", "timestep", "text_mask", "block_scale", "frames", "stretch"]
    again = gathered(named, order)
    assert again == INPUTS
    assert list(again) == order


def test_an_argument_that_ends_in_a_number_is_no_part_of_another():
    values = {"text": 1, "text_2": 2}
    assert gathered(values, ["text", "text_2"]) == values


def test_a_batch_shares_tables_and_scales(network):
    arguments = drawn(INPUTS, torch.Generator().manual_seed(0), network, batch=2)
    shapes = {name: tuple(value.shape) for name, value in flat(arguments).items() if torch.is_tensor(value)}
    assert shapes == {
        "hidden_states": (2, 4, 2),
        "rope_0": (6, 2),
        "rope_1": (6, 2),
        "timestep": (2, 3),
        "text_mask": (2, 5),
        "block_scale": (7,),
    }
    assert arguments["text_mask"].dtype == torch.bool
    assert arguments["hidden_states"].dtype == torch.bfloat16
    assert arguments["text_mask"].all()
    assert arguments["frames"] == 3


def test_times_of_a_batch_differ():
    assert times((1,)).tolist() == [500.0]
    assert times((2, 2)).tolist() == [[900.0, 900.0], [100.0, 100.0]]


def test_what_is_no_tensor_stays():
    assert described(INPUTS, lambda name, tensor: name)["rope"] == ("rope", "rope")
