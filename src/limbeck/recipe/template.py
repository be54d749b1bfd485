"""A first recipe for a method, to be edited."""

import json
from dataclasses import fields

import yaml

from limbeck.core.errors import RecipeError
from limbeck.core.registry import did_you_mean, kinds
from limbeck.recipe import resolve as _registers  # noqa: F401


def template(method: str, *, student: str, teacher: str, data: str) -> str:
    """YAML of a recipe with one term, each line explained.

    Raises:
        RecipeError: there is no such objective.
    """
    known = kinds("objective")
    if method not in known:
        raise RecipeError("METHOD", f"no objective {method!r}; {did_you_mean(method, list(known))}")
    cls = known[method]
    student, teacher, data = _word(student), _word(teacher), _word(data)
    settings = "".join(f", {field.name}: {_value(field.default)}" for field in fields(cls))
    title = (cls.__doc__ or method).strip().splitlines()[0]
    taught = bool(getattr(cls, "needs", ()))
    big = f"{{kind: local, name: {teacher}}}   # its weights keep their own dtype"
    if "sparse" in getattr(cls, "needs", ()):
        big = f"{{kind: cache, path: cache, of: {{name: {teacher}}}}}   # see `limbeck cache`"
    teachers = f"teachers:\n  big: {big}\n" if taught else ""
    evals = "agreement, perplexity" if taught else "perplexity"
    compare = "compare: labels          # also train on hard labels alone, to see the gain\n"
    return f"""\
# {title}
student:
  name: {student}     # or {{from: big, layers: [0, 4, 8]}}, or {{config: {{model_type: llama}}}}
  max_length: 1024         # tokens of a sample; what does not fit is cut and counted
{teachers}source:
{_source(method, data)}
terms:                     # the loss is the sum of weight * objective
  - {{objective: {{kind: {method}{settings}}}, weight: 1.0}}
train:
  steps: 500
  batch_tokens: 16384      # tokens of a step, over all processes
  accumulate: 1            # raise it when memory runs out; the result does not change
  learning_rate: 3.0e-4
evals: [{evals}]
{compare if taught else ""}price: {{}}                 # teacher_usd_per_hour, student_usd_per_hour
seed: 0
"""


PLAIN = """\
  path: {data}         # {rows}
  holdout: 64              # rows kept for evaluation, or a file of them"""

ROLLOUTS = """\
  kind: rollouts           # the student writes while it trains
  of: {{path: {data}, holdout: 64}}   # rows of {{prompt, completion}}
  max_tokens: 256          # longest answer"""

SCORED = """
  answers: 4               # to each prompt; they are compared with each other
  scorer: {kind: critic}   # gives each its score; it learns to tell it from the completion"""

MADE_BY = {"candidates": "distribution", "sequence_ranking": "rank"}
"""The step that gives rows the groups and scores without which an objective learns nothing."""


def _source(method: str, data: str) -> str:
    """The source that a method learns from: given rows, groups of them, or the student's own."""
    if method in ("group_policy", "on_policy_kl"):
        return ROLLOUTS.format(data=data) + (SCORED if method == "group_policy" else "")
    rows = "rows of {prompt, completion}, {messages} or {text}"
    if method in MADE_BY:
        rows = f"{{prompt, completion, group, score}}, as the step `{MADE_BY[method]}` makes them"
    return PLAIN.format(data=data, rows=rows)


def _value(value: object) -> str:
    """A setting as YAML, on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()


def _word(text: str) -> str:
    """Text as YAML, quoted only where it has to be."""
    try:
        plain = yaml.safe_load(f"{{x: {text}}}") == {"x": text}
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)
