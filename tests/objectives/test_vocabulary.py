"""Objectives for other tokenizers: what `finish` finds and refuses, and that rows stay rows."""

import pickle
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from limbeck import losses
from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Objective, Scene
from limbeck.core.registry import kinds
from limbeck.core.types import Signals, Spans
from limbeck.losses.chunks import RowTerm
from limbeck.losses.fused import sum_over_rows
from limbeck.losses.likelihood import likelihood_matching
from limbeck.losses.projection import Projection
from limbeck.losses.semantic import semantic_transport
from limbeck.losses.vocabularies import hybrid_kl, mapped_kl
from limbeck.objectives import costs, vocabulary
from limbeck.objectives.token import SortedL1
from limbeck.objectives.vocabulary import (
    HybridKL,
    LikelihoodMatching,
    MappedKL,
    PrefixKL,
    SemanticTransport,
)

TEACHER = [None, b" cat", b" cats", b" dog", b"s", b".", None, None]
STUDENT = [b" cat", b" car", b".", b"dog", b"s", None, None]
ENDS = 7, 5  # the ids of both end-of-text tokens


@dataclass
class FakeNetwork:
    """As much of a model as an objective looks at before training."""

    tokens: list
    vocabulary: str
    end_token: int | None = None
    width: int = 4
    vectors: torch.Tensor | None = field(default=None)

    def token_bytes(self):
        return self.tokens

    def embeddings(self):
        if self.vectors is not None:
            return self.vectors
        random = torch.Generator().manual_seed(len(self.tokens))
        return torch.randn(len(self.tokens), self.width, generator=random)


def scene(teacher=None, student=None, **kw):
    teacher = teacher or FakeNetwork(TEACHER, "theirs", ENDS[0])
    student = student or FakeNetwork(STUDENT, "mine", ENDS[1])
    values = {"student": student, "teacher": teacher, "samples": (), "seed": 0, "folder": Path(".")}
    return Scene(**values | kw)


def rows(n=6, w=8, v=7, seed=0):
    """(student, teacher) signals."""
    random = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(n, width, generator=random) for width in (v, w))
    labels = torch.zeros(n, dtype=torch.int64)
    return Signals(labels=labels, logits=student), Signals(labels=labels, logits=teacher)


OBJECTIVES = [
    SemanticTransport(k=3, temperature=1.5),
    MappedKL(temperature=1.5),
    MappedKL(reverse=True),
    MappedKL(max_distance=0),
    PrefixKL(temperature=1.5),
    HybridKL(transport=0.5, temperature=1.5),
]
every = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: repr(o)[:30])


# --- all of them ------------------------------------------------------------------------------


@every
def test_it_is_a_value_before_and_after(objective):
    finished = objective.finish(scene())
    for each in (objective, finished):
        assert isinstance(each, Objective)
        assert each.asks == each.needs == {"logits"}
        assert each.unit == "token"
        assert each.rowwise
        assert not each.shared_vocabulary
        assert each.kind == objective.kind
        assert kinds("objective")[each.kind] is type(objective)
    for setting in fields(objective):
        assert getattr(finished, setting.name) == getattr(objective, setting.name)
    again = finished.finish(scene())  # what was found before is found anew
    student, teacher = rows()
    torch.testing.assert_close(again(student, teacher), finished(student, teacher))
    assert not isinstance(finished, torch.nn.Module)


@every
def test_a_setting_may_change_while_it_runs(objective):
    student, teacher = rows()
    finished = objective.finish(scene())
    cooler = replace(finished, temperature=4.0)
    want = replace(objective, temperature=4.0).finish(scene())
    torch.testing.assert_close(cooler(student, teacher), want(student, teacher))
    assert not torch.allclose(cooler(student, teacher), finished(student, teacher))


