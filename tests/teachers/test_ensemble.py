"""Several teachers as one, by enumeration in float64, and views cut into some of their samples."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import losses
from limbeck.core.specs import EnsembleTeacher, LocalTeacher
from limbeck.core.types import Encoding, Sample, Signals, Turn, View
from limbeck.models.encode import Encoder
from limbeck.models.load import load_teacher
from limbeck.models.packing import packing
from limbeck.teachers.ensemble import Ensemble, behind, some_samples

LOGITS = frozenset({"logits"})
CHOSEN = frozenset({"chosen"})


class Oracle:
    """Says what a table has for the token before each row, and remembers what it was asked."""

    offers = frozenset({"logits"})
    vocabulary = "tokens"

    def __init__(self, seed, columns=11, dtype=torch.float64, silent=()):
        generator = torch.Generator().manual_seed(seed)
        self.name = f"oracle {seed}"
        self.table = 3 * torch.randn(50, columns, generator=generator, dtype=torch.float64)
        self.table = self.table.to(dtype)
        self.silent = torch.tensor(silent)
        self.views: list[View] = []

    def read(self, view, needs):
        assert needs == LOGITS
        self.views.append(view)
        tokens = view.ids.flatten()[view.rows]
        valid = ~torch.isin(tokens, self.silent) if len(self.silent) else None
        return Signals(labels=view.labels, logits=self.table[tokens], valid=valid)


def encodings(lengths, prompt=1, name="s"):
    return [
        Encoding(
            ids=[(7 * index + place) % 11 for place in range(length)],
            learn=[place >= prompt for place in range(length)],
            starts=list(range(length)),
            ends=list(range(1, length + 1)),
            name=f"{name}{index}",
        )
        for index, length in enumerate(lengths)
    ]


def collated(tokenizer, lengths, packed, channels=()):
    view = Encoder(tokenizer, 64).collate(encodings(lengths), packed=packed)
    return replace(view, channels=tuple(channels))


def same(a, b):
    assert a.names == b.names
    assert a.channels == b.channels
    for name in ("ids", "attend", "offsets", "rows", "positions"):
        mine, theirs = getattr(a, name), getattr(b, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))


# --- some of a view's samples -------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@settings(max_examples=60)
@given(data=st.data())
def test_some_samples_are_what_collating_them_alone_gives(tokenizer, packed, data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    kept = data.draw(
        st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True).map(sorted)
    )
    every = encodings(lengths)
    encoder = Encoder(tokenizer, 64)
    whole = collated(tokenizer, lengths, packed, [f"c{i}" for i in range(len(lengths))])
    alone = encoder.collate([every[i] for i in kept], packed=packed)
    part = some_samples(whole, kept)
    assert part.channels == tuple(f"c{i}" for i in kept)
    same(replace(part, channels=()), alone)
    same(some_samples(whole, range(len(lengths))), whole)


@pytest.mark.parametrize("packed", [False, True])
def test_a_sample_without_tokens_keeps_its_place(tokenizer, packed):
    view = collated(tokenizer, [3, 0, 4], packed)
    part = some_samples(view, [1, 2])
    assert part.names == ("s1", "s2")
    assert torch.equal(part.labels, some_samples(view, [2]).labels)
    assert not len(some_samples(view, [1]).rows)


# --- together -----------------------------------------------------------------------------------


def by_enumeration(tables, shares, how, tokens):
    """Probabilities of the ensemble, a row and a column at a time."""
    columns = min(table.shape[1] for table in tables)
    rows = []
    for token in tokens:
        each = [table[token].softmax(-1).tolist() for table in tables]
        if how == "mixture":
            row = [sum(w * p[c] for w, p in zip(shares, each, strict=True)) for c in range(columns)]
        else:
            row = [
                math.prod(p[c] ** w for w, p in zip(shares, each, strict=True))
                for c in range(columns)
            ]
        rows.append([value / sum(row) for value in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("how", ["mixture", "geometric"])
@pytest.mark.parametrize("packed", [False, True])
def test_together_by_enumeration(tokenizer, how, packed):
    view = collated(tokenizer, [4, 7, 2], packed)
    members = {"a": Oracle(1), "b": Oracle(2), "c": Oracle(3), "other": Oracle(4)}
    spec = EnsembleTeacher(of={"a": 5.0, "b": 3.0, "c": 2.0}, how=how)
    said = Ensemble(spec, members).read(view, LOGITS | CHOSEN)
    tables = [members[name].table for name in "abc"]
    tokens = view.ids.flatten()[view.rows].tolist()
    expected = by_enumeration(tables, (0.5, 0.3, 0.2), how, tokens)
    torch.testing.assert_close(said.logits.softmax(-1), expected)
    chosen = expected.log().gather(-1, view.labels[:, None]).squeeze(-1)
    torch.testing.assert_close(said.chosen.double(), chosen, rtol=1e-6, atol=1e-6)
    assert torch.equal(said.labels, view.labels)
    assert said.valid is None
    assert not members["other"].views


def test_only_what_is_asked_for(tokenizer):
    view = collated(tokenizer, [4, 3], False)
    pair = Ensemble(EnsembleTeacher(of={"a": 1, "b": 1}), {"a": Oracle(1), "b": Oracle(2)})
    assert pair.read(view, CHOSEN).logits is None
    assert pair.read(view, LOGITS).chosen is None


@pytest.mark.parametrize("how", ["mixture", "geometric", "route"])
def test_models_padded_to_different_widths(tokenizer, how):
    """The columns that all have; padding of a real model has next to no probability."""
    view = collated(tokenizer, [4, 7], False, ["a", "b"])
    members = {"a": Oracle(1), "b": Oracle(2, columns=14)}
    members["b"].table[:, 11:] = -60.0
    spec = EnsembleTeacher(of={"a": 0.4, "b": 0.6}, how=how)
    said = Ensemble(spec, members).read(view, LOGITS)
    assert said.logits.shape == (9, 11)
    if how != "route":
        tokens = view.ids.flatten()[view.rows].tolist()
        tables = [member.table for member in members.values()]
        expected = by_enumeration(tables, (0.4, 0.6), how, tokens)
        torch.testing.assert_close(said.logits.softmax(-1), expected)


@pytest.mark.parametrize("how", ["mixture", "geometric", "route"])
def test_half_precision_is_not_summed_in_half_precision(tokenizer, how):
    view = collated(tokenizer, [4, 3], False, ["a", "b"])
    members = {"a": Oracle(1, dtype=torch.bfloat16), "b": Oracle(2, dtype=torch.bfloat16)}
    said = Ensemble(EnsembleTeacher(of={"a": 1, "b": 2}, how=how), members).read(view, LOGITS)
    assert said.logits.dtype == torch.float32
    for member in members.values():
        member.table = member.table.double()
    exact = Ensemble(EnsembleTeacher(of={"a": 1, "b": 2}, how=how), members).read(view, LOGITS)
    torch.testing.assert_close(said.logits.double(), exact.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["mixture", "geometric", "route"])
def test_a_row_of_which_a_member_knows_nothing_is_not_valid(tokenizer, how):
    view = collated(tokenizer, [4, 5], False, ["b", "a"])
    tokens = view.ids.flatten()[view.rows]
    members = {"a": Oracle(1, silent=[8]), "b": Oracle(2, silent=[1])}
    said = Ensemble(EnsembleTeacher(of={"a": 1, "b": 1}, how=how), members).read(view, LOGITS)
    if how == "route":
        mine = view.sample_of(view.rows)
        wrong = (tokens == 8) & (mine == 1) | (tokens == 1) & (mine == 0)
    else:
        wrong = (tokens == 1) | (tokens == 8)
    assert wrong.any()
    assert torch.equal(said.valid, ~wrong)


def test_tokens_that_a_member_rules_out(tokenizer):
    view = collated(tokenizer, [5], False)
    members = {"a": Oracle(1), "b": Oracle(2)}
    members["a"].table[:, 3] = -torch.inf
    for how in ("mixture", "geometric"):
        spec = EnsembleTeacher(of={"a": 0.5, "b": 0.5}, how=how)
        p = Ensemble(spec, members).read(view, LOGITS).logits.softmax(-1)
        assert p.isfinite().all()
        assert bool((p[:, 3] == 0).all()) is (how == "geometric")


@settings(max_examples=30)
@given(share=st.floats(0.05, 0.95), seed=st.integers(0, 100))
def test_terms_with_weights_have_the_gradient_of_the_mixture(share, seed):
    """What the documentation says: forward KL to a mixture is the sum of forward KLs, less a
    constant."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, 4, 9, generator=generator, dtype=torch.float64)
    student, a, b = drawn[0].requires_grad_(), drawn[1], drawn[2]
    mixture = (share * a.softmax(-1) + (1 - share) * b.softmax(-1)).log()
    apart = share * losses.forward_kl(student, a) + (1 - share) * losses.forward_kl(student, b)
    whole = losses.forward_kl(student, mixture)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (apart, whole)]
    torch.testing.assert_close(*gradients)
    assert (apart >= whole - 1e-12).all()
    # Of the reverse KL it is the geometric mean.
    mean = share * a.log_softmax(-1) + (1 - share) * b.log_softmax(-1)
    apart = share * losses.reverse_kl(student, a) + (1 - share) * losses.reverse_kl(student, b)
    whole = losses.reverse_kl(student, mean)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (apart, whole)]
    torch.testing.assert_close(*gradients)


