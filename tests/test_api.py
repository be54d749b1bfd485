"""From Python: seven lines to a trained student, and the names that others may rely on."""

import dataclasses

import pytest
import yaml

import limbeck
import limbeck.recipe.resolve  # noqa: F401  # registers the kinds
from limbeck.core.errors import RecipeError
from limbeck.core.registry import kinds
from limbeck.core.specs import CausalStudent, LocalTeacher
from limbeck.evals import Perplexity
from limbeck.objectives import CrossEntropy, ForwardKL
from limbeck.recipe.resolve import dump, to_mapping
from limbeck.recipe.schema import Price, Recipe, Term, Train
from limbeck.sources import Dataset


def test_seven_lines_give_a_better_student(tiny_teacher, tiny_data, tmp_path):
    report = limbeck.distill(
        student={"from": "teacher", "layers": [0, 3]},
        teacher=tiny_teacher,
        data=tiny_data,
        out=tmp_path / "run",
        steps=25,
        batch_tokens=400,
        learning_rate=0.01,
    )
    assert report.agreement.after.kl_nats < 0.8 * report.agreement.before.kl_nats
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_terms_may_be_objectives_or_terms(tiny_teacher, tiny_data, tmp_path):
    report = limbeck.distill(
        student=str(tiny_teacher),
        teacher={"name": str(tiny_teacher)},
        data={"path": str(tiny_data), "holdout": 0},
        terms=[Term(objective=ForwardKL(), weight=0.5), CrossEntropy()],
        evals=[],
        out=tmp_path / "run",
        steps=1,
        batch_tokens=100,
        seed=3,
    )
    assert report.train.steps == 1
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "seed: 3" in text
    assert "weight: 0.5" in text


def test_without_a_teacher(tiny_teacher, tiny_data, tmp_path):
    settings = {"student": tiny_teacher, "data": tiny_data, "steps": 1, "batch_tokens": 100}
    out = tmp_path / "run"
    report = limbeck.distill(**settings, out=out)
    assert "cross_entropy" in (out / "recipe.yaml").read_text()
    assert report.teacher.name is None
    with pytest.raises(RecipeError, match="no `teachers`"):
        limbeck.distill(**settings, terms=[ForwardKL()], out=tmp_path / "other")
    with pytest.raises(RecipeError, match="did you mean 'steps'"):
        limbeck.distill(**settings, out=tmp_path / "other", stepz=1)


def test_run_takes_a_value_a_mapping_or_a_path(make_recipe, tmp_path):
    recipe = make_recipe({"steps": 1})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    given = {"value": recipe, "mapping": to_mapping(recipe), "path": path, "text": str(path)}
    hashes = {limbeck.run(form, tmp_path / name).recipe_sha256 for name, form in given.items()}
    assert len(hashes) == 1
    with pytest.raises(RecipeError, match="holds a run"):
        limbeck.run(recipe, tmp_path / "value")
    limbeck.run(recipe, tmp_path / "value", resume=True)
    with pytest.raises(RecipeError, match="No such file"):
        limbeck.run(tmp_path / "none.yaml", tmp_path / "none")


def test_a_value_is_checked_like_what_is_written(tiny_teacher, tiny_data, tmp_path):
    """A term need not name the only teacher, as in a file."""
    parts = {
        "student": CausalStudent(name=str(tiny_teacher)),
        "source": Dataset(path=str(tiny_data), holdout=0),
        "teachers": {"big": LocalTeacher(name=str(tiny_teacher))},
        "terms": (Term(objective=ForwardKL()),),
        "train": Train(steps=1, batch_tokens=100),
    }
    assert limbeck.run(Recipe(**parts), tmp_path / "run").train.steps == 1
    written = {**parts, "terms": [{"objective": ForwardKL()}, "cross_entropy"], "evals": []}
    assert limbeck.run(Recipe(**written), tmp_path / "written").train.steps == 1
    for changes, field in (
        ({"terms": ()}, "terms"),
        ({"terms": [{"weight": 1}]}, "terms.0"),
        ({"terms": [5]}, "terms.0"),
        ({"teachers": 5}, "teachers"),
        ({"teachers": {"big": 5}}, "teachers.big"),
        ({"evals": [5]}, "evals.0"),
        ({"train": {"stepz": 1}}, "train.stepz"),
        ({"train": 5}, "train"),
        ({"source": 5}, "source"),
    ):
        with pytest.raises(RecipeError) as error:
            limbeck.run(Recipe(**{**parts, **changes}), tmp_path / "wrong")
        assert error.value.field == field