@every
def test_rows_are_alone(objective):
    student, teacher = rows()
    finished = objective.finish(scene())
    whole = finished(student, teacher)
    assert whole.shape == (6,)
    order = torch.tensor([4, 1, 5])
    part = finished(student.select(order), teacher.select(order))
    torch.testing.assert_close(part, whole[order])


@every
def test_only_the_student_learns(objective):
    student, teacher = rows()
    student.logits.requires_grad_()
    finished = objective.finish(scene())
    before = finished(student, teacher)
    before.sum().backward()
    assert student.logits.grad.isfinite().all()
    assert student.logits.grad.abs().sum() > 0
    lower = replace(student, logits=(student.logits - 0.01 * student.logits.grad).detach())
    assert finished(lower, teacher).sum() < before.sum()


@every
def test_without_a_model_at_hand_it_says_so(objective):
    with pytest.raises(RecipeError, match="needs a teacher whose model"):
        objective.finish(replace(scene(), teacher=None))
    with pytest.raises(RuntimeError, match=r"call finish\(scene\)"):
        objective(*rows())


@every
def test_it_fits_the_chunks_of_a_head(objective):
    from limbeck.core.term import Term
    from limbeck.train.loss import fits_chunks

    assert fits_chunks([Term(objective=objective.finish(scene()), weight=1.0, teacher="t")])


@every
def test_chunks_at_the_head_give_the_same_loss_and_gradient(objective):
    random = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, 4, generator=random), torch.randn(7, 4, generator=random)
    theirs = Projection(
        hidden=torch.randn(9, 5, generator=random), weight=torch.randn(8, 5, generator=random)
    )
    labels, counts = torch.zeros(9, dtype=torch.int64), torch.tensor([1.0, 0.0, 2.0] * 3)
    finished = objective.finish(scene())

    def loss(student, teacher, index):
        return finished(
            Signals(labels=labels[index], logits=student),
            Signals(labels=labels[index], logits=teacher),
        )

    whole = hidden.clone().requires_grad_()
    want = (counts * loss(whole @ weight.T, theirs.logits(), torch.arange(9))).sum()
    want.backward()
    parts = hidden.clone().requires_grad_()
    term = RowTerm(loss=loss, weight=counts, teacher="t")
    student = Projection(hidden=parts, weight=weight)
    got, _ = sum_over_rows(student, {"t": theirs}, [term], chunk=2)
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-5, rtol=1e-3)


def test_the_losses_are_those_of_the_package():
    student, teacher = rows()
    both = student.logits, teacher.logits
    finished = MappedKL(temperature=2.0).finish(scene())
    assert finished.columns.tolist() == [1, 1, 5, 3, 4, 7, -1]
    want = mapped_kl(*both, finished.columns, temperature=2.0)
    assert torch.equal(finished(student, teacher), want)
    finished = HybridKL(transport=0.3, temperature=2.0).finish(scene())
    want = hybrid_kl(*both, finished.partition, transport=0.3, temperature=2.0)
    assert torch.equal(finished(student, teacher), want)
    finished = SemanticTransport(k=4, epsilon=0.2, iterations=50, temperature=2.0).finish(scene())
    want = semantic_transport(
        *both, finished.pricing, k=4, epsilon=0.2, iterations=50, temperature=2.0
    )
    assert torch.equal(finished(student, teacher), want)


# --- the vocabularies -------------------------------------------------------------------------


def test_partition():
    found = HybridKL().finish(scene()).partition
    assert found.student.tolist() == [0, 2, 4, 5]
    assert found.teacher.tolist() == [1, 5, 4, 7]
    assert found.student_rest.tolist() == [1, 3]
    assert found.teacher_rest.tolist() == [2, 3]
    assert found.student_other.tolist() == [6]


def test_without_ends_the_special_tokens_have_no_partner():
    ending = scene(student=FakeNetwork(STUDENT, "mine"))
    assert MappedKL().finish(ending).columns.tolist()[5:] == [-1, -1]
    assert HybridKL().finish(ending).partition.student_other.tolist() == [5, 6]


