"""A resolved recipe is the same after a round trip, and its hashes change with what they cover."""

import dataclasses
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

import limbeck.recipe.resolve  # noqa: F401  # registers the kinds
from limbeck.core.errors import RecipeError
from limbeck.core.registry import kinds
from limbeck.core.schedule import Ramp
from limbeck.core.specs import CachedTeacher, CausalStudent, LocalTeacher, Lora
from limbeck.evals import Agreement, Perplexity, Task
from limbeck.objectives import CrossEntropy, ForwardKL
from limbeck.recipe.document import Document, parse
from limbeck.recipe.resolve import (
    LAYOUT,
    dump,
    fit,
    resolve,
    sha256,
    to_mapping,
    training_sha256,
)
from limbeck.recipe.schema import Price, Recipe, Term, Train
from limbeck.sources import Dataset
from limbeck.sources.dataset import Column

OBJECTIVES = kinds("objective")
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)
positive = st.integers(1, 10**9)
rates = st.floats(1e-9, 1e9)
shares = st.floats(0, 1)
inner_shares = st.floats(0.01, 0.99)
maybe = {"revision": st.none() | texts, "tokenizer": st.none() | texts}
FIELDS = {"temperature": rates, "beta": shares, "alpha": shares, "mu": inner_shares}
FIELDS |= {"tail": st.booleans(), "t": shares, "k": st.integers(2, 10**6), "margin": shares}


def objectives(kind):
    cls = OBJECTIVES[kind]
    names = [field.name for field in dataclasses.fields(cls)]
    own = FIELDS | ({"beta": inner_shares} if kind == "candidates" else {})
    return st.builds(cls, **{name: own[name] for name in names if name in own})


students = st.builds(
    CausalStudent,
    from_=st.just("big"),
    layers=st.none() | st.lists(st.integers(0, 99), max_size=4).map(tuple),
    max_length=st.integers(2, 10**6),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    lora=st.none()
    | st.builds(
        Lora,
        rank=positive,
        alpha=rates,
        dropout=st.floats(0, 0.99),
        targets=texts | st.lists(texts, max_size=3).map(tuple),
    ),
    gradient_checkpointing=st.booleans(),
    **maybe,
)
teachers = st.builds(
    LocalTeacher,
    name=texts,
    dtype=st.sampled_from(["auto", "float32"]),
    device=st.none() | texts,
    quantize=st.sampled_from([None, "4bit", "8bit"]),
    **maybe,
)
sources = st.builds(
    Dataset,
    path=texts,
    split=texts,
    columns=st.dictionaries(st.sampled_from(typing.get_args(Column)), texts, max_size=2),
    holdout=st.integers(0, 10**6) | texts,
)
trains = st.builds(
    Train,
    steps=positive,
    batch_tokens=positive,
    learning_rate=rates,
    schedule=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    warmup=shares,
    weight_decay=st.floats(0, 10),
    clip=rates,
    accumulate=positive,
    parallel=st.sampled_from(["ddp", "fsdp"]),
    device=texts,
    save_every=positive,
    keep=positive,
    patience=positive,
)
prices = st.builds(
    Price, teacher_usd_per_hour=st.none() | rates, student_usd_per_hour=st.none() | rates
)
evals = st.lists(
    st.sampled_from(
        [
            Agreement(),
            Perplexity(batch_tokens=77),
            Task(name="a", path="a.jsonl", match="regex", pattern="(x+)", stop=("\n",), limit=3),
        ]
    ),
    unique_by=type,
).map(tuple)


def cached(temperature):
    return st.builds(
        CachedTeacher,
        path=texts,
        of=teachers,
        keep=st.sampled_from(["sampled", "topk"]),
        k=positive,
        temperature=st.just(temperature),
        seed=st.integers(0, 2**63),
        dtype=st.sampled_from(["auto", "bfloat16"]),
    )


@st.composite
def recipes(draw, kind):
    objective = draw(objectives(kind))
    sparse = "sparse" in objective.needs
    teacher = cached(objective.temperature) if sparse else teachers
    return draw(recipes_with(objective, teacher, kind))


