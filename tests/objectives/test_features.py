"""Features: which layers, which projector, and that it trains, is saved and is not exported."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from limbeck import objectives
from limbeck.core.errors import RecipeError
from limbeck.core.protocols import Objective, Scene
from limbeck.core.registry import kinds
from limbeck.core.specs import CausalStudent, LocalTeacher
from limbeck.core.types import Sample, Signals, Turn
from limbeck.losses import features
from limbeck.models.causal import CausalModel
from limbeck.models.load import load_student, load_teacher
from limbeck.objectives import layers as layers_of
from limbeck.objectives.layers import layer_pairs, layer_similarity, monotone, uniform
from limbeck.recipe.document import parse
from limbeck.recipe.resolve import describe, dump, resolve
from limbeck.recipe.run import run
from limbeck.train.loop import Trainer

TEXTS = " the cat sat on a mat and saw two dogs run past three old red trees near the river".split()


def network(tokenizer, depth=2, width=16, seed=0):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=depth,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(config).eval()
    return CausalModel(module, tokenizer, name=f"llama{depth}", max_length=64)


def samples(count=6):
    texts = [" ".join(TEXTS[k % 7 : k % 7 + 6 + k % 3]) for k in range(count)]
    turns = [(Turn(text="two dogs "), Turn(text=text, learn=True)) for text in texts]
    return [Sample(id=str(k), turns=turn) for k, turn in enumerate(turns)]


def scene(student, teacher, folder, seed=0):
    return Scene(student=student, teacher=teacher, samples=samples(), seed=seed, folder=folder)


def read(model, needs, chosen=None):
    return model.read(model.collate([model.encode(s) for s in chosen or samples()]), needs)


@pytest.fixture
def wide(tokenizer):
    return network(tokenizer, depth=4, width=24, seed=1)


@pytest.fixture
def narrow(tokenizer):
    return network(tokenizer)


# --- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        ("last", (("1", "3"),)),
        ("last-1", (("1", "3"),)),
        ("last-2", (("0", "2"), ("1", "3"))),
        ("uniform", (("0", "1"), ("1", "3"))),
        (((0, 3), (-1, -2)), (("0", "3"), ("1", "2"))),
        ((("model.norm", "1"),), (("model.norm", "1"),)),
    ],
)
def test_layers_are_named(layers, pairs, narrow, wide, tmp_path):
    assert layer_pairs(layers, scene(narrow, wide, tmp_path)) == pairs
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (((0, 4),), r"^layers: the teacher has no layer 4; it has 0 to 3, and -1 is the last$"),
        (((-3, 0),), r"^layers: the student has no layer -3; it has 0 to 1"),
        (((0, "model.nrom"),), r"^layers: no part 'model.nrom' .*near: .*model.norm"),
        ("last-3", r"^layers: 'last-3' .*the student has 2 layers and the teacher 4$"),
        (((1, 3), (-1, -1)), r"^layers: a pair stands there twice"),
    ],
)
def test_layers_that_are_not_there(layers, message, narrow, wide, tmp_path):
    with pytest.raises(RecipeError, match=message):
        objectives.Features(layers=layers).finish(scene(narrow, wide, tmp_path))


@pytest.mark.parametrize(
    "layers", ["", "lost", "last-0", "last-", "last-x", "CKA", (), ((1, 1),) * 2]
)
def test_layers_that_mean_nothing_are_refused_before_models_are_known(layers):
    for cls in (objectives.Features, objectives.AttentionMaps, objectives.AttentionRelations):
        with pytest.raises(RecipeError, match=r"last, last-K .*uniform, cka, or pairs"):
            cls(layers=layers)


@given(st.integers(1, 40), st.integers(1, 40))
def test_uniform_layers_rise_and_end_together(student, teacher):
    pairs = [(int(a), int(b)) for a, b in uniform(student, teacher)]
    assert [a for a, _ in pairs] == list(range(student))
    chosen = [b for _, b in pairs]
    assert chosen == sorted(chosen)
    assert chosen[-1] == teacher - 1
    assert all(0 <= b < teacher for b in chosen)
    if teacher % student == 0:
        assert chosen == [(a + 1) * teacher // student - 1 for a in range(student)]


def every_rising_choice(rows, columns, least=0):
    if rows == 0:
        yield []
        return
    for first in range(least, columns):
        yield from ([first, *rest] for rest in every_rising_choice(rows - 1, columns, first))


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_rising_choice_is_the_best_of_all(rows, columns, seed):
    random = torch.Generator().manual_seed(seed)
    gain = torch.randn(rows, columns, generator=random, dtype=torch.float64)
    chosen = monotone(gain)
    assert chosen == sorted(chosen)

    def worth(choice):
        return sum(float(gain[row, column]) for row, column in enumerate(choice))

    best = max(map(worth, every_rising_choice(rows, columns)))
    assert worth(chosen) == pytest.approx(best)


def test_similar_layers_find_each_other(wide, tokenizer, tmp_path):
    """A student made of the teacher's layers 0 and 1: what they say is exactly the same."""
    student = network(tokenizer, depth=2, width=24)
    student.module.load_state_dict(wide.module.state_dict(), strict=False)
    at = scene(student, wide, tmp_path)
    gain = layer_similarity(at)
    assert gain.shape == (2, 4)
    assert gain[0, 0].item() == pytest.approx(1)
    assert gain[1, 1].item() == pytest.approx(1)
    assert gain[0, 1:].max() < 0.999
    assert layer_pairs("cka", at) == (("0", "0"), ("1", "1"))