def test_mapped_to_equal_tokens_only():
    columns = MappedKL(max_distance=0).finish(scene()).columns
    assert columns.tolist() == [1, -1, 5, -1, 4, 7, -1]


@pytest.mark.parametrize("objective", [MappedKL(), HybridKL()])
def test_one_tokenizer_gives_the_forward_kl_of_all_columns(objective):
    one = FakeNetwork(STUDENT, "same", ENDS[1])
    wide = FakeNetwork([*STUDENT, None], "same", ENDS[1])
    student, teacher = rows(w=7)
    got = objective.finish(scene(teacher=one, student=one))(student, teacher)
    torch.testing.assert_close(got, losses.forward_kl(student.logits, teacher.logits))
    student, teacher = rows()
    got = objective.finish(scene(teacher=wide, student=one))(student, teacher)
    torch.testing.assert_close(got, losses.forward_kl(student.logits, teacher.logits[:, :7]))
    student, teacher = rows(v=8, w=7)  # what only the student has, loses its probability
    got = objective.finish(scene(teacher=one, student=wide))(student, teacher)
    hole = torch.cat([teacher.logits, torch.full((6, 1), -torch.inf)], dim=1)
    torch.testing.assert_close(got, losses.forward_kl(student.logits, hole))


def test_nothing_to_compare_is_refused():
    strangers = scene(student=FakeNetwork([None, None], "mine"))
    with pytest.raises(RecipeError, match="no token"):
        MappedKL().finish(strangers)
    with pytest.raises(RecipeError, match="nothing that could be compared"):
        HybridKL().finish(strangers)


# --- semantic costs ---------------------------------------------------------------------------


def test_byte_costs():
    pricing = SemanticTransport(k=3).finish(scene()).pricing
    everything = torch.arange(8)[None], torch.arange(7)[None]
    found = pricing(*everything)
    between = found.between[0]
    assert between[1, 0] == 0
    assert between[1, 1].item() == pytest.approx(1 / 4, abs=1e-3)
    assert between[3, 3].item() == pytest.approx(1 / 4, abs=1e-3)
    assert between[ENDS] == 0
    assert (between[0] == 1).all()
    assert (between[6] == 1).all()
    for own in (found.teacher[0], found.student[0]):
        assert not own.diagonal().any()
        assert torch.equal(own, own.T)
    assert found.teacher[0][0, 6] == 1


def test_large_vocabularies_are_priced_as_they_are_needed(monkeypatch):
    table = SemanticTransport(k=3).finish(scene())
    monkeypatch.setattr(costs, "TABLE_ENTRIES", 8 * 7)
    found = SemanticTransport(k=3).finish(scene())
    assert isinstance(table.pricing, costs.TableCosts)
    assert isinstance(found.pricing, costs.ByteCosts)
    student, teacher = rows(n=30)
    assert torch.equal(found(student, teacher), table(student, teacher))


def test_embeddings_of_one_vocabulary():
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 3.0]])
    one = FakeNetwork([b"a", b"b", b"c"], "same", vectors=vectors)
    finished = SemanticTransport(k=1, cost="embeddings").finish(scene(teacher=one, student=one))
    e = torch.eye(3).log()
    labels = torch.zeros(2, dtype=torch.int64)
    value = finished(
        Signals(labels=labels, logits=e[[1, 2]]), Signals(labels=labels, logits=e[[0, 0]])
    )
    cosine = torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0)
    torch.testing.assert_close(value, torch.stack([1 - cosine, torch.tensor(1.0)]))
    with pytest.raises(RecipeError, match=r"^cost: .*one tokenizer"):
        SemanticTransport(k=1, cost="embeddings").finish(scene())


