"""Slips that once crashed, hung, or went through in silence: each is named with its place."""

import subprocess
import sys

import pytest
import yaml

from limbeck import cli
from limbeck.core.errors import ModelError, RecipeError
from limbeck.core.specs import CausalStudent, LocalTeacher
from limbeck.models.facts import MOST_LAYERS, facts_of
from limbeck.recipe.document import override, parse
from limbeck.recipe.resolve import resolve

TEXT = """\
student: {name: x}
source: {path: d}
terms:
- {objective: {kind: cross_entropy}}
train: {steps: 3}
"""


def refusal(text, *settings):
    with pytest.raises(RecipeError) as caught:
        resolve(override(parse(text, "r.yaml"), settings))
    return str(caught.value)


@pytest.mark.parametrize("value", ["false", "0", "''"])
@pytest.mark.parametrize("part", ["price", "evals", "teachers"])
def test_a_false_part_is_not_an_absent_one(part, value):
    assert refusal(f"{TEXT}{part}: {value}\n").startswith(f"r.yaml:6: {part}: a ")


def test_an_empty_part_is_an_absent_one():
    assert resolve(parse(f"{TEXT}price:\nevals: ~\n")) == resolve(parse(TEXT))


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "[1, {deep: .nan}]"])
def test_free_form_values_are_finite_too(number):
    text = TEXT.replace("{name: x}", f"{{config: {{model_type: llama, rms_norm_eps: {number}}}}}")
    place = "student.config.rms_norm_eps" + (".1.deep" if "deep" in number else "")
    assert refusal(text) == f"r.yaml:1: {place}: a finite number is wanted"


def test_a_tag_that_its_value_does_not_fit():
    assert refusal(f"{TEXT}seed: !!bool maybe\n") == "r.yaml:6: seed: 'maybe' cannot be read"


SETTINGS = {
    "train={stps: 3}": "train.stps: unknown field; did you mean 'steps'?",
    "train={steps: -3}": "train.steps: input should be greater than 0; it is -3",
    "train={steps: 3, steps: 4}": "train.steps: is given twice",
    "student.name=a: b": "student.name: not YAML: mapping values are not allowed here",
    "train.steps=1\nseed: 4": "train.steps: one value is wanted",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_command_line_spoilt_is_not_blamed_on_the_file(setting):
    assert refusal(TEXT, setting) == f"{SETTINGS[setting]} (given on the command line)"


@pytest.mark.parametrize("digit", ["\u00b2", "\u0660", "00", "9" * 5000])
def test_only_plain_digits_name_a_place_in_a_list(digit):
    assert refusal(TEXT, f"terms.{digit}.weight=1").endswith("to set")
    assert refusal(TEXT, f"terms.{digit}=1").endswith("to set")


@pytest.mark.parametrize("name", ["a" * 5000, "/" + "a" * 5000, "~no_such_user_at_all/x"])
def test_names_that_no_file_system_takes(name):
    with pytest.raises(ModelError, match="no such folder") as caught:
        facts_of(LocalTeacher(name=name), {})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("layers", [-1, 0, MOST_LAYERS + 1, 10**30])
def test_a_number_of_layers_that_would_take_for_ever(layers, tiny_teacher):
    big = {"big": LocalTeacher(name=str(tiny_teacher))}
    sizes = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}
    with pytest.raises(RecipeError, match="a model has 1 to 1,000 layers") as caught:
        facts_of(CausalStudent(config={**sizes, "num_hidden_layers": layers}), big)
    assert caught.value.field == "student.config"
    with pytest.raises(RecipeError, match="a model has 1 to 1,000 layers") as caught:
        facts_of(CausalStudent(from_="big", layers=(0,) * (MOST_LAYERS + 1)), big)
    assert caught.value.field == "student.layers"


def test_a_vocabulary_smaller_than_the_tokenizer(tiny_teacher, tokenizer):
    big = {"big": LocalTeacher(name=str(tiny_teacher))}
    with pytest.raises(
        RecipeError, match=f"10 is too few for .* {len(tokenizer)} tokens"
    ) as caught:
        facts_of(CausalStudent(config={"model_type": "llama", "vocab_size": 10}), big)
    assert caught.value.field == "student.config.vocab_size"


def test_debug_may_come_first(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(f"{TEXT}seed: bad\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--debug", "plan", str(path)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith(f"{path}:6: seed: ")


def test_no_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "a command is missing (limbeck --help)\n"


def test_a_pipe_gets_whole_lines(tmp_path, tiny_teacher):
    folder = tmp_path / ("d" * 120)
    folder.symlink_to(tiny_teacher)
    values = {
        "student": {"from": "teacher", "layers": [0]},
        "teachers": {"big": {"name": str(folder)}},
        "source": {"path": "d"},
        "terms": [{"objective": "forward_kl"}],
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", "plan", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"name: {folder}\n" in done.stdout
