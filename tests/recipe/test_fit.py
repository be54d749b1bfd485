"""Schedules and ensembles in a recipe: what is right, and the line of what is wrong."""

from dataclasses import replace

import pytest
import torch

from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Scene
from limbeck.core.schedule import Ramp
from limbeck.core.specs import EnsembleTeacher
from limbeck.core.term import Term
from limbeck.objectives import CrossEntropy, ForwardKL
from limbeck.recipe.check import check
from limbeck.recipe.document import parse
from limbeck.recipe.fit import fit
from limbeck.recipe.resolve import describe_term, dump, resolve, to_mapping

TOP = """\
student: {name: s}
source: {path: a.jsonl}
"""
ONE = TOP + "teachers: {big: {name: b}}\n"
TERM = (
    ONE
    + """\
terms:
  - objective: %s
    schedule:
      %s
"""
)


def refused(text):
    with pytest.raises(RecipeError) as caught:
        resolve(parse(text, "r.yaml"))
    return str(caught.value)


def test_a_schedule_is_read_written_and_read_again():
    recipe = resolve(
        parse(TERM % ("taid", "{t: {from: 0.4, to: 1, shape: cosine}, weight: {from: 0, to: 2}}"))
    )
    assert recipe.terms[0].schedule == {
        "t": Ramp(from_=0.4, to=1.0, shape="cosine"),
        "weight": Ramp(from_=0.0, to=2.0),
    }
    assert "from: 0.4" in dump(recipe)
    assert resolve(parse(dump(recipe))) == recipe
    assert to_mapping(recipe)["terms"][0]["schedule"]["weight"]["until"] == 1.0


def test_a_term_without_schedule_is_written_as_before():
    assert "schedule" not in describe_term(Term(objective=CrossEntropy()))


@pytest.mark.parametrize(
    ("objective", "schedule", "message"),
    [
        (
            "forward_kl",
            "temprature: {from: 4, to: 1}",
            "temprature: no number that can change; did you mean 'temperature'?",
        ),
        (
            "forward_kl",
            "mu: {from: 0, to: 1}",
            "mu: no number that can change; one of: temperature, weight",
        ),
        (
            "ranking",
            "k: {from: 3, to: 9}",
            "k: no number that can change; one of: margin, temperature, weight",
        ),
        (
            "forward_kl",
            "temperature: {from: 4, to: 0}",
            "temperature.to: input should be greater than 0; it is 0.0",
        ),
        (
            "taid",
            "t: {from: -0.5, to: 1}",
            "t.from: input should be greater than or equal to 0; it is -0.5",
        ),
        (
            "adaptive_kl",
            "mu: {from: 0.5, to: 1}",
            "mu.to: input should be less than 1; it is 1.0",
        ),
        (
            "forward_kl",
            "weight: {from: 1, to: -1}",
            "weight.to: input should be greater than or equal to 0; it is -1.0",
        ),
        ("forward_kl", "weight: {from: 1}", "weight.to: is missing"),
        (
            "forward_kl",
            "weight: {from: 1, to: 2, til: 0.5}",
            "weight.til: unknown field; did you mean 'until'?",
        ),
        (
            "forward_kl",
            "weight: {from: 1, to: 2, until: 0}",
            "weight.until: input should be greater than 0; it is 0",
        ),
        (
            "forward_kl",
            "weight: {from: true, to: 2}",
            "weight.from: a number is wanted, not true or false",
        ),
        ("forward_kl", "weight: 3", "weight: "),
        (
            "features",
            "temperature: {from: 1, to: 2}",
            "temperature: no number that can change; one of: weight",
        ),
    ],
)
def test_wrong_schedules(objective, schedule, message):
    expected = f"r.yaml:7: terms.0.schedule.{message}"
    assert refused(TERM % (objective, schedule)).startswith(expected)


