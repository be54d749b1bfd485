"""A server that reads: the losses of what it says are those of the same model here."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from limbeck.core.errors import BudgetError, RecipeError, ServerError
from limbeck.core.protocols import Reader
from limbeck.core.specs import LocalTeacher, ServerTeacher, TokenPrice
from limbeck.core.types import Sample, Signals, Turn
from limbeck.demo import model_path, problems
from limbeck.evals import Agreement
from limbeck.ledger.store import Ledger
from limbeck.losses.divergences import forward_kl
from limbeck.losses.likelihood import likelihood_matching
from limbeck.losses.sparse import Sparse, sparse_kl
from limbeck.models.load import load_teacher
from limbeck.recipe import run as runs
from limbeck.recipe.desk import Teachers
from limbeck.recipe.fit import fit
from limbeck.recipe.run import run
from limbeck.teachers import server as module
from limbeck.teachers.local import LocalWriter
from limbeck.teachers.mock import Faults, MockTeacher
from limbeck.teachers.mock.minds import Bad, OfWriter
from limbeck.teachers.server_reader import ServerReader, read_line
from limbeck.teachers.wire import Again

CPU = torch.device("cpu")
K = 20


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(LocalTeacher(name=str(model_path("teacher"))), CPU, 256)


@pytest.fixture(scope="module")
def samples():
    return [
        Sample(id=f"p{k}", turns=(Turn(text=one.prompt), Turn(text=one.completion, learn=True)))
        for k, one in enumerate(problems(0, "test", 6))
    ]


class EchoOnly(OfWriter):
    """A model behind a server that knows the older form alone."""

    def read(self, asked):
        if not asked.echo:
            raise Bad(400, "no such parameter: prompt_logprobs")
        return super().read(asked)


@pytest.fixture(params=["prompt_logprobs", "echo"])
def mock(request, teacher) -> Iterator[MockTeacher]:
    writer = LocalWriter(teacher, "mock-1")
    with MockTeacher(writer if request.param == "prompt_logprobs" else EchoOnly(writer)) as one:
        yield one


def reader_of(mock, tmp_path, tokenizer, **fields):
    settings = {
        "in_flight": 4,
        "attempts": 20,
        "timeout_seconds": 10.0,
        "top_logprobs": K,
        **fields,
    }
    spec = ServerTeacher(
        url=mock.url,
        model="mock-1",
        api="completions",
        ledger=str(tmp_path / "ledger.sqlite"),
        price=TokenPrice(input=1.0, output=1.0),
        **settings,
    )
    return ServerReader(spec, tokenizer, max_length=256)


def local_topk(logits, k):
    """What a reader of the same model here would keep, in float64."""
    logp = logits.double().log_softmax(-1)
    best = logp.topk(k)
    mass = best.values.exp()
    rest = 1 - mass.sum(-1)
    return Sparse(
        ids=best.indices,
        mass=mass,
        rest=rest,
        negentropy=(mass * best.values).sum(-1) + torch.xlogy(rest, rest),
    )


def test_the_losses_are_those_of_the_teacher_on_this_machine(mock, teacher, samples, tmp_path):
    torch.manual_seed(0)
    with reader_of(mock, tmp_path, teacher.tokenizer) as reader:
        assert isinstance(reader, Reader)
        assert reader.offers == {"chosen", "sparse"}
        assert reader.vocabulary == teacher.vocabulary
        view = reader.collate([reader.encode(sample) for sample in samples])
        said = reader.read(view, frozenset({"chosen", "sparse"}))
    with torch.no_grad():
        here = teacher.read(view, frozenset({"logits", "chosen"}))
    student = here.logits / 3 + torch.randn_like(here.logits)
    assert torch.equal(said.labels, here.labels)
    torch.testing.assert_close(said.chosen, here.chosen, atol=1e-4, rtol=0)
    served, local = (
        sparse_kl(student, sparse) for sparse in (said.sparse, local_topk(here.logits, K))
    )
    torch.testing.assert_close(served, local.to(served.dtype), atol=1e-3, rtol=0)
    assert served.mean() > 0.05
    whole = forward_kl(student, here.logits)
    assert bool((served <= whole + 1e-3).all())  # a partition never has more than the whole
    own = student.log_softmax(-1).gather(-1, here.labels[:, None])[:, 0]
    torch.testing.assert_close(
        likelihood_matching(own, said.chosen),
        likelihood_matching(own, here.chosen),
        atol=1e-3,
        rtol=0,
    )


def test_a_real_model_of_another_make(teacher, shared, tmp_path):
    there = load_teacher(LocalTeacher(name=str(shared / "models" / "stories260K")), CPU, 256)
    turns = (Turn(text="Once upon a time"), Turn(text=" there was a little dog.", learn=True))
    with (
        MockTeacher(LocalWriter(there, "mock-1")) as mock,
        reader_of(mock, tmp_path, there.tokenizer) as reader,
    ):
        view = reader.collate([reader.encode(Sample(id="s", turns=turns))])
        said = reader.read(view, frozenset({"chosen", "sparse"}))
    with torch.no_grad():
        here = there.read(view, frozenset({"logits", "chosen"}))
    torch.testing.assert_close(said.chosen, here.chosen, atol=1e-4, rtol=0)
    assert sparse_kl(here.logits, said.sparse).abs().max() < 1e-3


def test_a_text_is_paid_for_once(mock, teacher, samples, tmp_path):
    needs = frozenset({"chosen", "sparse"})
    found = []
    for part in (samples[:3], samples[:3], samples):
        with reader_of(mock, tmp_path, teacher.tokenizer) as reader:
            view = reader.collate([reader.encode(sample) for sample in part])
            found.append(reader.read(view, needs))
            found.append(reader.read(view, needs))
            spent = reader.spent_usd
    assert torch.equal(found[0].chosen, found[3].chosen)
    assert len(mock.billed) == len(samples)
    assert spent == pytest.approx(mock.billed_usd(TokenPrice(input=1.0, output=1.0)))


def test_a_text_that_comes_twice_is_read_once(mock, teacher, samples, tmp_path):
    with reader_of(mock, tmp_path, teacher.tokenizer) as reader:
        encoded = [reader.encode(samples[k]) for k in (0, 1, 1, 1)]
        reader.read(reader.collate(encoded), frozenset({"chosen"}))
    assert len(mock.billed) == 2


def test_ctrl_c_waits_for_what_is_read(teacher, samples, tmp_path, ctrl_c, ends):
    class Slow(OfWriter):
        def read(self, asked):
            last = len(mock.requests) == len(samples)
            if last and not pressed:
                pressed.append(True)
                ctrl_c()
            time.sleep(0.1 * last)
            return super().read(asked)

    pressed = []
    with MockTeacher(Slow(LocalWriter(teacher, "mock-1"))) as mock:
        with (
            pytest.raises(KeyboardInterrupt),
            reader_of(mock, tmp_path, teacher.tokenizer, in_flight=8) as reader,
        ):
            reader.read(reader.collate([reader.encode(one) for one in samples]), frozenset())
        assert ends() == ["answered"] * len(samples)


def test_faults_are_overcome(teacher, samples, tmp_path):
    faults = Faults(rate=0.4, seed=3)
    clean_folder = tmp_path / "clean"
    found = []
    for folder, wrong in ((tmp_path / "wrong", faults), (clean_folder, Faults())):
        with (
            MockTeacher(LocalWriter(teacher, "mock-1"), faults=wrong) as mock,
            reader_of(mock, folder, teacher.tokenizer) as reader,
        ):
            view = reader.collate([reader.encode(sample) for sample in samples])
            found.append(reader.read(view, frozenset({"chosen", "sparse"})))
            if wrong.rate:
                assert any(request["fault"] for request in mock.requests)
    assert torch.allclose(found[0].chosen, found[1].chosen, atol=1e-6)


def test_a_server_that_does_not_read_says_so_and_stops(samples, teacher, tmp_path):
    with MockTeacher() as mock, reader_of(mock, tmp_path, teacher.tokenizer) as reader:
        view = reader.collate([reader.encode(samples[0])])
        with pytest.raises(ServerError, match="says nothing of text.*prompt_logprobs.*echo"):
            reader.read(view, frozenset({"chosen"}))
        assert len(mock.requests) == 2


def test_a_budget_ends_it_and_what_was_said_is_kept(teacher, samples, tmp_path):
    with MockTeacher(LocalWriter(teacher, "mock-1")) as mock:
        with reader_of(mock, tmp_path, teacher.tokenizer, budget_usd=0.001) as reader:
            view = reader.collate([reader.encode(sample) for sample in samples])
            with pytest.raises(BudgetError):
                reader.read(view, frozenset({"chosen"}))
        asked = len(mock.billed)
        assert 0 < asked < len(samples)
        assert mock.billed_usd(TokenPrice(input=1.0, output=1.0)) <= 0.001
        with reader_of(mock, tmp_path, teacher.tokenizer, budget_usd=1.0) as reader:
            reader.read(view, frozenset({"chosen"}))
        assert len(mock.billed) == len(samples)


def test_without_alternatives_there_is_only_chosen(teacher, samples, tmp_path):
    with (
        MockTeacher(LocalWriter(teacher, "mock-1")) as mock,
        reader_of(mock, tmp_path, teacher.tokenizer, top_logprobs=0) as reader,
    ):
        assert reader.offers == {"chosen"}
        view = reader.collate([reader.encode(samples[0])])
        said = reader.read(view, frozenset({"chosen"}))
        assert said.sparse is None
        with torch.no_grad():
            here = teacher.read(view, frozenset({"chosen"}))
        torch.testing.assert_close(said.chosen, here.chosen, atol=1e-4, rtol=0)


def body_of(**entry):
    choice = {"text": "x", "finish_reason": "length", "index": 0, **entry}
    return json.dumps({"choices": [choice], "usage": {}}).encode()


def test_vllms_form_with_its_word_for_never():
    places = [
        None,
        {"7": {"logprob": -9999.0, "rank": 9}, "3": {"logprob": -0.1, "rank": 1}},
        {"5": {"logprob": -0.5, "rank": 1}},
    ]
    (choice,) = read_line(body_of(prompt_logprobs=places), [1, 7, 5]).choices
    assert [(s.text, s.logp) for s in choice.scores] == [("7", -9999.0), ("5", -0.5)]
    assert choice.scores[0].top[0] == ("3", -0.1)


def test_an_echo_of_texts_gives_no_alternatives_because_text_is_no_id():
    told = {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -1.0, -2.0],
        "top_logprobs": [None, {"b": -1.0}, {"token_id:4": -0.2, "c": -2.0}],
    }
    (choice,) = read_line(body_of(logprobs=told), [1, 2]).choices
    assert [(s.text, s.logp, s.top) for s in choice.scores] == [("", -1.0, ())]
    (choice,) = read_line(body_of(logprobs=told), [1, 2, 3]).choices
    assert choice.scores[1].top == (("4", -0.2),)


@pytest.mark.parametrize(
    "told",
    [
        None,
        {"tokens": ["x"], "token_logprobs": [-1.0]},  # of what was written, not of the text
        {"tokens": ["x", "y"], "token_logprobs": [-1.0, -2.0]},
    ],
)
def test_an_answer_that_says_nothing_of_the_text_has_no_choice(told):
    assert read_line(body_of(logprobs=told), [1, 2]).choices == ()


@pytest.mark.parametrize("wrong", [None, float("nan"), float("-inf"), 0.5, "-1", True])
def test_numbers_that_are_no_log_probabilities_are_asked_for_again(wrong):
    for own, other in ((wrong, -1.0), (-1.0, wrong)):
        places = [None, {"2": {"logprob": own}, "3": {"logprob": other}}]
        with pytest.raises(Again):
            read_line(body_of(prompt_logprobs=places), [1, 2])
    told = {"tokens": ["a", "b"], "token_logprobs": [None, wrong]}
    with pytest.raises(Again):
        read_line(body_of(logprobs=told), [1, 2])


def test_more_than_all_of_the_mass_is_not_believed():
    places = [None, {"2": {"logprob": -0.1}, "3": {"logprob": -0.1}}]
    with pytest.raises(Again, match="together"):
        read_line(body_of(prompt_logprobs=places), [1, 2])


@pytest.mark.parametrize("places", [[None, 3], [None, {"2": 1}], [None, {"2": {}}], 5])
def test_other_shapes_are_asked_for_again(places):
    with pytest.raises(Again, match="shape"):
        read_line(body_of(prompt_logprobs=places), [1, 2])


def test_another_tokenizer_is_found_out(teacher, shared, samples, tmp_path):
    class Shifted(OfWriter):
        def read(self, asked):
            return super().read(asked)[:-1]

    with (
        MockTeacher(Shifted(LocalWriter(teacher, "mock-1"))) as mock,
        reader_of(mock, tmp_path, teacher.tokenizer) as reader,
    ):
        view = reader.collate([reader.encode(samples[0])])
        with pytest.raises(ServerError, match="other tokens"):
            reader.read(view, frozenset({"chosen"}))


class Exact:
    """The same model here, of which the k likeliest tokens are told in full precision."""

    ahead = True
    offers = frozenset({"sparse"})

    def __init__(self, model):
        self.model, self.name, self.vocabulary = model, model.name, model.vocabulary
        self.encode, self.collate = model.encode, model.collate

    def read(self, view, needs):
        with torch.no_grad():
            said = self.model.read(view, frozenset({"logits"}))
        return Signals(labels=said.labels, sparse=local_topk(said.logits, K))


@pytest.fixture
def served(make_recipe, tiny_teacher, tmp_path):
    """Builds a recipe that learns from the tiny teacher behind a server."""

    def make(mock, steps=4, kind="sparse_kl", objective=None, **fields):
        server = {
            "kind": "server",
            "url": mock.url,
            "model": "mock-1",
            "api": "completions",
            "ledger": str(tmp_path / "run.sqlite"),
            "tokenizer": str(tiny_teacher),
            "attempts": 20,
            **fields,
        }
        return make_recipe(
            {"steps": steps},
            student={"name": str(tiny_teacher)},
            teachers={"api": server},
            terms=[{"objective": {"kind": kind, **(objective or {})}}],
        )

    return make


def losses_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_recipe_learns_from_it_as_from_the_same_model_here(
    make_recipe, served, tiny_teacher, tmp_path, monkeypatch
):
    there = load_teacher(LocalTeacher(name=str(tiny_teacher)), CPU, 256)
    with MockTeacher(LocalWriter(there, "mock-1"), faults=Faults(rate=0.2, seed=1)) as mock:
        recipe = served(mock, price={"input": 1.0, "output": 2.0})
        report = run(recipe, tmp_path / "served")
        assert any(request["fault"] for request in mock.requests)
        sent = len(mock.requests)
        again = run(recipe, tmp_path / "again")  # what was said is recorded
        assert len(mock.requests) == sent
    with Ledger(tmp_path / "run.sqlite") as ledger:
        account = f"{recipe.teachers['api'].url} mock-1"
        assert report.cost.servers_usd == ledger.totals(account).spent_usd > 0
    assert again.cost.servers_usd == report.cost.servers_usd
    assert "paid to servers" in (tmp_path / "served" / "report.md").read_text()
    assert report.teacher.parameters is None
    cached = {"kind": "cache", "path": "nowhere", "of": {"name": str(tiny_teacher)}}
    local = make_recipe(
        {"steps": 4},
        student={"name": str(tiny_teacher)},
        teachers={"api": {**cached, "keep": "topk", "k": K}},
        terms=[{"objective": {"kind": "sparse_kl"}}],
    )
    monkeypatch.setattr(runs, "open_cache", lambda *_: Exact(there))
    run(local, tmp_path / "local")
    expected = losses_of(tmp_path / "local")
    assert len(expected) == 4
    assert losses_of(tmp_path / "served") == pytest.approx(expected, abs=1e-3)
    assert losses_of(tmp_path / "again") == pytest.approx(expected, abs=1e-3)


def test_a_recipe_whose_server_does_not_read_stops_before_it_trains(served, tmp_path):
    with MockTeacher() as mock, pytest.raises(ServerError, match="says nothing of text"):
        run(served(mock), tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"kind": "forward_kl"}, "terms.0.objective", "needs logits"),
        ({"tokenizer": None}, "terms.0.objective", "set teachers.api.tokenizer"),
        ({"top_logprobs": 0}, "terms.0.objective", "needs sparse"),
        ({"api": "chat"}, "teachers.api.tokenizer", "api: completions"),
        ({"objective": {"temperature": 2.0}}, "terms.0.objective.temperature", "set it to 1.0"),
    ],
)
def test_what_a_server_cannot_do_is_said_before(served, fields, field, said):
    with MockTeacher() as mock, pytest.raises(RecipeError, match=said) as error:
        served(mock, **fields)
    assert error.value.field == field


def test_a_student_is_not_compared_with_a_server(served):
    with MockTeacher() as mock:
        recipe = served(mock)
        with pytest.raises(RecipeError, match="a model on this machine") as error:
            fit(replace(recipe, evals=(Agreement(),)))
    assert error.value.field == "evals.0"


def test_a_server_that_no_term_names_is_not_asked(make_recipe, served, tmp_path):
    with MockTeacher() as mock:
        api = served(mock).teachers["api"]
        recipe = make_recipe({"steps": 1}, terms=[{"objective": {"kind": "cross_entropy"}}])
        run(replace(recipe, teachers={**recipe.teachers, "api": api}), tmp_path / "out")
        assert not mock.requests


def test_a_step_reads_through_it(teacher, samples, tmp_path):
    with MockTeacher(LocalWriter(teacher, "mock-1")) as mock, ExitStack() as stack:
        spec = ServerTeacher(
            url=mock.url,
            model="mock-1",
            api="completions",
            ledger=str(tmp_path / "ledger.sqlite"),
            tokenizer=str(model_path("teacher")),
        )
        opened = Teachers({"api": spec}, None, tmp_path, 0, stack)
        reader = opened.reader("api")
        view = reader.collate([reader.encode(sample) for sample in samples])
        said = reader.read(view, frozenset({"chosen"})).chosen
        assert opened.reader("api") is reader
        blind = Teachers({"api": replace(spec, tokenizer=None)}, None, tmp_path, 0, stack)
        with pytest.raises(RecipeError, match="its tokenizer must be here"):
            blind.reader("api")
    with torch.no_grad():
        here = teacher.read(view, frozenset({"chosen"})).chosen
    torch.testing.assert_close(said, here, atol=1e-4, rtol=0)