@pytest.mark.parametrize(
    "parts",
    [
        {"terms": ["forward_kl"]},
        {"terms": "forward_kl"},
        {"terms": [{"objective": {"kind": "forward_kl"}}]},
        {"terms": {"objective": "forward_kl"}},
        {"terms": ForwardKL()},
        {"terms": Term(objective=ForwardKL())},
        {"evals": "perplexity"},
        {"evals": Perplexity()},
        {"evals": [{"kind": "perplexity"}]},
    ],
)
def test_terms_and_evaluations_may_be_written_and_single(tiny_teacher, tiny_data, tmp_path, parts):
    where = {"student": tiny_teacher, "teacher": tiny_teacher, "data": tiny_data}
    settings = {"evals": [], "steps": 1, "batch_tokens": 100, **parts}
    limbeck.distill(**where, **settings, out=tmp_path / "run")
    made = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert [term["objective"]["kind"] for term in made["terms"]] == ["forward_kl"]
    assert [one["kind"] for one in made["evals"]] == (["perplexity"] if "evals" in parts else [])


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"terms": 5}, "terms.0"),
        ({"terms": [None]}, "terms.0"),
        ({"terms": [Term(objective="forward_kl")]}, "terms.0"),
        ({"evals": 5}, "evals.0"),
        ({"evals": [ForwardKL]}, "evals.0"),
        ({"teacher": 5}, "teacher"),
    ],
)
def test_what_is_no_part_is_named(tiny_teacher, tiny_data, tmp_path, parts, field):
    where = {"student": tiny_teacher, "teacher": tiny_teacher, "data": tiny_data, **parts}
    with pytest.raises(RecipeError) as error:
        limbeck.distill(**where, out=tmp_path / "run")
    assert error.value.field == field


NAMES = {
    "limbeck": {"LimbeckError", "Recipe", "Report", "Term", "distill", "losses", "objectives",
                "run"},
    "losses": {"adaptive_kl", "cross_entropy", "forward_kl", "jensen_shannon", "logit_mse",
               "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "sorted_l1",
               "total_variation"},
}  # fmt: skip

FIELDS = {
    "recipe": "student source terms teachers train evals compare price seed",
    "term": "objective teacher weight channel name",
    "train": "steps batch_tokens learning_rate schedule warmup weight_decay clip accumulate"
    " parallel device save_every keep patience",
    "price": "teacher_usd_per_hour student_usd_per_hour",
    "student.causal": "name from_ layers config tokenizer revision max_length dtype lora quantize"
    " gradient_checkpointing compile trust_remote_code",
    "teacher.local": "name tokenizer revision dtype device quantize trust_remote_code",
    "teacher.cache": "path of keep k temperature seed dtype",
    "source.dataset": "path split columns holdout",
    "eval.agreement": "batch_tokens",
    "eval.perplexity": "batch_tokens",
    "eval.task": "name path match pattern stop limit max_tokens temperature seed",
    "objective.adaptive_kl": "temperature mu",
    "objective.cross_entropy": "",
    "objective.forward_kl": "temperature",
    "objective.jensen_shannon": "temperature beta",
    "objective.logit_mse": "temperature",
    "objective.reverse_kl": "temperature",
    "objective.skew_forward_kl": "temperature alpha",
    "objective.skew_reverse_kl": "temperature alpha",
    "objective.sorted_l1": "temperature",
    "objective.sparse_kl": "temperature tail",
    "objective.total_variation": "temperature",
}


def test_public_names_stay():
    """Add to these; whoever renames or removes one breaks other people's programs."""
    assert set(limbeck.__all__) >= NAMES["limbeck"]
    assert set(limbeck.losses.__all__) >= NAMES["losses"]
    for name in limbeck.__all__:
        assert getattr(limbeck, name) is not None
    for name in limbeck.losses.__all__:
        assert callable(getattr(limbeck.losses, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = limbeck.nonsense


def test_recipe_fields_stay():
    classes = {"recipe": Recipe, "term": Term, "train": Train, "price": Price}
    for slot in ("student", "teacher", "source", "eval", "objective"):
        classes |= {f"{slot}.{name}": cls for name, cls in kinds(slot).items()}
    for name, fields in FIELDS.items():
        assert {field.name for field in dataclasses.fields(classes[name])} >= set(fields.split())
    assert set(classes) >= set(FIELDS)