def test_a_table_of_the_user(tmp_path):
    random = torch.Generator().manual_seed(1)
    cost = torch.rand(8, 7, generator=random)
    points, others = torch.rand(8, 2, generator=random), torch.rand(7, 2, generator=random)
    own = {"teacher": torch.cdist(points, points), "student": torch.cdist(others, others)}
    for table in own.values():
        table.copy_((table + table.T) / 2).fill_diagonal_(0)
    path = str(tmp_path / "cost.safetensors")
    save_file({"cost": cost}, path)
    pricing = SemanticTransport(k=3, cost=path).finish(scene()).pricing
    ids = torch.tensor([[2, 4]]), torch.tensor([[6, 0, 1]])
    found = pricing(*ids)
    assert torch.equal(found.between[0], cost[[2, 4]][:, [6, 0, 1]])
    assert found.teacher is None
    assert found.student is None
    assert found.rest == cost.max()
    uneven = {
        name: table + 1e-7 * torch.rand(table.shape, generator=random)
        for name, table in own.items()
    }
    save_file({"cost": cost, **uneven}, path)  # rounding is forgiven
    found = SemanticTransport(k=3, cost=path).finish(scene()).pricing(*ids)
    torch.testing.assert_close(found.teacher[0], own["teacher"][[2, 4]][:, [2, 4]])
    torch.testing.assert_close(found.student[0], own["student"][[6, 0, 1]][:, [6, 0, 1]])
    for table in (found.teacher[0], found.student[0]):
        assert torch.equal(table, table.T)
        assert not table.diagonal().any()


SQUARE = 1 - torch.eye(8)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"cost": torch.rand(7, 8)}, r"tensor 'cost': must be \[8, 7\].*; it is \[7, 8\]"),
        ({"cost": torch.rand(8)}, r"must be \[8, 7\]"),
        ({"cost": torch.rand(8, 7) - 2}, "must not be negative; its least entry is -"),
        ({"cost": torch.ones(8, 7)}, "the same for all of the student's tokens"),
        ({"cost": torch.zeros(8, 7)}, "the same for all of the student's tokens"),
        ({"cost": torch.rand(8, 1).expand(8, 7).contiguous()}, "the same for all"),
        ({"cost": torch.rand(8, 7) / 0}, "NaN or infinite"),
        ({"cost": torch.rand(8, 7) * torch.nan}, "NaN or infinite"),
        ({"cost": torch.ones(8, 7, dtype=torch.int64)}, "floating-point"),
        ({"costs": torch.rand(8, 7)}, "no tensor 'cost'; it has costs"),
        ({"cost": torch.rand(8, 7), "teacher": SQUARE}, "has 'teacher' but not the other"),
        (
            {"cost": torch.rand(8, 7), "teacher": SQUARE, "student": torch.rand(7, 7)},
            "tensor 'student' must be symmetric",
        ),
        (
            {"cost": torch.rand(8, 7), "teacher": SQUARE, "student": SQUARE.clone()},
            r"tensor 'student': must be \[7, 7\]",
        ),
    ],
)
def test_useless_tables_are_refused_before_training(tables, message, tmp_path):
    path = str(tmp_path / "cost.safetensors")
    save_file(tables, path)
    with pytest.raises(RecipeError, match=message) as caught:
        SemanticTransport(k=3, cost=path).finish(scene())
    assert str(caught.value).startswith("cost")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_file_that_is_not_there_or_is_no_table(tmp_path):
    path = tmp_path / "cost.safetensors"
    with pytest.raises(RecipeError, match="cannot read"):
        SemanticTransport(k=3, cost=str(path)).finish(scene())
    path.write_bytes(b"not a table")
    with pytest.raises(RecipeError, match="cannot read"):
        SemanticTransport(k=3, cost=str(path)).finish(scene())
    with pytest.raises(RecipeError, match="unknown cost 'byte'; did you mean 'bytes'"):
        SemanticTransport(k=3, cost="byte").finish(scene())


def test_k_beyond_the_vocabulary():
    SemanticTransport(k=7).finish(scene())
    with pytest.raises(RecipeError, match=r"^k: must be at most 7"):
        SemanticTransport(k=8).finish(scene())


