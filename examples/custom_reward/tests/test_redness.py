import torch
from fdfo_redness import Redness

from lightning_fdfo.testing import check_reward


def test_it_keeps_the_contract_of_a_reward():
    check_reward(Redness())


def test_red_is_redder_than_blue():
    red, blue = torch.zeros(2, 3, 8, 8).unbind(0)
    red[0], blue[2] = 1, 1
    assert Redness(gain=2.0)(torch.stack([red, blue]), ["", ""], [{}, {}]).tolist() == [2.0, -1.0]