def recipes_with(objective, teacher, kind):
    numbers = ["weight"]
    if hasattr(objective, "temperature") and not hasattr(objective, "finish"):
        numbers += ["temperature"] * ("sparse" not in objective.needs)
    ramp = st.builds(
        Ramp,
        from_=rates,
        to=rates,
        until=st.floats(0.01, 1),
        shape=st.sampled_from(["linear", "cosine"]),
    )
    term = st.builds(
        Term,
        objective=st.just(objective),
        schedule=st.dictionaries(st.sampled_from(numbers), ramp),
        teacher=st.just("big") if OBJECTIVES[kind].needs else st.none(),
        weight=st.floats(0, 1e6),
        channel=st.none() | texts,
        name=st.none() | texts,
    )
    return st.builds(
        Recipe,
        student=students,
        source=sources,
        terms=st.tuples(term),
        teachers=st.builds(lambda big: {"big": big}, teacher),
        train=trains,
        evals=evals,
        compare=st.sampled_from([None, "labels"]),
        price=prices,
        seed=st.integers(0, 2**63),
    )


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_round_trip(kind):
    @settings(max_examples=10)
    @given(recipes(kind))
    def check(recipe):
        again = resolve(parse(dump(recipe)))
        assert again == recipe
        assert sha256(again) == sha256(recipe)
        assert resolve(Document(to_mapping(recipe), {})) == recipe

    check()


BASE = Recipe(
    student=CausalStudent(from_="big", layers=(0, 1), lora=Lora()),
    source=Dataset(path="a.jsonl"),
    terms=(
        Term(
            objective=ForwardKL(),
            teacher="big",
            schedule={"temperature": Ramp(from_=2.0, to=1.0)},
        ),
        Term(objective=CrossEntropy()),
    ),
    teachers={"big": LocalTeacher(name="b")},
    evals=(Agreement(),),
)


SCORED = {"kind": "feedback", "solution": None, "mistake": "no"}


@pytest.mark.parametrize(
    ("part", "value", "kept"),
    [
        ("terms", [{"objective": {"kind": "on_policy_kl", "clip": None}}], "clip: null"),
        ("source", {"kind": "rollouts", "of": {"path": "a"}, "scorer": SCORED}, "solution: null"),
    ],
)
def test_a_null_that_is_not_the_default_is_kept(part, value, kept):
    values = {
        "student": {"from": "big"},
        "teachers": {"big": {"name": "b"}},
        "source": {"kind": "rollouts", "of": {"path": "a"}},
        "terms": [{"objective": "on_policy_kl"}],
    }
    plain = resolve(Document(values, {}))
    recipe = resolve(Document({**values, part: value}, {}))
    text = dump(recipe)
    assert kept in text
    assert text.count("null") == 1 + dump(plain).count("null")
    assert resolve(parse(text)) == recipe
    assert training_sha256(recipe) != training_sha256(plain)


def changed(value):
    """Each field of a frozen value replaced by something else: (path, changed value)."""
    for field in dataclasses.fields(value):
        old = getattr(value, field.name)
        if dataclasses.is_dataclass(old):
            inner = [(f"{field.name}.{path}", new) for path, new in changed(old)]
            yield from ((p, dataclasses.replace(value, **{field.name: n})) for p, n in inner)
        elif isinstance(old, tuple) and old and dataclasses.is_dataclass(old[0]):
            for path, new in changed(old[0]):
                whole = {field.name: (new, *old[1:])}
                yield f"{field.name}.0.{path}", dataclasses.replace(value, **whole)
            yield field.name, dataclasses.replace(value, **{field.name: old[1:]})
        elif isinstance(old, dict) and old and dataclasses.is_dataclass(next(iter(old.values()))):
            name, part = next(iter(old.items()))
            for path, new in changed(part):
                whole = {field.name: {**old, name: new}}
                yield f"{field.name}.{name}.{path}", dataclasses.replace(value, **whole)
        else:
            yield field.name, dataclasses.replace(value, **{field.name: another(value, field, old)})