# --- likelihood -------------------------------------------------------------------------------


def test_likelihood_of_spans():
    spans = Spans(
        rows=torch.tensor([0, 1, 3]), span=torch.tensor([0, 0, 1]), after=torch.tensor([2, -1])
    )
    chosen = -torch.tensor([1.0, 2.0, 4.0, 8.0])
    boundary = -torch.tensor([0.1, 0.2, 0.3, 0.4])
    labels = torch.zeros(4, dtype=torch.int64)
    student = Signals(labels=labels, chosen=chosen, boundary=boundary)
    teacher = Signals(labels=labels, chosen=chosen / 3, boundary=boundary * 2)
    objective = LikelihoodMatching(temperature=50.0)
    assert isinstance(objective, Objective)
    assert objective.unit == "span"
    assert objective.asks == objective.needs == {"chosen", "boundary"}
    got = objective(student.select(spans), teacher.select(spans))
    mine, theirs = torch.tensor([-3.3, -8.0]), torch.tensor([-1.6, -8 / 3])
    torch.testing.assert_close(got, likelihood_matching(mine, theirs, temperature=50.0))
    assert (got > 0).all()


def test_stretches_that_end_within_a_word_of_the_teacher_are_not_compared():
    boundary = torch.tensor([0.05, 0.1001, 0.9]).log()
    labels = torch.zeros(3, dtype=torch.int64)
    teacher = Signals(labels=labels, chosen=torch.full((3,), -1.0), boundary=boundary)
    chosen = torch.full((3,), -2.0, requires_grad=True)
    student = Signals(labels=labels, chosen=chosen, boundary=boundary.flip(0))
    value = LikelihoodMatching()(student, teacher)
    value.sum().backward()
    assert (value > 0).tolist() == [False, True, True]
    assert (chosen.grad != 0).tolist() == [False, True, True]
    assert (LikelihoodMatching(outcome_threshold=0.0)(student, teacher) > 0).all()
    nowhere = replace(teacher, boundary=torch.full((3,), -torch.inf))
    assert not LikelihoodMatching()(student, nowhere).any()
    assert LikelihoodMatching(outcome_threshold=0.0)(student, nowhere).isfinite().all()


# --- sorted L1 --------------------------------------------------------------------------------


def test_pairing_of_sorted_l1():
    assert SortedL1().unit == "token"
    assert SortedL1(pairing="order").unit == "order"
    assert SortedL1.unit == "token"
    assert replace(SortedL1(pairing="order"), temperature=2.0).unit == "order"
    assert replace(SortedL1(pairing="order"), pairing="bytes").unit == "token"
    student, teacher = rows()
    got = SortedL1(pairing="order", temperature=2.0)(student, teacher)
    want = losses.sorted_l1(student.logits, teacher.logits, temperature=2.0)
    assert torch.equal(got, want)


def test_every_objective_is_public():
    from limbeck import objectives

    names = {"SemanticTransport", "MappedKL", "HybridKL", "LikelihoodMatching"}
    assert names <= set(objectives.__all__)
    assert all(getattr(objectives, name) is getattr(vocabulary, name) for name in names)


def test_prefix_kl_of_one_vocabulary_is_the_forward_kl_down_to_special_tokens():
    one = FakeNetwork([None, b"a", b"a", None, b"ab"], "same", 3)
    finished = PrefixKL().finish(scene(teacher=one, student=one))
    assert finished.columns.tolist() == [0, 1, 2, 3, 4]  # spelling alone would lose and merge some
    random = torch.Generator().manual_seed(0)
    labels = torch.zeros(6, dtype=torch.int64)
    student, teacher = (
        Signals(labels=labels, logits=torch.randn(6, 5, generator=random)) for _ in range(2)
    )
    torch.testing.assert_close(
        finished(student, teacher), losses.forward_kl(student.logits, teacher.logits)
    )
