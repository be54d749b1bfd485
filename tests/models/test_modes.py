import pytest
from torch import nn

from limbeck.models.modes import evaluating


def test_each_part_gets_its_own_mode_back_whatever_happens_in_the_block():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    model[1].eval()
    before = [part.training for part in model.modules()]
    with evaluating(model, model[0]):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == before
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [part.training for part in model.modules()] == before
