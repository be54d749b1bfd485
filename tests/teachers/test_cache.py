"""What a cache gives back is what the teacher said, in any order and layout."""

import gc
import itertools
import json
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck import losses
from limbeck.core.errors import CacheError, RecipeError
from limbeck.core.specs import CachedTeacher, LocalTeacher
from limbeck.core.types import Sample, Signals, Turn
from limbeck.evals import Agreement, Perplexity
from limbeck.losses.projection import Projection
from limbeck.models.causal import CausalModel
from limbeck.models.encode import Encoder
from limbeck.models.load import load_teacher
from limbeck.recipe.cache import make_caches, open_cache
from limbeck.recipe.check import check
from limbeck.recipe.run import run
from limbeck.teachers import fill as filling
from limbeck.teachers.cache import CacheReader
from limbeck.teachers.identity import difference, stamps, weight_files, weights_sha256
from limbeck.teachers.keep import KEEPERS, draw, join, keeper
from limbeck.teachers.parts import parts
from limbeck.teachers.store import Store
from limbeck.train import prepare
from limbeck.train.loop import Trainer
from limbeck.train.worker import Worker

CPU = torch.device("cpu")
LOGITS = frozenset({"logits"})
EXACT, HALF = (1e-4, 0.5) if torch.cuda.is_available() else (1e-5, 0.05)
"""Of a logit, in float32 and bfloat16: on a GPU another shape of a batch takes another kernel."""
OBJECTIVES = {
    "sampled": "sparse_kl",
    "topk": "sparse_kl",
    "chosen": "cross_entropy",
    "hidden": "forward_kl",
    "full": "forward_kl",
}


@pytest.fixture
def recipe_of(make_recipe, tiny_teacher, tmp_path):
    """A recipe whose teacher is cached in `tmp_path/cache`."""

    def make(keep="sampled", train=None, **changes):
        teacher = {
            "kind": "cache",
            "path": str(tmp_path / "cache"),
            "of": {"name": str(tiny_teacher)},
            "keep": keep,
            "k": 12,
            **changes,
        }
        objective = {"kind": OBJECTIVES[keep]}
        if "temperature" in changes:
            objective["temperature"] = changes["temperature"]
        terms = [{"objective": objective}]
        return make_recipe(train, teachers={"big": teacher}, terms=terms)

    return make


@pytest.fixture
def cached(recipe_of):
    """(live teacher, reader, training samples) of a cache that was just made."""

    def make(keep="sampled", **changes):
        recipe = recipe_of(keep, **changes)
        make_caches(recipe)
        source = recipe.source.open(recipe.seed)
        reader = open_cache(recipe, check(recipe), "big", source, CPU)
        live = load_teacher(recipe.teachers["big"].of, CPU, recipe.student.max_length)
        return live, reader, source.training

    return make


def mixed(live, samples, count=9):
    """A view of some samples, out of order and of many lengths."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1))[:count]
    return live.collate([live.encode(samples[int(i)]) for i in order])


def logits_of(live, view):
    with torch.no_grad():
        return live.read(view, LOGITS).logits


# --- draws ------------------------------------------------------------------------------------


def test_draws_follow_the_distribution():
    """A chi-square of 200,000 draws from 8 tokens; 24.3 is passed once in a thousand times."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -3.0, 1.5]])
    luck = torch.rand(1, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 2.0):
        ids, mean = draw(logits, luck, temperature)
        p = (logits.double() / temperature).softmax(-1)[0]
        seen = torch.bincount(ids[0], minlength=8).double()
        expected = p * ids.numel()
        assert float(((seen - expected) ** 2 / expected).sum()) < 24.3
        assert float(mean) == pytest.approx(float((p * p.log()).sum()), abs=0.01)


