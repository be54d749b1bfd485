"""The recipes that ship: short, free of machine paths, and each runs offline on tiny models."""

import json
import math
from pathlib import Path

import pytest

from limbeck.core.registry import kinds
from limbeck.recipe import embedded
from limbeck.recipe.cache import make_caches
from limbeck.recipe.document import Document, override, read
from limbeck.recipe.embedded import on_embedded
from limbeck.recipe.generate import generate
from limbeck.recipe.resolve import resolve
from limbeck.recipe.run import run

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
OTHER_TOKENIZER = {
    "sorted_l1",
    "semantic_transport",
    "likelihood_matching",
    "mapped_kl",
    "prefix_kl",
    "hybrid_kl",
    "dual_space",
}
WITHOUT_ONE = {
    "adaptive_kl",  # settings of the KL family, one word away from forward_kl.yaml
    "total_variation",
    "top_k_reverse_kl",
    "logit_mse",
}
MEASURED = {"kl_and_labels", "layers_of_teacher", "lora", "dual_space"}
TINY = ["train.steps=2", "train.batch_tokens=300", "train.device=cpu", "student.dtype=float32"]
each = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
WRITTEN_FIRST = [path for path in RECIPES if "kind: generated" in path.read_text()]
"""Their rows are made by `limbeck generate`; other tests run what they are made of."""

SERVED = {"served_teacher"}
"""Their teacher is a server; `tests/teachers/test_server_reader.py` runs one."""

WITH_A_JUDGE = {"refine", "cycle_align"}
"""The embedded teacher solves problems, and cannot judge."""

runs = pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if path not in WRITTEN_FIRST and path.stem not in SERVED],
    ids=lambda path: path.stem,
)


def test_each_kind_of_objective_has_one():
    used = {term.objective.kind for path in RECIPES for term in resolve(read(path)).terms}
    ours = {kind for kind, cls in kinds("objective").items() if cls.__module__ in shipped()}
    assert ours - WITHOUT_ONE <= used
    assert not used & WITHOUT_ONE
    assert {path.stem for path in RECIPES} >= OTHER_TOKENIZER | {
        *("forward_kl", "reverse_kl", "kl_and_labels", "layers_of_teacher", "lora"),
        *("features", "attention_maps", "attention_relations", "flex_kd", "multi_level"),
        *("alpha_beta", "taid", "decoupled_kd", "ranking", "schedules", "ensemble"),
    }


def shipped():
    """Modules of the package; other tests register kinds of their own."""
    import limbeck.objectives as package

    return {f"{package.__name__}.{path.stem}" for path in Path(package.__path__[0]).glob("*.py")}


@each
def test_it_is_short_and_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("# ")
    assert sum("#" in line for line in lines) >= 6
    assert f"recipes/{path.name}" in text
    resolved = resolve(read(path))
    if (big := resolved.models.get("big")) is not None:
        assert getattr(big, "of", big).name == "Qwen/Qwen3-4B"
    assert data_of(resolved.source).path == "data.jsonl"
    assert not any(mark in text for mark in ("/home", "/work", "/tmp", "~/", "C:\\"))


def data_of(source):
    """What a source's rows come from in the end."""
    if not hasattr(source, "of"):
        return source
    return data_of(source.of[0] if isinstance(source.of, tuple) else source.of)