def another(value, field, old):
    """Another value that the field's type allows."""
    adapter = TypeAdapter(typing.get_type_hints(type(value))[field.name])
    for candidate in (17, 0.125, True, "other", (5,), {"text": "y"}, *literals(adapter)):
        try:
            made = adapter.validate_python(candidate, strict=True)
        except ValueError:
            continue
        if made != old and type(made) is type(candidate):
            return made
    raise AssertionError(f"{field.name}: no other value")


def literals(adapter):
    schema = adapter.json_schema()
    return [c for part in (schema, *schema.get("anyOf", [])) for c in part.get("enum", [])] + [
        part["const"] for part in schema.get("anyOf", []) if "const" in part
    ]


VARIANTS = dict(changed(BASE))


def test_the_variants_cover_every_field():
    for part, prefix in (
        (Train, "train."),
        (Price, "price."),
        (CausalStudent, "student."),
        (LocalTeacher, "teachers.big."),
        (Dataset, "source."),
        (Term, "terms.0."),
        (Lora, "student.lora."),
        (ForwardKL, "terms.0.objective."),
        (Ramp, "terms.0.schedule.temperature."),
    ):
        for field in dataclasses.fields(part):
            assert any(path.startswith(prefix + field.name) for path in VARIANTS)


@pytest.mark.parametrize("path", VARIANTS)
def test_hashes_cover_what_they_should(path):
    recipe = VARIANTS[path]
    assert sha256(recipe) != sha256(BASE)
    part, _, name = path.partition(".")
    ignored = part in ("evals", "compare", "price") or (part == "train" and name in LAYOUT)
    assert (training_sha256(recipe) == training_sha256(BASE)) is ignored


def test_layout_names_fields_of_train():
    assert set(LAYOUT) <= {field.name for field in dataclasses.fields(Train)}


def test_what_follows_is_filled_in():
    recipe = resolve(
        parse(
            """
student: {from: teacher}
teachers: {big: {name: b}}
source: {path: a.jsonl}
terms: [forward_kl_is_wrong]
""".replace("[forward_kl_is_wrong]", "[{objective: forward_kl}, {objective: cross_entropy}]")
        )
    )
    assert [term.teacher for term in recipe.terms] == ["big", None]
    assert recipe.train == Train()


FIT_ERRORS = {
    "two teachers": (
        {"teachers": {"a": LocalTeacher(name="a"), "b": LocalTeacher(name="b")}},
        "student.from: no teacher 'big'",
    ),
    "no teacher": (
        {"teachers": {}},
        "student.from: no teacher 'big'; the recipe has no `teachers`",
    ),
    "no terms": ({"terms": ()}, "terms: there is no term"),
    "no model": ({"student": CausalStudent()}, "student: give one of name, from, config"),
    "two models": (
        {"student": CausalStudent(name="a", from_="big")},
        "student: give one of name, from, config; it has name and from",
    ),
    "layers of nothing": (
        {"student": CausalStudent(name="a", layers=(1,))},
        "student.layers: only goes with `from`",
    ),
    "frozen": ({"student": CausalStudent(name="a", quantize="4bit")}, "student.quantize: "),
    "flash": (
        {"student": CausalStudent(name="a", attention="flash_attention_2")},
        "student.attention: wants `dtype: bfloat16` or `float16` beside it",
    ),
    "teacher of labels": (
        {"terms": (Term(objective=CrossEntropy(), teacher="big"),)},
        "terms.0.teacher: cross_entropy listens to no teacher",
    ),
    "evaluation": (
        {
            "student": CausalStudent(name="a"),
            "teachers": {},
            "terms": (Term(objective=CrossEntropy()),),
        },
        "evals.0: agreement needs a teacher",
    ),
}


@pytest.mark.parametrize("what", FIT_ERRORS)
def test_parts_that_do_not_fit(what):
    changes, message = FIT_ERRORS[what]
    with pytest.raises(RecipeError) as caught:
        fit(dataclasses.replace(BASE, **changes))
    assert str(caught.value).startswith(message)


def test_a_term_must_name_one_of_several_teachers():
    both = {name: LocalTeacher(name=name) for name in ("big", "huge")}
    with pytest.raises(RecipeError, match="forward_kl needs a teacher; one of: big, huge"):
        fit(dataclasses.replace(BASE, teachers=both, terms=(Term(objective=ForwardKL()),)))
