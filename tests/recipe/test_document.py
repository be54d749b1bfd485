"""YAML with lines: every value knows where it stands, and overrides find their place."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import RecipeError
from limbeck.recipe.document import Document, override, parse, read

TEXT = """\
# a comment
seed: 1
train:
  steps: 3

  clip: 1.5
terms:
  - objective: {kind: forward_kl,
      temperature: 2.0}
    weight: 0.5
  - objective: cross_entropy
"""

LINES = {
    "seed": 2,
    "train": 3,
    "train.steps": 4,
    "train.clip": 6,
    "terms": 7,
    "terms.0": 8,
    "terms.0.objective": 8,
    "terms.0.objective.kind": 8,
    "terms.0.objective.temperature": 9,
    "terms.0.weight": 10,
    "terms.1": 11,
    "terms.1.objective": 11,
}


def test_every_path_has_its_line():
    document = parse(TEXT, "recipe.yaml")
    assert {path: line for path, line in document.lines.items() if path} == LINES
    assert document.values == yaml.safe_load(TEXT)


def test_an_error_takes_the_nearest_line():
    document = parse(TEXT, "recipe.yaml")
    assert str(document.error("train.clip", "bad")) == "recipe.yaml:6: train.clip: bad"
    assert str(document.error("terms.0.teacher", "bad")) == "recipe.yaml:8: terms.0.teacher: bad"
    assert str(document.error("evals.0.x", "bad")) == "recipe.yaml:2: evals.0.x: bad"
    assert str(Document({}, {}).error("seed", "bad")) == "seed: bad"


words = st.text("abcxyz_", min_size=1, max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(words, values, max_size=4))
def test_what_yaml_writes_is_read_back(mapping):
    text = yaml.safe_dump(mapping, allow_unicode=True)
    assert parse(text).values == yaml.safe_load(text)


def refusal(call):
    """What a RecipeError says, where the call raises one; any other error escapes."""
    try:
        call()
    except RecipeError as error:
        return str(error)
    return None


@given(st.text(max_size=80))
def test_any_text_is_a_document_or_a_recipe_error(text):
    said = refusal(lambda: parse(text, "f.yaml"))
    assert said is None or said.startswith("f.yaml:")


@given(st.binary(max_size=80))
def test_any_bytes_are_a_document_or_a_recipe_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    said = refusal(lambda: read(path))
    assert said is None or said.startswith(f"{path}:")


@given(st.text(max_size=30))
def test_any_override_is_a_document_or_a_recipe_error(setting):
    for text in (setting, f"train.steps={setting}", f"{setting}=1"):
        refusal(lambda text=text: override(parse(TEXT), [text]))


def test_overrides_replace_add_and_reach_into_lists():
    document = parse(TEXT, "f.yaml")
    wanted = ["train.steps=9", "price.teacher_usd_per_hour=1.5", "terms.1.weight=2", "seed=null"]
    changed = override(document, [*wanted, "evals=[agreement]", "source={path: a=b}"])
    assert changed.values["train"] == {"steps": 9, "clip": 1.5}
    assert changed.values["price"] == {"teacher_usd_per_hour": 1.5}
    assert changed.values["terms"][1] == {"objective": "cross_entropy", "weight": 2}
    assert changed.values["seed"] is None
    assert changed.values["evals"] == ["agreement"]
    assert changed.values["source"] == {"path": "a=b"}
    assert document.values == yaml.safe_load(TEXT)  # the first one is untouched
    assert "given on the command line" in str(changed.error("train.steps", "bad"))
    assert str(changed.error("train.clip", "bad")) == "f.yaml:6: train.clip: bad"


def test_overrides_reach_through_an_empty_part():
    assert override(parse("train:\n"), ["train.steps=3"]).values == {"train": {"steps": 3}}


def test_an_alias_bomb_is_refused_before_it_unfolds():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    with pytest.raises(RecipeError, match="anchors and aliases"):
        parse("\n".join(lines))


def test_a_setting_inside_a_bare_kind_makes_a_mapping_of_it():
    made = override(parse(TEXT), ["terms.1.objective.temperature=2", "seed=3"])
    assert made.values["terms"][1]["objective"] == {"kind": "cross_entropy", "temperature": 2}
    evals = override(parse("evals: [agreement]"), ["evals.0.batch_tokens=9"]).values["evals"]
    assert evals == [{"kind": "agreement", "batch_tokens": 9}]
    with pytest.raises(RecipeError, match="no such place"):
        override(parse("student: {name: x}"), ["student.name.y=1"])