def test_a_sparse_cache_has_one_temperature():
    text = TOP + "teachers: {big: {kind: cache, path: c, of: {name: b}}}\n" + TERM[len(ONE) :]
    message = refused(text % ("sparse_kl", "temperature: {from: 2, to: 1}"))
    assert message.startswith("r.yaml:7: terms.0.schedule.temperature: teacher 'big' is kept")
    assert resolve(parse(text % ("sparse_kl", "weight: {from: 2, to: 1}")))


def test_compiled_code_wants_a_compiler_that_is_right(monkeypatch):
    text = TERM % ("forward_kl", "{}") + "train: {logits: compiled}\n"
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
    assert "before torch 2.12" in refused(text)


def test_compiled_code_has_fixed_numbers(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.0"))
    text = TERM % ("forward_kl", "{temperature: {from: 2, to: 1}}") + "train: {logits: compiled}\n"
    assert "each step would be compiled anew" in refused(text)
    assert resolve(parse(text.replace("temperature:", "weight:")))


def test_fields_that_the_finished_objective_has_too_can_change():
    """Where `finish` says that it returns the same class."""

    class Same(ForwardKL):
        def finish(self, scene: Scene) -> "ForwardKL":
            return self

    base = resolve(parse(TERM % ("forward_kl", "weight: {from: 1, to: 1}")))
    ramp = {"temperature": Ramp(from_=2.0, to=1.0)}

    def with_objective(objective):
        return replace(base, terms=(Term(objective=objective, schedule=ramp),))

    with pytest.raises(RecipeError, match="one of: weight"):
        fit(with_objective(Same()))  # a ForwardKL need not be a `Same`
    text = TERM % ("mapped_kl", "temperature: {from: 2, to: 1}")
    assert resolve(parse(text)).terms[0].schedule == ramp


def test_an_objective_that_names_its_sites_is_offered_them_too():
    class Here(ForwardKL):
        needs = frozenset({"hidden:3", "logits"})

    base = resolve(parse(ONE + "terms: [{objective: forward_kl}]\n"))
    assert fit(replace(base, terms=(Term(objective=Here()),))).terms[0].teacher == "big"


def test_needs_with_a_site_are_offered_without():
    text = ONE + "terms: [{objective: features}]\n"
    assert resolve(parse(text)).terms[0].teacher == "big"
    cached = (
        TOP
        + "teachers: {big: {kind: cache, path: c, of: {name: b}}}\nterms: [{objective: features}]\n"
    )
    message = refused(cached)
    assert message.startswith("r.yaml:4: terms.0.objective: features needs hidden; teacher 'big'")
    assert "sparse_kl" in message
    assert "forward_kl" not in message.partition("would work:")[2]


# --- ensembles ---------------------------------------------------------------------------------

MEMBERS = (
    TOP
    + """\
teachers:
  a: {name: a}
  b: {name: b}
  c: {kind: cache, path: c, of: {name: c}, keep: %s}
  both:
    kind: ensemble
    of: %s
    how: %s
terms:
  - {objective: %s, teacher: both}
train: {parallel: %s}
"""
)


def ensemble(
    keep="full", of="{a: 0.7, b: 0.3}", how="mixture", objective="forward_kl", parallel="ddp"
):
    return MEMBERS % (keep, of, how, objective, parallel)


@pytest.mark.parametrize("how", ["mixture", "geometric", "route"])
def test_an_ensemble_is_read_written_and_read_again(how):
    recipe = resolve(parse(ensemble(of="{a: 7, b: 3}", how=how)))
    assert recipe.teachers["both"] == EnsembleTeacher(of={"a": 7.0, "b": 3.0}, how=how)
    assert recipe.teachers["both"].shares == {"a": 0.7, "b": 0.3}
    assert resolve(parse(dump(recipe))) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"of": "{a: 1, bb: 1}"},
            "r.yaml:9: teachers.both.of.bb: no teacher 'bb'; did you mean 'b'?",
        ),
        ({"of": "{a: 1, both: 1}"}, "r.yaml:9: teachers.both.of.both: 'both' is an ensemble too"),
        ({"of": "{a: 1}"}, "r.yaml:9: teachers.both.of: an ensemble has at least two teachers"),
        ({"of": "{}"}, "r.yaml:9: teachers.both.of: an ensemble has at least two teachers"),
        ({"of": "{a: 1, b: 0}"}, "r.yaml:9: teachers.both.of.b: input should be greater than 0"),
        ({"of": "{a: 1, b: -2}"}, "r.yaml:9: teachers.both.of.b: input should be greater than 0"),
        ({"of": "{a: 1, b: true}"}, "r.yaml:9: teachers.both.of.b: a number is wanted"),
        ({"of": "{a: 1, b: .inf}"}, "r.yaml:9: teachers.both.of.b: "),
        ({"of": "[a, b]"}, "r.yaml:9: teachers.both.of: "),
        (
            {"how": "vote"},
            "r.yaml:10: teachers.both.how: input should be 'mixture', 'geometric' or",
        ),
        (
            {"of": "{a: 1, c: 1}", "keep": "sampled"},
            "r.yaml:9: teachers.both.of.c: an ensemble needs logits; 'c' offers sparse",
        ),
        ({"of": "{a: 1, c: 1}"}, "r.yaml:9: teachers.both.of: caches and models on this machine"),
        (
            {"how": "route", "parallel": "fsdp"},
            "r.yaml:10: teachers.both.how: with `parallel: fsdp`",
        ),
        (
            {"objective": "features"},
            "r.yaml:12: terms.0.objective: features needs hidden; teacher 'both' offers chosen",
        ),
    ],
)
def test_wrong_ensembles(changes, message):
    assert refused(ensemble(**changes)).startswith(message)