def test_a_real_student_finds_the_first_layers_that_it_was_cut_from(shared, tmp_path):
    spec = LocalTeacher(name=str(shared / "models/stories260K"))
    cpu = torch.device("cpu")
    teacher = load_teacher(spec, cpu, 128)
    cut = CausalStudent(from_="teacher", layers=(0, 1, 2))
    student = load_student(cut, {"teacher": spec}, cpu, 0)
    lines = (shared / "data/stories/train.jsonl").read_text().splitlines()[:8]
    texts = [json.loads(line)["text"] for line in lines]
    stories = [Sample(id=t[:9], turns=(Turn(text=t[:300], learn=True),)) for t in texts]
    at = replace(scene(student, teacher, tmp_path), samples=stories)
    gain = layer_similarity(at)
    assert torch.allclose(gain.diagonal(), torch.ones(3, dtype=torch.float64), atol=1e-5)
    assert gain[0, 1:].max() < 0.95
    assert layer_pairs("cka", at) == (("0", "0"), ("1", "1"), ("2", "2"))


def test_layer_similarity_is_cka_averaged_over_batches(narrow, wide, tmp_path, monkeypatch):
    at = scene(narrow, wide, tmp_path)
    needs = [frozenset({"hidden:1"}), frozenset({"hidden:2"})]
    with torch.no_grad():
        batches = [samples()[:4], samples()[4:]]
        said = [
            [read(m, n, batch) for m, n in zip((narrow, wide), needs, strict=True)]
            for batch in batches
        ]
    pairs = [(a.hidden["1"].double(), b.hidden["2"].double()) for a, b in said]

    def averaged(which):
        return sum(len(a) * features.hsic(*which(a, b)) for a, b in pairs)

    expected = (
        averaged(lambda a, b: (a, b))
        / (averaged(lambda a, b: (a, a)) * averaged(lambda a, b: (b, b))).sqrt()
    )
    assert layer_similarity(at)[1, 2].item() == pytest.approx(expected.item())
    monkeypatch.setattr(layers_of, "BATCH", 100)
    whole = [read(m, n) for m, n in zip((narrow, wide), needs, strict=True)]
    cka = features.linear_cka(whole[0].hidden["1"].double(), whole[1].hidden["2"].double())
    assert layer_similarity(at)[1, 2].item() == pytest.approx(cka.item())
    monkeypatch.setattr(layers_of, "ROWS", 20)
    some = layer_similarity(at)[1, 2].item()
    assert some != pytest.approx(cka.item())
    assert some == pytest.approx(cka.item(), abs=0.3)


def test_a_choice_of_layers_is_kept(narrow, wide, tmp_path, monkeypatch):
    at = scene(narrow, wide, tmp_path)
    first = layer_pairs("cka", at)
    kept = json.loads((tmp_path / "layers.json").read_text())
    assert kept["pairs"] == [[int(a), int(b)] for a, b in first]

    def never(*_):
        raise AssertionError("it was read again")

    monkeypatch.setattr(CausalModel, "read", never)
    assert layer_pairs("cka", at) == first
    other = replace(at, student=network(narrow.tokenizer, depth=3))
    with pytest.raises(AssertionError, match="again"):
        layer_pairs("cka", other)
    (tmp_path / "layers.json").write_text("{")
    with pytest.raises(AssertionError, match="again"):
        layer_pairs("cka", at)


def test_too_little_text_to_compare_layers(narrow, wide, tmp_path):
    at = replace(scene(narrow, wide, tmp_path), samples=[])
    with pytest.raises(RecipeError, match="too little text"):
        layer_pairs("cka", at)
    with pytest.raises(RecipeError, match="a model at hand"):
        layer_pairs("last", replace(at, teacher=None))


# --- the objective ------------------------------------------------------------------------------

