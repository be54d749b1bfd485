"""Numbers that change over the steps, and terms that hold them."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from limbeck.core.schedule import Ramp
from limbeck.core.term import Term
from limbeck.objectives import TAID, CrossEntropy, ForwardKL, SkewForwardKL

number = st.floats(-1e6, 1e6)
SHAPES = ["linear", "cosine"]


def test_linear_and_cosine_by_hand():
    linear = Ramp(from_=1.0, to=3.0)
    assert [linear.at(x) for x in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.5, 2.0, 3.0]
    cosine = Ramp(from_=1.0, to=3.0, shape="cosine")
    expected = [1 + (1 - math.cos(math.pi * x)) for x in (0.0, 0.25, 0.5, 1.0)]
    assert [cosine.at(x) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(expected)
    early = Ramp(from_=4.0, to=1.0, until=0.2)
    assert [early.at(x) for x in (0.1, 0.2, 0.9)] == [2.5, 1.0, 1.0]


@pytest.mark.parametrize("shape", SHAPES)
@given(
    from_=number, to=number, until=st.floats(0.01, 1), shares=st.lists(st.floats(0, 1), min_size=2)
)
def test_it_begins_and_ends_exactly_and_never_turns_or_leaves(shape, from_, to, until, shares):
    ramp = Ramp(from_=from_, to=to, until=until, shape=shape)
    assert ramp.at(0.0) == from_
    assert ramp.at(until) == ramp.at(1.0) == to
    low, high = sorted((from_, to))
    found = [ramp.at(share) for share in sorted(shares)]
    assert all(low <= value <= high for value in found)
    rounding = 1e-9 * max(1.0, abs(from_), abs(to))
    turned = [(b - a) * (1 if to >= from_ else -1) for a, b in zip(found, found[1:], strict=False)]
    assert all(step >= -rounding for step in turned)


def test_a_recipe_writes_from_without_underscore():
    adapter = TypeAdapter(Ramp)
    ramp = adapter.validate_python({"from": 2, "to": 1, "until": 0.5})
    assert ramp == Ramp(from_=2.0, to=1.0, until=0.5)
    assert adapter.dump_python(ramp, by_alias=True)["from"] == 2.0
    for wrong in ({"until": 0.0}, {"until": 1.1}, {"to": math.nan}, {"shape": "step"}, {"at": 1}):
        with pytest.raises(ValidationError):
            adapter.validate_python({"from": 2, "to": 1, **wrong})


def test_a_term_at_a_share_of_the_steps():
    term = Term(
        objective=SkewForwardKL(alpha=0.3),
        teacher="big",
        weight=9.0,
        channel="code",
        schedule={
            "weight": Ramp(from_=0.0, to=2.0),
            "temperature": Ramp(from_=4.0, to=1.0, until=0.5),
        },
    )
    half = term.at(0.25)
    assert half.weight == 0.5
    assert half.objective == SkewForwardKL(alpha=0.3, temperature=2.5)
    assert (half.teacher, half.channel, half.label) == ("big", "code", "skew_forward_kl")
    assert term.objective == SkewForwardKL(alpha=0.3)  # as it was
    assert term.at(1.0).objective.temperature == 1.0


def test_without_a_schedule_it_is_the_same_term():
    term = Term(objective=CrossEntropy())
    assert term.at(0.3) is term


def test_a_module_keeps_itself_and_only_its_weight_changes():
    class Projecting(torch.nn.Module):
        asks: ClassVar = frozenset({"hidden:1"})
        needs: ClassVar = frozenset({"hidden:3"})

        def forward(self, student, teacher):
            raise NotImplementedError

    term = Term(objective=Projecting(), schedule={"weight": Ramp(from_=1.0, to=0.0)})
    assert term.at(0.5).objective is term.objective
    assert term.at(0.5).weight == 0.5


def test_the_scheduled_number_reaches_loss_and_kernel():
    term = Term(objective=TAID(), weight=3.0, schedule={"t": Ramp(from_=0.4, to=1.0)})
    assert term.at(0.5).weight == 3.0
    assert [term.at(x).objective.kernel.keywords["t"] for x in (0.0, 1.0)] == [0.4, 1.0]


def test_other_fields_of_a_subclass_stay():
    @dataclass(frozen=True, kw_only=True)
    class Named(ForwardKL):
        table: tuple[int, ...] = ()

    term = Term(objective=Named(table=(1, 2)), schedule={"temperature": Ramp(from_=1.0, to=2.0)})
    assert term.at(1.0).objective == Named(table=(1, 2), temperature=2.0)
