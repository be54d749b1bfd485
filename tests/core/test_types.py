"""Samples, encodings and signals say what the loop relies on."""

import torch

from limbeck.core.types import Encoding, Pairing, Sample, Signals, Turn, View


def test_prompt_and_completion():
    asked, said = Turn(text="a"), Turn(text="b", learn=True)
    assert Sample(id="0", turns=(asked, said)).prompt == (asked,)
    assert Sample(id="0", turns=(asked, said)).completion == "b"
    assert Sample(id="0", turns=(asked,)).prompt == (asked,)
    assert Sample(id="0", turns=(asked,)).completion is None
    assert Sample(id="0", turns=()).prompt == ()


def test_the_first_token_is_never_a_row():
    learn = [True, True, False, True]
    assert Encoding(ids=[5] * 4, learn=learn, starts=[0] * 4, ends=[1] * 4).rows == 2


def test_labels_are_the_next_tokens():
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    attend = torch.tensor([[True, True, True], [True, True, False]])
    view = View(
        ids=ids, attend=attend, offsets=torch.zeros(2, 3, 2).long(), rows=torch.tensor([0, 1, 3])
    )
    assert view.labels.tolist() == [2, 3, 5]
    assert view.tokens == 5
    assert view.to(torch.device("cpu")).labels.tolist() == [2, 3, 5]


def test_selecting_rows():
    signals = Signals(
        labels=torch.arange(3),
        logits=torch.eye(3),
        hidden={"last": torch.arange(3)[:, None]},
    )
    assert signals.select(None) is signals
    chosen = signals.select(torch.tensor([2, 0]))
    assert chosen.labels.tolist() == [2, 0]
    assert chosen.logits.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert chosen.hidden["last"].tolist() == [[2], [0]]
    assert chosen.chosen is None
    moved = signals.to(torch.device("cpu"))
    assert torch.equal(moved.logits, signals.logits)
    pairing = Pairing(student=None, teacher=torch.tensor([1]), weight=torch.ones(1))
    assert pairing.to(torch.device("cpu")).student is None