# --- route --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@settings(max_examples=40)
@given(data=st.data())
def test_each_sample_is_read_by_its_own_member_alone(tokenizer, packed, data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=7))
    channels = [data.draw(st.sampled_from(["a", "b", "c", "main"])) for _ in lengths]
    view = collated(tokenizer, lengths, packed, channels)
    members = {name: Oracle(seed) for seed, name in enumerate("abc")}
    spec = EnsembleTeacher(of=dict.fromkeys("abc", 1.0), how="route")
    said = Ensemble(spec, members).read(view, LOGITS)
    tokens = view.ids.flatten()[view.rows].tolist()
    readers = ["a" if channel == "main" else channel for channel in channels]
    of_row = view.sample_of(view.rows).tolist()
    assert said.logits.shape == (len(tokens), 11)
    for row, (token, sample) in enumerate(zip(tokens, of_row, strict=True)):
        assert torch.equal(said.logits[row], members[readers[sample]].table[token])
    for name, member in members.items():
        seen = [sample for v in member.views if len(v.rows) for sample in v.names]
        mine = [f"s{i}" for i, reader in enumerate(readers) if reader == name]
        assert seen == mine or not any(lengths[int(s[1:])] > 1 for s in mine)


def test_a_view_that_knows_no_channels_goes_to_the_first(tokenizer):
    view = collated(tokenizer, [4, 3], False)
    members = {"a": Oracle(1), "b": Oracle(2)}
    Ensemble(EnsembleTeacher(of={"b": 1, "a": 1}, how="route"), members).read(view, LOGITS)
    assert members["b"].views
    assert not members["a"].views