EXPECTED = {
    "mse": features.hidden_mse,
    "cosine": features.hidden_cosine,
    "correlation": features.hidden_correlation,
    "similarity": None,
    "cka": features.cka_loss,
}


@pytest.mark.parametrize("loss", EXPECTED)
def test_it_is_its_loss_and_the_mean_over_pairs(loss, tokenizer, tmp_path):
    student, teacher = network(tokenizer), network(tokenizer, depth=3, seed=2)
    finished = objectives.Features(layers=((0, 2), (1, 0)), loss=loss).finish(
        scene(student, teacher, tmp_path)
    )
    assert isinstance(finished, Objective)
    assert finished.asks == {"hidden:0", "hidden:1"}
    assert finished.needs == {"hidden:2", "hidden:0"}
    assert not list(finished.parameters())
    said, heard = read(student, finished.asks), read(teacher, finished.needs)
    of = EXPECTED[loss] or (lambda s, t: features.similarity(s, t, said.sample))
    expected = (
        of(said.hidden["0"], heard.hidden["2"]) + of(said.hidden["1"], heard.hidden["0"])
    ) / 2
    value = finished(said, heard)
    assert value.shape == said.labels.shape
    assert torch.allclose(value, expected)
    value.mean().backward()
    assert student.module.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("projector", "shapes"), [("linear", 2), ("mlp", 4)])
def test_projectors_take_the_students_width_to_the_teachers(
    projector, shapes, narrow, wide, tmp_path
):
    finished = objectives.Features(layers="uniform", projector=projector).finish(
        scene(narrow, wide, tmp_path)
    )
    assert isinstance(finished, nn.Module)
    assert len(list(finished.parameters())) == 2 * shapes
    said, heard = read(narrow, finished.asks), read(wide, finished.needs)
    value = finished(said, heard)
    first, second = finished.projectors
    expected = features.hidden_mse(first(said.hidden["0"]), heard.hidden["1"])
    expected = expected + features.hidden_mse(second(said.hidden["1"]), heard.hidden["3"])
    assert torch.allclose(value, expected / 2)
    value.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in finished.parameters())


