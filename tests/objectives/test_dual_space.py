"""Dual-space distillation against its formulas, written with loops over samples in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from limbeck import objectives
from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Objective
from limbeck.core.types import Signals
from limbeck.losses import by_rows, dual_space
from limbeck.losses.by_rows import in_chunks
from limbeck.losses.projection import Projection
from limbeck.objectives.dual_space import DualSpaceAt, Ends

STUDENT, TEACHER = Ends("emb", 3, 4), Ends("emb", 5, 6)
V, W, T = 13, 17, 2.0
OURS, THEIRS = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])


def made(align="attention", student=STUDENT, teacher=TEACHER, temperature=T):
    torch.manual_seed(0)
    return DualSpaceAt(student, teacher, align, temperature).double()


def says(ends, vocabulary, sample, seed, scale=1.0, **head):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    n = len(sample)
    weight = (draw(vocabulary, ends.head_width) * scale).requires_grad_()
    hidden = draw(n, ends.head_width).requires_grad_()
    return Signals(
        labels=torch.randint(vocabulary, (n,), generator=random),
        projection=Projection(hidden=hidden, weight=weight, **head),
        hidden={"emb": draw(n, ends.embedding_width).requires_grad_()},
        sample=sample,
    )


def both(ours=OURS, theirs=THEIRS, **more):
    student, teacher = says(STUDENT, V, ours, 1, **more), says(TEACHER, W, theirs, 2, **more)
    head = teacher.projection
    still = replace(head, hidden=head.hidden.detach(), weight=head.weight.detach())
    return student, replace(teacher, projection=still)


def kl(p_logits, q_logits):
    p, q = (x / T for x in (p_logits, q_logits))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return T**2 * (p.exp() * (p - q)).sum(-1)


def row_address(signals, i):
    read = signals.hidden["emb"][i].detach()
    target = signals.projection.weight[signals.labels[i]].detach()
    return torch.cat([x / x.square().mean().sqrt() for x in (read, target)])


def reference(module, student, teacher):
    """Each sample for itself, each row for itself."""
    ours, theirs = student.projection, teacher.projection
    losses = [torch.zeros((), dtype=torch.float64) for _ in student.labels]
    for sample in set(student.sample.tolist()) & set(teacher.sample.tolist()):
        mine = [i for i, s in enumerate(student.sample.tolist()) if s == sample]
        other = [j for j, s in enumerate(teacher.sample.tolist()) if s == sample]
        scores = torch.stack(
            [
                torch.stack(
                    [module.query(row_address(student, i)) @ row_address(teacher, j) for j in other]
                )
                for i in mine
            ]
        ) / math.sqrt(TEACHER.embedding_width + TEACHER.head_width)
        values = []
        for j in other:
            state = theirs.hidden[j].detach()
            target = theirs.weight[teacher.labels[j]].detach()
            values.append(state + target / target.norm() * state.norm())
        teacher_losses = []
        for b, j in enumerate(other):
            share = scores[:, b].softmax(0)
            mixed = sum(
                a * module.to_teacher(ours.hidden[i]) for a, i in zip(share, mine, strict=True)
            )
            teacher_losses.append(kl(theirs.weight @ theirs.hidden[j], theirs.weight @ mixed))
        for a, i in enumerate(mine):
            share = scores[a].softmax(0)
            mixed = module.to_student(
                sum(x * value for x, value in zip(share, values, strict=True))
            )
            logits = ours.weight.detach() @ mixed
            label = student.labels[i]
            losses[i] = -logits.log_softmax(-1)[label]
            if logits.argmax() == label:
                losses[i] = losses[i] + kl(logits.detach(), ours.weight @ ours.hidden[i])
            losses[i] = losses[i] + sum(teacher_losses) / len(other)
    return torch.stack(losses)


def inputs(student):
    return {
        "hidden": student.projection.hidden,
        "weight": student.projection.weight,
        "embedding": student.hidden["emb"],
    }


@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("right", [True, False])
def test_it_is_its_formula_and_has_its_gradient(right, rows, monkeypatch):
    student, teacher = both()
    module = made()
    if right:  # so that the projector is right about some tokens
        student = replace(student, labels=guesses(module, student, teacher, wrong_at=1))
    expected = reference(module, student, teacher)
    if rows:
        monkeypatch.setattr(dual_space, "chunk_rows", lambda _: rows)
    value = module(student, teacher)
    torch.testing.assert_close(value, expected)
    leaves = [*inputs(student).values(), *module.parameters()]
    weight = torch.arange(1.0, len(value) + 1).double()
    want = torch.autograd.grad((weight * expected).sum(), leaves, allow_unused=True)
    got = torch.autograd.grad((weight * value).sum(), leaves, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert a is not None or b is None or not b.any()
        if a is not None:
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    assert want[0].abs().min() > 0  # of the student's states
    assert got[2] is None  # an embedding is only an address


def guesses(module, student, teacher, wrong_at):
    """Labels that the projected teacher finds likeliest; they change its query, so: until found."""
    labels = student.labels.clone()
    for _ in range(50):
        said = replace(student, labels=labels)
        found = projected_logits(module, said, teacher).argmax(-1)
        found[wrong_at] = (found[wrong_at] + 1) % V
        if torch.equal(found[2:], labels[2:]) and found[0] == labels[0]:
            break
        labels = found
    right = projected_logits(module, replace(student, labels=labels), teacher).argmax(-1) == labels
    assert right.any()
    assert not right.all()
    return labels


def projected_logits(module, student, teacher):
    seen = []
    through = dual_space._through

    def spy(head, hidden):
        seen.append(through(head, hidden).logits())
        return through(head, hidden)

    dual_space._through = spy
    try:
        module(student, teacher)
    finally:
        dual_space._through = through
    return seen[0].detach()


def test_who_gets_a_gradient_from_which_part():
    student, teacher = both()
    head = student.projection
    projected = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = linear(projected, head.weight).argmax(-1)
    value = dual_space.student_space(head, projected, labels, temperature=T)
    own = torch.nn.functional.cross_entropy(linear(projected, head.weight.detach()), labels)
    gradient = torch.autograd.grad(value.mean(), [projected, head.hidden, head.weight])
    (alone,) = torch.autograd.grad(own, projected)
    torch.testing.assert_close(gradient[0], alone)  # the KL leaves the projector alone
    distance = kl(linear(projected, head.weight).detach(), linear(head.hidden, head.weight))
    wanted = torch.autograd.grad(distance.mean(), [head.hidden, head.weight])
    torch.testing.assert_close(gradient[1:], wanted)  # and the cross-entropy the student
    wrong = (labels + 1) % V
    value = dual_space.student_space(head, projected, wrong, temperature=T)
    assert torch.equal(torch.autograd.grad(value.sum(), head.hidden)[0], torch.zeros(6, 4).double())
    theirs = replace(teacher.projection, weight=teacher.projection.weight.requires_grad_())
    states = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    dual_space.teacher_space(theirs, states).sum().backward()
    assert states.grad.abs().min() > 0
    assert theirs.weight.grad is None


@pytest.mark.parametrize("align", ["attention", "bytes"])
def test_gradients_are_those_of_finite_differences(align):
    ours, theirs = (OURS, THEIRS) if align == "attention" else (OURS, OURS)
    student, teacher = both(ours, theirs)
    module = made(align)
    head = student.projection
    # The label's share of the loss and the mask are piecewise; what trains is smooth in the states.
    leaf = head.hidden

    def of(hidden):
        return module(replace(student, projection=replace(head, hidden=hidden)), teacher)

    assert torch.autograd.gradcheck(of, (leaf,))


def test_the_order_of_rows_and_samples_changes_nothing():
    student, teacher = both()
    module = made()
    value = module(student, teacher)
    random = torch.Generator().manual_seed(5)
    mine, theirs = (torch.randperm(len(s), generator=random) for s in (OURS, THEIRS))
    torch.testing.assert_close(module(student.select(mine), teacher.select(theirs)), value[mine])
    names = torch.tensor([12, 3, 7])
    renamed = [replace(s, sample=names[s.sample]) for s in (student, teacher)]
    torch.testing.assert_close(module(*renamed), value)


def test_other_samples_change_nothing():
    """So a longer sample, which is what padding is made for, changes nothing either."""
    student, teacher = both()
    module = made()
    value = module(student, teacher)
    for sample in range(3):
        mine, theirs = (torch.where(s.sample == sample)[0] for s in (student, teacher))
        alone = module(student.select(mine), teacher.select(theirs))
        torch.testing.assert_close(alone, value[mine])


def test_samples_that_one_side_has_not_are_left_out():
    student, teacher = both(OURS, torch.tensor([0, 0, 1, 1, 1, 4, 4, 4]))
    module = made()
    value = module(student, teacher)
    torch.testing.assert_close(value, reference(module, student, teacher))
    assert (value[:4] > 0).all()
    assert value[4:].tolist() == [0, 0]
    value.sum().backward()
    assert (student.projection.hidden.grad[4:] == 0).all()


@pytest.mark.parametrize("align", ["attention", "bytes"])
def test_no_rows_give_no_losses(align):
    none = torch.zeros(0, dtype=torch.int64)
    student, teacher = both(none, none)
    value = made(align)(student, teacher)
    assert value.shape == (0,)
    value.sum().backward()


def test_hard_attention_is_row_beside_row():
    """A row that is alone in its sample is all that the other side can look at."""
    alone = torch.arange(6)
    student, teacher = both(alone, alone)
    head = teacher.projection
    without = head.weight.clone()
    without[teacher.labels.unique()] = 0.0  # so that no target is added to the states
    teacher = replace(teacher, projection=replace(head, weight=without))
    soft, hard = made(), made("bytes")
    hard.load_state_dict({k: v for k, v in soft.state_dict().items() if "query" not in k})
    torch.testing.assert_close(soft(student, teacher), hard(student, teacher))


def test_a_teacher_that_is_the_student_leaves_the_label_alone():
    ends = Ends("emb", 4, 4)
    student = says(ends, V, OURS, 1)
    module = made("bytes", ends, ends)
    with torch.no_grad():
        for projector in (module.to_student, module.to_teacher):
            projector.weight.copy_(torch.eye(4))
            projector.bias.zero_()
    value = module(student, student)
    logits = student.projection.logits()
    expected = torch.nn.functional.cross_entropy(logits, student.labels, reduction="none")
    torch.testing.assert_close(value, expected)
    other = replace(student, projection=says(ends, V, OURS, 3).projection)
    theirs = linear(other.projection.hidden, student.projection.weight)
    own = logits[: len(theirs)]
    expected = torch.nn.functional.cross_entropy(theirs, student.labels, reduction="none")
    expected += torch.where(theirs.argmax(-1) == student.labels, kl(theirs, own), 0.0)
    heard = other.projection.logits()
    expected += kl(heard, linear(student.projection.hidden, other.projection.weight))
    torch.testing.assert_close(module(student, other), expected)


@pytest.mark.parametrize("align", ["attention", "bytes"])
def test_scale_cap_bias_and_an_adapter_are_the_heads(align):
    ours, theirs = (OURS, THEIRS) if align == "attention" else (OURS, OURS)
    student, teacher = both(ours, theirs, bias=None)
    module = made(align)
    plain = module(student, teacher)
    head = student.projection
    changed = {
        "bias": torch.linspace(-1, 1, V).double(),
        "scale": 0.5,
        "soft_cap": 0.7,
    }
    for name, change in changed.items():
        value = module(replace(student, projection=replace(head, **{name: change})), teacher)
        assert (value != plain).any(), name
    # An adapter is of the student's own distribution only.
    low = {"low_hidden": torch.ones(len(ours), 2).double().requires_grad_()}
    low["low_weight"] = torch.linspace(-1, 1, 2 * V).double().view(V, 2).requires_grad_()
    adapted = replace(head, **low)
    projected = torch.randn(len(ours), 4, dtype=torch.float64)
    labels = linear(projected, head.weight).argmax(-1)
    value = dual_space.student_space(adapted, projected, labels, temperature=T, rows=2)
    theirs = linear(projected, head.weight).detach()
    expected = kl(theirs, adapted.logits())
    expected = expected + torch.nn.functional.cross_entropy(theirs, labels, reduction="none")
    torch.testing.assert_close(value, expected)
    got = torch.autograd.grad(value.sum(), list(low.values()))
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), list(low.values())))


@pytest.mark.parametrize("align", ["attention", "bytes"])
def test_half_precision_states_are_compared_in_full(align):
    ours, theirs = (OURS, THEIRS) if align == "attention" else (OURS, OURS)
    student, teacher = both(ours, theirs)
    module = made(align).float()

    def cast(signals, dtype):
        head = signals.projection
        head = replace(head, hidden=head.hidden.to(dtype), weight=head.weight.float())
        return replace(signals, projection=head, hidden={"emb": signals.hidden["emb"].to(dtype)})

    with torch.autocast("cpu", torch.bfloat16):
        low = module(*(cast(s, torch.bfloat16) for s in (student, teacher)))
        low.sum().backward()
    assert low.dtype == torch.float32
    assert student.projection.weight.grad.isfinite().all()
    high = module(*(cast(s, torch.float32) for s in (student, teacher)))
    torch.testing.assert_close(low, high, rtol=0.05, atol=0.1)


def test_attention_must_be_among_the_same_samples():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="same samples"):
        dual_space.cross_attention(x, x, x, x, torch.tensor([0, 0]), torch.tensor([0, 1]))


@settings(max_examples=30)
@given(st.integers(0, 9), st.integers(1, 12), st.integers(0, 100))
def test_chunks_are_the_whole(n, rows, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=random, dtype=torch.float64, requires_grad=True)
    y = torch.randn(n, generator=random, dtype=torch.float64, requires_grad=True)
    held = torch.randn(3, generator=random, dtype=torch.float64, requires_grad=True)

    def function(x, y):
        return (x * held).sin().sum(-1) * y

    whole, parts = function(x, y), in_chunks(function, x, y, rows=rows)
    assert torch.equal(whole, parts)
    leaves = (x, y, held)
    got = torch.autograd.grad((parts**2).sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad((whole**2).sum(), leaves))


def test_no_more_logits_are_held_than_a_chunk():
    """Neither does the graph hold any: of all that is kept, nothing is as wide as a vocabulary."""
    student, teacher = both()
    kept = []

    def note(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        made()(student, teacher)
    assert not [shape for shape in kept if shape in ((6, V), (8, W))]
    widest = []
    project = Projection.logits

    def spy(self):
        logits = project(self)
        widest.append(logits.shape[0])
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Projection, "logits", spy)
        patch.setattr(by_rows, "CHUNK_BYTES", 4 * W * 2)
        made()(student, teacher).sum().backward()
    assert max(widest) == 2


def test_it_is_an_objective_that_must_be_finished():
    objective = objectives.DualSpace()
    assert isinstance(objective, Objective)
    assert (objective.unit, objectives.DualSpace(align="bytes").unit) == ("sample", "token")
    assert objectives.DualSpace.unit == "sample"
    assert not hasattr(objective, "rowwise")
    with pytest.raises(RecipeError, match="must be finished"):
        objective(*both())


def test_logits_in_place_of_a_head_are_refused(small_network, make_scene):
    scene = make_scene(small_network(8, seed=1), small_network(16), (" the cat sat", " run"))
    module = objectives.DualSpace().finish(scene)
    student, teacher = both()
    with pytest.raises(RecipeError, match="train.logits"):
        module(replace(student, projection=None), teacher)