def test_draws_divide_the_unit_interval_by_the_probabilities():
    """Not at random: luck on a grid falls on token j for a share of p_j, to a grid step."""
    random = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(3, 50, generator=random)
    steps = 100_000
    luck = ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).expand(3, -1)
    ids, _ = draw(logits, luck, 1.0)
    p = logits.double().softmax(-1)
    for row in range(3):
        share = torch.bincount(ids[row], minlength=50).double() / steps
        torch.testing.assert_close(share, p[row], rtol=1e-5, atol=1.1 / steps)


def test_a_large_vocabulary_keeps_its_tail():
    """Half of the mass lies on 200,000 tokens that float32 sums would round away or pile up."""
    logits = torch.zeros(1, 200_001)
    logits[0, 0] = torch.tensor(200_000.0).log()
    luck = ((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)[None]
    ids, _ = draw(logits, luck, 1.0)
    tail = ids[ids > 0]
    assert abs(len(tail) / 100_000 - 0.5) < 1e-4
    assert len(tail.unique()) == len(tail)  # two grid steps a token: every other one, none twice
    assert int(tail.max() - tail.min()) > 199_990


def test_what_is_ruled_out_is_never_drawn_even_at_the_ends():
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    last = 1 - 2.0**-53
    luck = torch.tensor([[0.0, 0.25, 0.5, 0.75, last, 1.0]], dtype=torch.float64)
    ids, mean = draw(logits, luck, 1.0)
    assert set(ids[0].tolist()) <= {1, 3}
    assert ids[0, 0] == 1
    assert ids[0, -1] == 3
    assert float(mean) == pytest.approx(-0.6931472)


# --- kinds ------------------------------------------------------------------------------------


def said(rows, columns=40, width=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=random)
    weight = 2 * torch.randn(columns, width, generator=random)
    return Signals(
        labels=torch.randint(columns, (rows,), generator=random),
        projection=Projection(hidden=hidden, weight=weight),
    )


def kept(keep, k=5, columns=40, width=6, dtype="float32", temperature=1.0):
    sparse = keep in ("sampled", "topk")
    spec = CachedTeacher(
        path="x",
        of=LocalTeacher(name="x"),
        keep=keep,
        k=k,
        temperature=temperature if sparse else 1,
    )
    return keeper(spec, columns, width, dtype)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(KEEPERS)),
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
    st.integers(0, 1000),
)
def test_samples_come_back_below_each_other(keep, sizes, seed):
    """Cutting rows into samples, packing each and joining them changes nothing."""
    keeps, signals = kept(keep), said(sum(sizes), seed=seed)
    luck = keeps.luck(sum(sizes), torch.Generator().manual_seed(seed))
    whole = keeps.look(signals, luck)
    once = keeps.signals(keeps.from_cells(keeps.to_cells(whole), sum(sizes)), CPU)
    pieces = []
    for first, size in zip(itertools.accumulate([0, *sizes[:-1]]), sizes, strict=True):
        mine = {name: array[first : first + size] for name, array in whole.items()}
        pieces.append(keeps.from_cells(keeps.to_cells(mine), size))
    joined = keeps.signals(join(pieces), CPU)
    for name, value in once.items():
        other = joined[name]
        if name != "sparse":
            assert torch.equal(value, other)
            continue
        for left, right in zip(dense(value), dense(other), strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def dense(sparse, columns=40):
    masses = torch.zeros(len(sparse.ids), columns).scatter_add_(1, sparse.ids, sparse.mass)
    return masses, sparse.rest, sparse.negentropy


@pytest.mark.parametrize("keep", sorted(KEEPERS))
def test_rows_that_are_not_numbers_are_marked_and_harmless(keep):
    keeps, signals = kept(keep), said(6)
    for row, value in ((1, torch.nan), (4, torch.inf)):
        signals.projection.hidden[row, 0] = value
    whole = keeps.look(signals, keeps.luck(6, torch.Generator()))
    cells = keeps.to_cells(whole)
    back = keeps.from_cells(cells, 6)
    assert back["valid"].tolist() == [True, False, True, True, False, True]
    given = keeps.signals(back, CPU)
    for value in given.values():
        if keep in ("sampled", "topk"):
            student = torch.randn(6, 40, requires_grad=True)
            loss = losses.sparse_kl(student, value)
            loss.sum().backward()
            assert loss.isfinite().all()
            assert (loss[[1, 4]] == 0).all()
            assert (student.grad[[1, 4]] == 0).all()
            assert (student.grad[[0, 2, 3, 5]].abs().sum(-1) > 0).all()
        else:
            assert value.isfinite().all()
            assert (value[[1, 4]] == 0).all()
            assert (value[0] != 0).any()
    with pytest.raises(ValueError, match="marks for"):
        keeps.from_cells({**cells, "dropped": b""}, 6)


@pytest.mark.parametrize("keep", sorted(KEEPERS))
def test_no_rows(keep):
    given = kept(keep).signals(kept(keep).nothing(), CPU)
    for value in given.values():
        assert len(value.mass if keep in ("sampled", "topk") else value) == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_keeps_the_likeliest_and_the_rest(temperature):
    keeps, signals = kept("topk", k=7, temperature=temperature), said(20)
    back = keeps.from_cells(keeps.to_cells(keeps.look(signals, None)), 20)
    sparse = keeps.signals(back, CPU)["sparse"]
    p = (signals.projection.logits() / temperature).softmax(-1)
    top = p.topk(7)
    assert torch.equal(sparse.ids.sort(-1).values, top.indices.sort(-1).values)
    torch.testing.assert_close(sparse.mass.sum(-1) + sparse.rest, torch.ones(20))
    torch.testing.assert_close(sparse.rest, 1 - top.values.sum(-1), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(sparse.mass, p.gather(-1, sparse.ids), rtol=0.15, atol=1e-3)
    assert sparse.temperature == temperature
    value = losses.sparse_kl(signals.projection.logits(), sparse, temperature=temperature)
    assert (value >= -1e-6).all()  # it is a KL divergence, of what was stored
    assert (value < 0.01).all()


def test_draws_keep_every_draw():
    keeps, signals = kept("sampled", k=9), said(15)
    whole = keeps.look(signals, keeps.luck(15, torch.Generator().manual_seed(0)))
    sparse = keeps.signals(keeps.from_cells(keeps.to_cells(whole), 15), CPU)["sparse"]
    for row in range(15):
        counts = Counter(whole["ids"][row].tolist())
        mine = zip(sparse.ids[row].tolist(), sparse.mass[row].tolist(), strict=True)
        assert {i: round(m * 9) for i, m in mine if m} == counts
    assert (sparse.rest == 0).all()
    logp = signals.projection.logits().log_softmax(-1)
    means = logp.gather(-1, torch.from_numpy(whole["ids"])).mean(-1)
    torch.testing.assert_close(sparse.negentropy, means, rtol=0, atol=2e-3)


# --- views ------------------------------------------------------------------------------------


def test_a_view_is_cut_into_its_samples(tokenizer):
    encoder = Encoder(tokenizer, 64)
    texts = [("the cat", " sat"), ("two", " dogs run past"), ("on a mat", "")]
    samples = [
        Sample(id=f"s{i}", turns=(Turn(text=a), Turn(text=b, learn=True)))
        for i, (a, b) in enumerate(texts)
    ]
    encodings = [encoder.encode(sample) for sample in samples]
    for packed in (False, True):
        view = encoder.collate(encodings, packed=packed)
        found = parts(view)
        assert [part.name for part in found] == ["s0", "s1", "s2"]
        assert sum(part.rows for part in found) == len(view.rows)
        for part, encoding in zip(found, encodings, strict=True):
            assert part.ids.tolist() == list(encoding.ids)
            assert part.learn.tolist() == [False, *encoding.learn[1:]]
            assert part.rows == encoding.rows


# --- from a real teacher ----------------------------------------------------------------------


def test_full_logits_come_back_as_they_were(cached):
    live, reader, samples = cached("full")
    view = mixed(live, samples)
    signals = reader.read(view, LOGITS)
    assert signals.valid is None
    assert torch.equal(signals.labels, view.labels)
    torch.testing.assert_close(signals.logits, logits_of(live, view), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("dtype", "error"), [("float32", EXACT), ("bfloat16", HALF)])
def test_hidden_states_and_the_head_make_the_teachers_logits(cached, tiny_teacher, dtype, error):
    """In bfloat16 the model itself differs by more than this between two shapes of a batch."""
    live, reader, samples = cached("hidden", of={"name": str(tiny_teacher), "dtype": dtype})
    view = mixed(live, samples)
    signals = reader.read(view, reader.offers)
    expected = logits_of(live, view)
    assert signals.projection.hidden.dtype == signals.logits.dtype == getattr(torch, dtype)
    torch.testing.assert_close(signals.projection.logits(), expected, rtol=error, atol=error)
    torch.testing.assert_close(signals.logits, expected, rtol=error, atol=error)
    assert reader.read(view, frozenset({"projection"})).logits is None


def test_chosen_log_probabilities(cached):
    live, reader, samples = cached("chosen")
    view = mixed(live, samples)
    logp = logits_of(live, view).log_softmax(-1).gather(-1, view.labels[:, None])[:, 0]
    torch.testing.assert_close(reader.read(view, reader.offers).chosen, logp, rtol=0, atol=EXACT)


@pytest.mark.parametrize("computes_in", ["float32", "bfloat16", "float16"])
def test_chosen_log_probabilities_are_kept_as_they_are_computed(computes_in):
    """In float32, in which they are exact, whatever the teacher computes in; and one that was kept
    in fewer bits, before or by the recipe's word, is read as what it is."""
    signals = said(50)
    exact = signals.projection.logits().log_softmax(-1).gather(-1, signals.labels[:, None])[:, 0]
    keeps = kept("chosen", dtype=computes_in)
    whole = keeps.look(signals, None)
    back = keeps.signals(keeps.from_cells(keeps.to_cells(whole), 50), CPU)["chosen"]
    assert torch.equal(back, exact)
    coarse = replace(keeps, dtype="bfloat16")
    back = keeps.signals(keeps.from_cells(coarse.to_cells(whole), 50), CPU)["chosen"]
    assert torch.equal(back, exact.bfloat16().float())
    asked = CachedTeacher(path="x", of=LocalTeacher(name="x"), keep="chosen", dtype="bfloat16")
    assert keeper(asked, 40, 6, computes_in).dtype == "bfloat16"
    assert kept("hidden", dtype=computes_in).dtype == computes_in


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("keep", ["sampled", "topk"])
def test_few_tokens_of_the_right_rows(cached, keep, temperature):
    """Tokens of another row would not be likely here: the value stays near the live KL."""
    live, reader, samples = cached(keep, k=60, temperature=temperature)
    view = mixed(live, samples)
    student = logits_of(live, view)
    sparse = reader.read(view, reader.offers).sparse
    assert len(sparse.ids) == len(view.rows)
    noisy = student + torch.randn(student.shape, generator=torch.Generator().manual_seed(0))
    exact = losses.forward_kl(noisy, student, temperature=temperature)
    value = losses.sparse_kl(noisy, sparse, temperature=temperature)
    if keep == "topk":  # a coarser KL: all tokens but 60 are one
        top = (student / temperature).softmax(-1).topk(60).indices
        p, q = (cells(x / temperature, top) for x in (student, noisy))
        exact = temperature**2 * (p * (p / q).log()).sum(-1)
    error = 0.15 if keep == "sampled" else 0.02
    assert float(value.mean()) == pytest.approx(float(exact.mean()), rel=error)
    shuffled = sparse[torch.arange(len(value)).roll(1)]
    assert losses.sparse_kl(noisy, shuffled, temperature=temperature).mean() > 2 * exact.mean()


def cells(logits, top):
    """Probabilities of the tokens in `top`, and of all others together."""
    kept = logits.softmax(-1).gather(-1, top)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)


def test_layout_changes_nothing(cached):
    live, reader, samples = cached()
    encodings = [live.encode(samples[i]) for i in (5, 40, 2, 17)]
    padded = reader.read(live.encoder.collate(encodings), reader.offers).sparse
    packed = reader.read(live.encoder.collate(encodings, packed=True), reader.offers).sparse
    alone = [reader.read(live.collate([one]), reader.offers).sparse for one in encodings]
    for left, right in zip(dense(padded, 320), dense(packed, 320), strict=True):
        assert torch.equal(left, right)
    for place, whole in enumerate(dense(padded, 320)):
        assert torch.equal(whole, torch.cat([dense(one, 320)[place] for one in alone]))


def test_a_view_without_rows(cached):
    live, reader, samples = cached()
    view = live.collate([live.encode(replace(samples[0], turns=samples[0].prompt))])
    assert len(view.rows) == 0
    assert len(reader.read(view, reader.offers).sparse.ids) == 0


def differing(left, right):
    """Share of rows that are not the same."""
    return float(((left - right).abs() > 1e-6).any(-1).float().mean())


def test_draws_depend_on_seed_and_sample_alone(recipe_of, monkeypatch, tmp_path):
    """Other shards and batches give the same draws; another seed does not.

    Rounding differs with a batch's shape, so once in a while a draw on a border falls otherwise.
    """

    def ids(name, seed=0, **settings):
        for key, value in settings.items():
            monkeypatch.setattr(filling, key, value)
            monkeypatch.setattr(f"limbeck.recipe.cache.{key}", value, raising=False)
        recipe = recipe_of(path=str(tmp_path / name), seed=seed)
        make_caches(recipe)
        source = recipe.source.open(0)
        reader = open_cache(recipe, check(recipe), "big", source, CPU)
        view = reader.collate([reader.encode(sample) for sample in source.training])
        return dense(reader.read(view, reader.offers).sparse, 320)[0]

    first = ids("a")
    other = ids("b", SHARD_SAMPLES=7, BATCH_TOKENS=50, CHUNK_BYTES=320 * 4 * 3)
    assert differing(first, other) < 0.02
    assert differing(first, ids("c", seed=1)) > 0.5


def test_changed_and_unknown_samples_are_refused(cached):
    live, reader, samples = cached()
    sample = samples[3]
    changed = replace(sample, turns=(sample.turns[0], Turn(text="near the river", learn=True)))
    with pytest.raises(CacheError, match=rf"sample {sample.id} had other tokens"):
        reader.read(live.collate([live.encode(changed)]), reader.offers)
    with pytest.raises(CacheError, match=r"sample who is not in the cache.*limbeck cache RECIPE"):
        reader.read(live.collate([live.encode(replace(sample, id="who"))]), reader.offers)


def test_what_cannot_be_decoded_names_its_sample(cached, monkeypatch):
    live, reader, samples = cached()
    get = Store.get

    def spoilt(self, id, tokens):
        record = get(self, id, tokens)
        return replace(record, cells={**record.cells, "ids": b"\x00"})

    monkeypatch.setattr(Store, "get", spoilt)
    with pytest.raises(CacheError, match=rf"sample {samples[0].id} cannot be read .*make it again"):
        reader.read(live.collate([live.encode(samples[0])]), reader.offers)


# --- rows that are not numbers ----------------------------------------------------------------


def test_rows_of_a_teacher_that_fails_are_dropped_and_counted(recipe_of, monkeypatch, capsys):
    """The teacher's output is NaN behind every seventh token of the vocabulary."""
    real = CausalModel.read

    def failing(self, view, needs):
        signals = real(self, view, needs)
        bad = (view.ids.flatten()[view.rows] % 7 == 0).to(signals.labels.device)
        if signals.projection is not None:
            signals.projection.hidden[bad] = torch.nan
        if signals.logits is not None:
            signals.logits[bad] = torch.nan
        return signals

    recipe = recipe_of()
    monkeypatch.setattr(CausalModel, "read", failing)
    (made,) = make_caches(recipe)
    monkeypatch.undo()
    source = recipe.source.open(0)
    reader = open_cache(recipe, check(recipe), "big", source, CPU)
    view = reader.collate([reader.encode(sample) for sample in source.training])
    signals = reader.read(view, reader.offers)
    bad = view.ids.flatten()[view.rows] % 7 == 0
    assert 0 < made.dropped == int(bad.sum()) < made.rows
    assert torch.equal(signals.valid, ~bad)
    assert (signals.sparse.mass[bad] == 0).all()
    assert f"{made.dropped:,} dropped" in made.render()
    assert "dropped" in capsys.readouterr().err


# --- training ---------------------------------------------------------------------------------


def losses_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("keep", ["full", "hidden"])
def test_training_from_exact_logits_is_training_from_the_teacher(
    recipe_of, make_recipe, tmp_path, keep
):
    make_caches(recipe_of(keep))
    run(recipe_of(keep), tmp_path / "cached")
    run(make_recipe(terms=[{"objective": "forward_kl"}]), tmp_path / "live")
    cached, live = losses_of(tmp_path / "cached"), losses_of(tmp_path / "live")
    assert cached == pytest.approx(live, rel=1e-4)
    assert len(set(live)) == len(live)


@pytest.mark.parametrize("keep", OBJECTIVES)
def test_reading_in_another_process_changes_no_bit(recipe_of, tmp_path, monkeypatch, keep):
    forked = []

    def counted(*arguments, **named):
        forked.append(Worker(*arguments, **named))
        return forked[-1]

    monkeypatch.setattr(prepare, "Worker", counted)
    make_caches(recipe_of(keep))
    for way in ("process", "thread"):
        monkeypatch.setattr(prepare, "can_work_beside", lambda way=way: way == "process")
        run(recipe_of(keep), tmp_path / way)
    assert losses_of(tmp_path / "process") == losses_of(tmp_path / "thread")
    assert len(forked) == (keep != "hidden")  # a head is not sent with every step


def test_the_model_is_loaded_for_measurements_alone(recipe_of, monkeypatch, tmp_path):
    """Twice: for what comes before training, and for what comes after."""
    recipe = recipe_of(train={"steps": 2})
    make_caches(recipe)
    happened = []
    load, train = load_teacher, Trainer.train

    def loading(*arguments):
        happened.append("load")
        model = load(*arguments)
        weakref.finalize(model, happened.append, "gone")
        return model

    def training(trainer):
        gc.collect()
        happened.append("train")
        train(trainer)

    monkeypatch.setattr("limbeck.recipe.run.load_teacher", loading)
    monkeypatch.setattr(Trainer, "train", training)
    run(recipe, tmp_path / "unmeasured")
    assert happened == ["train"]
    happened.clear()
    measured = replace(recipe, evals=(Agreement(), Perplexity()), compare="labels")
    report = run(measured, tmp_path / "measured")
    gc.collect()
    assert happened == ["load", "gone", "train", "load", "gone", "train", "load", "gone"]
    assert report.agreement.control.kl_nats > 0
    assert report.evals["perplexity"].teacher > 1
    assert report.speed.teacher_tokens_per_second > 0


def test_a_source_shows_every_training_row_once(make_recipe):
    stream = make_recipe().source.open(3)
    before = stream.state_dict()
    ids = [sample.id for sample in stream.training]
    assert len(ids) == len(set(ids)) == len(stream) == 56
    assert not {sample.id for sample in stream.holdout} & set(ids)
    assert stream.state_dict() == before
    assert {next(stream).id for _ in range(56)} == set(ids)
    assert [sample.id for sample in stream.training[5:9]] == ids[5:9]
    assert stream.training[7].id == ids[7]


def test_a_run_that_was_stopped_goes_on_from_the_cache(recipe_of, tmp_path):
    recipe = recipe_of()
    make_caches(recipe)
    run(recipe, tmp_path / "whole")
    with pytest.raises(RecipeError):
        run(recipe_of(train={"steps": 9}), tmp_path / "whole", resume=True)
    report = run(recipe, tmp_path / "whole", resume=True)
    assert report.train.steps == 8


# --- identity ---------------------------------------------------------------------------------


def test_weights_are_read_again_only_when_a_file_changed(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"one")
    (folder / "b.safetensors").write_bytes(b"two")
    spec = LocalTeacher(name=str(folder))
    files = weight_files(spec)
    first = weights_sha256(files)
    noted = json.loads(json.dumps(stamps(files, first)))
    monkeypatch.setattr("hashlib.file_digest", None)
    assert weights_sha256(weight_files(spec), noted) == first
    monkeypatch.undo()
    (folder / "b.safetensors").write_bytes(b"three")
    assert weights_sha256(weight_files(spec), noted) != first
    (folder / "b.safetensors").write_bytes(b"two")
    assert weights_sha256(weight_files(spec), noted) == first
    assert weights_sha256([]) is None
    assert weight_files(LocalTeacher(name="nobody/nothing")) == []


def test_a_note_that_was_cut_costs_nothing_but_itself(recipe_of, tmp_path, monkeypatch):
    """As a full disk leaves it; and the next note has a line of its own."""
    monkeypatch.setattr(filling, "SHARD_SAMPLES", 8)
    monkeypatch.setattr("limbeck.recipe.cache.SHARD_SAMPLES", 8)
    recipe, folder = recipe_of(), tmp_path / "cache"
    make_caches(recipe)
    notes = (folder / filling.NOTES).read_text()
    for cut in ('{"shard": 1, "dr', "\0\0\0", "\udcff".encode("utf-8", "surrogateescape")):
        cut = cut.encode() if isinstance(cut, str) else cut
        (folder / filling.NOTES).write_bytes(notes.encode() + cut)
        assert make_caches(recipe)[0].dropped == 0
    for file in folder.glob("shard-00001.*"):
        file.unlink()
    make_caches(recipe)
    last = (folder / filling.NOTES).read_bytes().splitlines()[-1]
    assert json.loads(last) == {"shard": 1, "dropped": 0}


def test_of_a_shard_that_was_made_twice_the_last_note_counts(tmp_path):
    lines = ['{"shard": 0, "dropped": 5}', '{"shard": 0, "dr', '{"shard": 0, "dropped": 3}']
    (tmp_path / filling.NOTES).write_text("\n".join(lines) + '\n{"shard": 1, "dropped": 4}\n')
    assert filling.dropped(tmp_path) == 7
    assert filling.dropped(tmp_path / "nowhere") == 0


def test_the_first_field_that_differs_is_named():
    mine = {"teacher": "a" * 64, "data": "b" * 64, "k": 3, "keep": "topk"}
    assert difference(mine, mine) is None
    assert difference({**mine, "k": 4}, mine) == "k was 4 when it was made and is 3 now"
    changed = difference({**mine, "teacher": "c" * 64, "k": 4}, mine)
    assert changed.startswith("the teacher's weights changed: SHA-256 cccccccccccc then")
    assert difference({**mine, "teacher": "c"}, {**mine, "teacher": None}) is None


def test_a_reader_is_one(cached):
    from limbeck.core.protocols import Reader

    _, reader, _ = cached()
    assert isinstance(reader, Reader)
    assert isinstance(reader, CacheReader)
    assert reader.ahead is True
    assert np.isfinite(reader.store.rows)