def test_projectors_depend_on_the_seed_alone(narrow, wide, tmp_path):
    def made(seed):
        torch.manual_seed(len(str(seed)) + made.calls)
        made.calls += 1
        objective = objectives.Features(layers="uniform", projector="linear")
        return objective.finish(scene(narrow, wide, tmp_path, seed)).state_dict()

    made.calls = 0
    first, again, other = made(1), made(1), made(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    assert not torch.equal(first["projectors.0.weight"], first["projectors.1.weight"])


def test_hidden_states_in_half_precision_meet_a_projector_in_float32(narrow, wide, tmp_path):
    finished = objectives.Features(projector="linear").finish(scene(narrow, wide, tmp_path))
    said, heard = read(narrow, finished.asks), read(wide, finished.needs)
    half = [
        replace(x, hidden={k: v.bfloat16() for k, v in x.hidden.items()}) for x in (said, heard)
    ]
    outside = finished(*half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(finished(*half), outside)
    assert outside.dtype == torch.float32


@pytest.mark.parametrize("loss", ["mse", "cosine", "correlation"])
def test_different_widths_need_a_projector(loss, narrow, wide, tmp_path):
    message = r"^projector: student 1 is 16 wide and teacher 3 24; .*linear.*similarity.*cka"
    with pytest.raises(RecipeError, match=message):
        objectives.Features(loss=loss).finish(scene(narrow, wide, tmp_path))


@pytest.mark.parametrize("loss", ["similarity", "cka"])
def test_losses_of_any_width_have_no_projector(loss, narrow, wide, tmp_path):
    finished = objectives.Features(loss=loss).finish(scene(narrow, wide, tmp_path))
    value = finished(read(narrow, finished.asks), read(wide, finished.needs))
    assert value.mean() > 0.01
    with pytest.raises(RecipeError, match=f"^projector: {loss} compares any widths"):
        objectives.Features(loss=loss, projector="linear")


def test_it_is_a_frozen_value_of_the_protocol(narrow, tmp_path):
    cls = objectives.Features
    assert kinds("objective")["features"] is cls
    assert isinstance(cls(), Objective)
    assert cls() == cls()
    assert hash(cls(layers=((0, 0),))) == hash(cls(layers=((0, 0),)))
    finished = cls().finish(scene(narrow, narrow, tmp_path))
    for name in ("kind", "unit", "shared_vocabulary"):
        assert getattr(finished, name) == getattr(cls, name)
    assert not getattr(finished, "rowwise", False)
    with pytest.raises(RecipeError, match="finished"):
        cls()(Signals(labels=torch.zeros(1)), Signals(labels=torch.zeros(1)))


# --- in a run -----------------------------------------------------------------------------------


@pytest.fixture
def recipe(make_recipe, tokenizer, tiny_teacher):
    """A narrower student, which a projector stands between."""

    def make(objective, steps=6, **student):
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 1, "intermediate_size": 16}
        config = json.loads((tiny_teacher / "config.json").read_text()) | sizes
        kept = [*sizes, "model_type", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"]
        return make_recipe(
            student={"config": {key: config[key] for key in kept}, **student},
            terms=[{"objective": objective}],
            train={"steps": steps},
        )

    return make


class Stopped(Exception):
    """In place of whatever ends a run."""


def losses_of(folder, kind="features"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[f"loss/{kind}"] for row in rows]


def test_a_projector_trains_is_saved_and_is_not_exported(recipe, tmp_path):
    out = tmp_path / "run"
    objective = {"kind": "features", "layers": "uniform", "loss": "cosine", "projector": "mlp"}
    run(recipe(objective, steps=20), out)
    values = losses_of(out)
    assert sum(values[-5:]) < 0.9 * sum(values[:5])
    saved = [load_file(out / f"checkpoints/step-{n}/weights.safetensors") for n in (18, 20)]
    names = [name for name in saved[0] if "projectors" in name]
    assert len(names) == 2 * 4
    assert all(not torch.equal(saved[0][name], saved[1][name]) for name in names)
    exported = load_file(out / "student/model.safetensors")
    assert exported
    assert not [name for name in exported if "projector" in name]
    AutoModelForCausalLM.from_pretrained(out / "student")


def test_a_resumed_run_is_as_if_it_had_not_stopped(recipe, tmp_path):
    objective = {"kind": "features", "layers": "cka", "projector": "linear"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(recipe(objective), whole)
    step, calls = Trainer.step, []

    def stops(self):
        calls.append(self)
        if len(calls) == 5:
            raise Stopped
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", stops)
        with pytest.raises(Stopped):
            run(recipe(objective), parts)
    run(recipe(objective), parts, resume=True)
    assert losses_of(parts)[-1] == losses_of(whole)[-1]
    names = [folder / "checkpoints/step-6/weights.safetensors" for folder in (whole, parts)]
    first, second = map(load_file, names)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A tokenizer that has a token for each byte and no more."""
    folder = tmp_path_factory.mktemp("letters")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=259, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["a"], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "features", "layers": "cka", "loss": "cosine", "projector": "linear"},
        {"kind": "features", "layers": "uniform", "loss": "similarity"},
        {"kind": "attention_relations", "layers": "last-2"},
    ],
    ids=lambda objective: "-".join(map(str, objective.values())),
)
def test_another_tokenizer_is_met_at_the_ends_of_spans(objective, recipe, letters, tmp_path):
    out = tmp_path / "run"
    run(recipe(objective, steps=20, tokenizer=str(letters)), out)
    values = losses_of(out, objective["kind"])
    assert sum(values[-5:]) < 0.97 * sum(values[:5])


def test_maps_need_one_tokenizer(recipe, letters, tmp_path):
    with pytest.raises(RecipeError, match=r"different tokenizers.*features"):
        run(recipe("attention_maps", tokenizer=str(letters)), tmp_path / "run")


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "features", "layers": [[0, -1], ["model.norm", 3]], "loss": "cka"},
        {"kind": "features", "layers": "last-2", "projector": "mlp"},
        {"kind": "attention_maps", "layers": [[0, 1]], "loss": "mse"},
        {"kind": "attention_relations", "relations": ["value"], "heads": 2},
        {"kind": "attention_relations"},
    ],
)
def test_what_a_recipe_says_comes_back(objective, make_recipe):
    made = make_recipe(terms=[{"objective": objective}])
    assert resolve(parse(dump(made))) == made
    written = describe(made.terms[0].objective)
    assert {key: written[key] for key in objective} == objective


def test_an_error_names_the_line_of_the_recipe(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"terms.0.objective.layers: the student has no layer 9"):
        run(recipe({"kind": "features", "layers": [[9, 0]], "projector": "linear"}), tmp_path / "a")
    with pytest.raises(RecipeError, match=r"terms.0.objective.projector: student 1 is 8 wide"):
        run(recipe("features"), tmp_path / "b")


@pytest.mark.parametrize("layers", ["lats", 3, [1, 2], [[1]], [[1, 2, 3]], [[1.5, 2]], [[None, 1]]])
def test_layers_of_a_wrong_shape_are_told_what_is_right(layers, make_recipe):
    message = r"^terms.0.objective.layers: .* is none of: last, .*pairs such as \[\[3, 7\]"
    with pytest.raises(RecipeError, match=message):
        make_recipe(terms=[{"objective": {"kind": "features", "layers": layers}}])