@pytest.fixture(scope="module")
def characters():
    """A tokenizer whose tokens are single characters."""
    import string

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *string.ascii_lowercase, " ", "\n"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def students(tokenizer, characters, tmp_path_factory) -> dict[bool, Path]:
    """Tiny models of another shape than the teacher, by whether their tokenizer is another one."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folders: dict[bool, Path] = {}
    for other, own in ((False, tokenizer), (True, characters)):
        folders[other] = tmp_path_factory.mktemp("students") / f"{len(own)}"
        config = LlamaConfig(
            vocab_size=len(own),
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[other])
        own.save_pretrained(folders[other])
    return folders


@runs
def test_it_runs_two_steps_on_tiny_models(path, tiny_teacher, students, tiny_data, tmp_path):
    document = read(path)
    place = "source.of" if "of" in document.values["source"] else "source"
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    known = tmp_path / "rows.jsonl"  # a teacher that is the student itself must know more
    more = {"self_distillation": {"privileged": "two old "}, "sdpo": {"answer": "no such word"}}
    if path.stem in more:
        known.write_text("".join(json.dumps({**r, **more[path.stem]}) + "\n" for r in rows))
    data = known if path.stem in more else tiny_data
    settings = [f"{place}.path={data}", f"{place}.holdout=4", *TINY]
    if path.stem == "without_forgetting":
        settings.append("train.learning_rate=0.1")  # else there is nothing to be seen of it
    if place == "source.of":
        settings.append("source.max_tokens=8")
    if path.stem == "sdpo":  # a model of letters is never right, which it can be told
        settings += ["source.scorer.match=exact", "source.scorer.mistake=not this "]
    settings += [
        f"teachers.{name}.name={tiny_teacher}"
        for name, teacher in document.values["teachers"].items()
        if "name" in teacher
    ]
    if "from" in document.values["student"]:
        settings.append("student.layers=[0, 3]")
    else:
        settings.append(f"student.name={students[path.stem in OTHER_TOKENIZER]}")
    if path.stem not in MEASURED:
        settings += ["compare=null", "evals=[]"]  # which are the same in all of them
    if path.stem == "cached_teacher":
        settings.append(f"teachers.big.of.name={tiny_teacher}")
        settings.append(f"teachers.big.path={tmp_path / 'big'}")
    resolved = resolve(override(document, settings))
    make_caches(resolved)
    report = run(resolved, tmp_path / "run")
    assert report.train.steps == 2
    assert (tmp_path / "run" / "report.md").exists()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = {k: v for k, v in json.loads(lines[-1]).items() if k.startswith("loss/")}
    assert len(losses) == len(document.values["terms"])
    if path.stem == "gad":  # at first its critic finds all answers equal
        return
    # Nothing would be left of a loss where no rows are paired, or where both models are the same.
    assert all(math.isfinite(value) and value > 0 for value in losses.values()), losses


def test_a_served_teacher_becomes_what_its_terms_ask_for(tmp_path):
    document = read(FOLDER / "served_teacher.yaml")
    told = on_embedded(document, tmp_path).values["teachers"]["api"]
    assert (told["kind"], told["keep"], told["k"]) == ("cache", "topk", 20)
    other = ["terms=[{objective: likelihood_matching, teacher: api}]", "evals=[]"]
    plain = on_embedded(override(document, other), tmp_path)
    assert set(plain.values["teachers"]["api"]) == {"name"}
    values = override(plain, ["train.steps=1", *TINY[1:]])
    assert run(resolve(values), tmp_path / "run").train.steps == 1


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if p.stem not in WITH_A_JUDGE], ids=lambda path: path.stem
)
def test_it_runs_on_the_embedded_models(path, tmp_path, monkeypatch):
    """As `limbeck run RECIPE --demo` does, but for fewer steps and without measuring."""
    monkeypatch.setattr(embedded, "PROMPTS", 12)
    document = on_embedded(read(path), tmp_path / "data")
    if path in WRITTEN_FIRST:
        generate(document)
    values = {key: value for key, value in document.values.items() if key != "compare"}
    short = Document({**values, "evals": []}, document.lines, document.file)
    resolved = resolve(override(short, [*TINY, "train.steps=1"]))
    made = make_caches(resolved)
    assert all(Path(cache.path).parent == tmp_path / "data" for cache in made)
    assert len(made) == (path.stem in {"cached_teacher", "served_teacher"})
    report = run(resolved, tmp_path / "run")
    assert report.train.steps == 1
    assert report.train.skipped_steps == 0
