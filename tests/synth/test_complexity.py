"""A classifier of prompts: what it predicts, how good that is, and that it can be kept."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from limbeck.core.errors import DataError, ModelError
from limbeck.core.specs import LocalTeacher
from limbeck.core.types import Sample, Turn
from limbeck.models.load import load_teacher
from limbeck.synth.complexity import (
    HASHED,
    Complexity,
    brier_score,
    fit,
    hidden_features,
    reliability,
    text_features,
)

HARD, EASY = "He then divides all {} of them.", "He has {} of them."


def prompts_of(count, seed):
    """Prompts, and whether reasoning helps: with probability 0.9 where three sentences divide."""
    draw = np.random.default_rng(seed)
    prompts, helps = [], []
    for _ in range(count):
        hard = bool(draw.random() < 0.5)
        lines = [(HARD if hard else EASY).format(draw.integers(2, 99)) for _ in range(3)]
        prompts.append(" ".join(["Ann has 7 things.", *lines]))
        helps.append(bool(draw.random() < (0.9 if hard else 0.2)))
    return prompts, helps


@pytest.fixture(scope="module")
def fitted():
    prompts, helps = prompts_of(300, 0)
    return fit(text_features(prompts), helps)


def test_what_it_says_is_what_scikit_learn_says():
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    prompts, helps = prompts_of(120, 1)
    features = text_features(prompts)
    mine = fit(features, helps, folds=4, strength=0.5, seed=2)
    scaled = (features - mine.mean) / mine.scale
    theirs = CalibratedClassifierCV(
        LogisticRegression(C=0.5, max_iter=2000),
        cv=StratifiedKFold(4, shuffle=True, random_state=2),
    ).fit(scaled, helps)
    other = text_features(prompts_of(50, 3)[0])
    wanted = theirs.predict_proba((other - mine.mean) / mine.scale)[:, 1]
    assert mine.probabilities(other) == pytest.approx(wanted, abs=1e-6)
    assert mine.weight.shape == (4, 7 + HASHED)


def test_it_is_calibrated_on_prompts_it_has_not_seen(fitted):
    prompts, helps = prompts_of(400, 9)
    probabilities = fitted.predict(prompts)
    score = brier_score(probabilities, helps)
    best = np.mean([0.9 * 0.1 if "divides" in p else 0.2 * 0.8 for p in prompts])
    base = np.mean(helps) * (1 - np.mean(helps))
    assert abs(score - best) < 0.25 * (base - best)  # most of what can be known is known
    for one in reliability(probabilities, helps, bins=5):
        if one.count > 50:
            assert abs(one.predicted - one.observed) < 0.15
    hard = np.array(["divides" in prompt for prompt in prompts])
    assert probabilities[hard].mean() == pytest.approx(0.9, abs=0.1)
    assert probabilities[~hard].mean() == pytest.approx(0.2, abs=0.1)


def test_it_is_kept_as_numbers_and_json(fitted, tmp_path):
    fitted.save(tmp_path / "classifier")
    names = {path.name for path in (tmp_path / "classifier").iterdir()}
    assert names == {"complexity.safetensors", "complexity.json"}
    again = Complexity.load(tmp_path / "classifier")
    prompts, _ = prompts_of(20, 4)
    assert again.predict(prompts).tolist() == fitted.predict(prompts).tolist()
    assert again.predict([]).tolist() == []


def test_another_process_says_the_same_without_scikit_learn(fitted, tmp_path):
    """Words are hashed alike everywhere: Python's own `hash` would not be."""
    fitted.save(tmp_path / "c")
    prompts, _ = prompts_of(3, 5)
    code = (
        "import sys, json; sys.modules['sklearn'] = None\n"
        "from pathlib import Path\n"
        "from limbeck.synth.complexity import Complexity\n"
        "found = Complexity.load(Path(sys.argv[1])).predict(json.loads(sys.argv[2]))\n"
        "print(json.dumps(found.tolist()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c"), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == fitted.predict(prompts).tolist()


def test_what_is_no_classifier_is_refused(fitted, tmp_path):
    with pytest.raises(ModelError, match="holds no complexity classifier"):
        Complexity.load(tmp_path)
    folder = tmp_path / "c"
    fitted.save(folder)
    (folder / "complexity.json").write_text('{"format": 2, "features": "text"}')
    with pytest.raises(ModelError, match="format 2 is not 1"):
        Complexity.load(folder)
    (folder / "complexity.json").write_text('{"format": 1, "features": "text"}')
    (folder / "complexity.safetensors").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelError, match="holds no"):
        Complexity.load(folder)


def test_a_pickle_is_never_read(fitted, tmp_path):
    import pickle

    fitted.save(tmp_path / "c")
    (tmp_path / "c" / "complexity.safetensors").write_bytes(pickle.dumps({"mean": [1.0]}))
    with pytest.raises(ModelError):
        Complexity.load(tmp_path / "c")


def test_too_few_of_one_kind_cannot_be_fitted():
    prompts, _ = prompts_of(20, 6)
    with pytest.raises(DataError, match="only 2 of the rarer answer, and 5 folds"):
        fit(text_features(prompts), [True] * 2 + [False] * 18)


def test_hidden_states_serve_as_features_too(tiny_teacher, tmp_path):
    model = load_teacher(LocalTeacher(name=str(tiny_teacher)), torch.device("cpu"), 64)
    words = ["the cat sat on a mat", "two dogs run past", "the river"]
    samples = [Sample(id=w, turns=(Turn(text=w),)) for w in words]
    features = hidden_features(model, samples)
    assert features.shape == (3, 16)
    talk = (Turn(text="Be kind.", role="system"), Turn(text=words[0], role="user"))
    assert hidden_features(model, [Sample(id="talk", turns=talk)]).shape == (1, 16)
    ids = torch.tensor([model.encode(samples[1]).ids])
    with torch.no_grad():
        whole = model.module.model(input_ids=ids, output_hidden_states=True).hidden_states
    del whole
    alone = hidden_features(model, samples[1:2])
    assert alone[0] == pytest.approx(features[1], abs=1e-6)  # what stands beside it plays no part
    many = np.concatenate([features + 0.01 * k for k in range(8)])
    one = fit(many, [k % 3 == 0 for k in range(24)], folds=3, name="hidden of tiny")
    assert (one.probabilities(many)[0::3] > one.probabilities(many)[1::3]).all()
    one.save(tmp_path / "c")
    with pytest.raises(DataError, match="reads 'hidden of tiny'"):
        Complexity.load(tmp_path / "c").predict(words)


def test_scores_by_hand():
    assert brier_score([0.0, 1.0, 0.5, 0.5], [False, True, True, False]) == 0.125
    with pytest.raises(ValueError, match="no outcome"):
        brier_score([], [])
    table = reliability([0.05, 0.05, 0.95, 1.0, 0.5], [False, True, True, True, False], bins=10)
    counts = [one.count for one in table]
    assert counts == [2, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert (table[0].predicted, table[0].observed) == (0.05, 0.5)
    assert table[9].predicted == pytest.approx(0.975)
    assert table[1].observed is None


def test_features_are_finite_and_of_one_width_for_any_prompt():
    features = text_features(["", "7", "Ünïcode 漢字!", "a" * 10_000])
    assert features.shape == (4, 7 + HASHED)
    assert np.isfinite(features).all()
    assert not features[0].any()