def test_a_cache_is_not_made_of_an_ensemble():
    text = (
        TOP
        + """\
teachers:
  a: {name: a}
  c: {kind: cache, path: c, of: {kind: ensemble, of: {a: 1, a2: 1}}}
terms: [{objective: cross_entropy}]
"""
    )
    assert refused(text).startswith("r.yaml:5: teachers.c.of")


def test_a_student_is_not_cut_from_an_ensemble():
    text = ensemble().replace("student: {name: s}", "student: {from: both}")
    assert (
        refused(text)
        == "r.yaml:1: student.from: 'both' is an ensemble; name one of its models: a, b"
    )


def test_members_must_have_one_tokenizer(make_recipe, tiny_teacher, shared):
    other = shared / "models" / "stories260K"
    teachers = {
        "a": {"name": str(tiny_teacher)},
        "b": {"name": str(other)},
        "both": {"kind": "ensemble", "of": {"a": 1, "b": 1}},
    }
    terms = [{"objective": "forward_kl", "teacher": "both"}]
    recipe = make_recipe(teachers=teachers, terms=terms, student={"from": "a"})
    with pytest.raises(RecipeError, match=r"teachers\.both\.of\.b: 'b' and 'a' have different tok"):
        check(recipe)


def test_facts_of_an_ensemble(make_recipe, tiny_teacher):
    teachers = {
        "both": {"kind": "ensemble", "of": {"a": 1, "b": 1}},
        "a": {"name": str(tiny_teacher)},
        "b": {"name": str(tiny_teacher)},
    }
    terms = [{"objective": "forward_kl", "teacher": "both"}]
    facts = check(make_recipe(teachers=teachers, terms=terms, student={"from": "a"}))
    assert set(facts.models) == {"a", "b"}  # nothing is loaded for the ensemble itself
    assert facts.teachers["both"].parameters == 2 * facts.teachers["a"].parameters
    assert facts.teachers["both"].vocabulary == facts.teachers["a"].vocabulary


def test_no_more_tokens_are_ranked_than_there_are(make_recipe, tokenizer):
    terms = [{"objective": {"kind": "ranking", "k": len(tokenizer) + 1}}]
    with pytest.raises(RecipeError, match=r"terms\.0\.objective\.k: 309 is more than the 308"):
        check(make_recipe(terms=terms))
    check(make_recipe(terms=[{"objective": {"kind": "ranking", "k": len(tokenizer)}}]))