def test_a_channel_that_is_nobodys_is_said_once(tokenizer, caplog):
    view = collated(tokenizer, [4, 3, 5], False, ["cod", "main", "code"])
    members = {"chat": Oracle(1), "code": Oracle(2)}
    pair = Ensemble(EnsembleTeacher(of={"chat": 1, "code": 1}, how="route"), members)
    for _ in range(2):
        pair.read(view, LOGITS)
    assert [record.message for record in caplog.records] == [
        "no teacher of the ensemble is called 'cod', so chat reads the samples of this channel"
    ]


# --- readers ------------------------------------------------------------------------------------


def test_it_may_be_read_ahead_where_all_members_may():
    class Ahead(Oracle):
        ahead = True

    spec = EnsembleTeacher(of={"a": 1, "b": 1})
    assert Ensemble(spec, {"a": Ahead(1), "b": Ahead(2)}).ahead
    assert not Ensemble(spec, {"a": Ahead(1), "b": Oracle(2)}).ahead


def test_who_does_the_work():
    members = {"a": Oracle(1), "b": Oracle(2), "c": Oracle(3)}
    assert behind(Ensemble(EnsembleTeacher(of={"b": 1, "a": 1}), members)) == [
        members["b"],
        members["a"],
    ]
    assert behind(members["c"]) == [members["c"]]


@pytest.mark.parametrize("how", ["mixture", "geometric", "route"])
def test_real_models_say_the_same_packed_and_padded(tiny_teacher, how):
    spec = LocalTeacher(name=str(tiny_teacher))
    models = {name: load_teacher(spec, torch.device("cpu"), 64) for name in ("a", "b")}
    with torch.no_grad():
        for parameter in models["b"].module.parameters():
            parameter.mul_(0.8)
    texts = ["the cat sat on a mat", "two dogs", "three old red trees near the river"]
    samples = [
        Sample(id=str(i), turns=(Turn(text="and "), Turn(text=text, learn=True)))
        for i, text in enumerate(texts)
    ]
    both = Ensemble(EnsembleTeacher(of={"a": 2, "b": 1}, how=how), models)
    every = [both.encode(sample) for sample in samples]
    channels = ("b", "a", "b")
    padded = replace(both.collate(every), channels=channels)
    with torch.no_grad(), packing("always", behind(both)) as on:
        assert on
        packed = replace(both.collate(every), channels=channels)
        assert packed.positions is not None
        found = both.read(packed, LOGITS).logits
    with torch.no_grad():
        plain = both.read(padded, LOGITS).logits
        alone = {name: model.read(padded, LOGITS).logits for name, model in models.items()}
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    if how == "route":
        of_row = padded.sample_of(padded.rows)
        expected = torch.where((of_row == 1)[:, None], alone["a"], alone["b"])
    elif how == "mixture":
        expected = (2 / 3 * alone["a"].softmax(-1) + 1 / 3 * alone["b"].softmax(-1)).log()
    else:
        expected = 2 / 3 * alone["a"] + 1 / 3 * alone["b"]
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
