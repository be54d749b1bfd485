"""Does a prompt need reasoning? A small calibrated classifier, and how good its probabilities are.

    p(x) = mean over folds k of sigmoid(a_k (w_k . f(x) + b_k) + c_k)

with f(x) the prompt's features, w and b of a logistic regression on all folds but k, and a and c of
Platt's calibration on fold k. scikit-learn fits it; to predict, the numbers alone are enough.
"""

import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.core.errors import DataError, LimbeckError, ModelError
from limbeck.core.files import new_folder, write_json
from limbeck.core.protocols import Reader
from limbeck.core.types import Sample, Turn
from limbeck.synth.sentences import sentences
from limbeck.synth.verdicts import plain

Floats = NDArray[np.float64]
Features = Callable[[Sequence[str]], Floats]

COUNTED, HASHED = 7, 512
"""Columns of sizes and shares, and columns in which words and pairs of words are counted."""

FORMAT = 1
_WORDS = re.compile(r"\w+|[^\w\s]")
_DIGIT = re.compile(r"\d")
_NUMBERS = re.compile(r"\d+(?:[.,]\d+)*")


def text_features(prompts: Sequence[str]) -> Floats:
    """[n, 7 + 512] what can be seen of prompts without a model.

    Logarithms of characters, words, sentences, numbers and different words; the shares of digits
    and of upper-case letters; then counts of words and of pairs of words, hashed with a sign and
    scaled to length 1, in which all digits are one.
    """
    return np.stack([_features(prompt) for prompt in prompts]) if prompts else np.empty((0, 0))


def _features(prompt: str) -> Floats:
    words: list[str] = _WORDS.findall(_DIGIT.sub("0", prompt.lower()))
    size = max(1, len(prompt))
    counts = (
        len(prompt),
        len(words),
        len(sentences(prompt)),
        len(_NUMBERS.findall(prompt)),
        len(set(words)),
    )
    shares = (
        sum(character.isdigit() for character in prompt) / size,
        sum(character.isupper() for character in prompt) / size,
    )
    hashed = np.zeros(HASHED)
    pairs = (f"{a} {b}" for a, b in zip(words, words[1:], strict=False))
    for gram in (*words, *pairs):
        code = zlib.crc32(gram.encode())  # the same on every machine and in every process
        hashed[code % HASHED] += 1 if code >> 31 else -1
    norm = float(np.linalg.norm(hashed))
    return np.concatenate([np.log1p(counts), shares, hashed / (norm or 1.0)])


def hidden_features(reader: Reader, samples: Sequence[Sample], site: str = "-1") -> Floats:
    """[n, d] the mean hidden state of each prompt under a model, as features of its own.

    Args:
        reader: a model that offers `hidden`.
        samples: of which the prompts are read, as plain text: a chat template has no place for a
            conversation of which the user's words are what is to be written.
        site: where in the network; see `core.types.Needs`.
    """
    found: list[Floats] = []
    for sample in samples:
        text = Turn(text=plain(sample.prompt), learn=True)
        view = reader.collate([reader.encode(Sample(id=sample.id, turns=(text,)))])
        with torch.no_grad():
            said = reader.read(view, frozenset({f"hidden:{site}"}))
        found.append(said.hidden[site].double().mean(0).cpu().numpy())
    return np.stack(found)


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """A fitted classifier; see the module for k folds and d features.

    Attributes:
        mean, scale: [d] what features are brought to the same size with.
        weight: [k, d], and bias [k], of the regressions.
        slope, shift: [k] of the calibrations.
        features: what the features are, `text` or a name of your own.
    """

    mean: Floats
    scale: Floats
    weight: Floats
    bias: Floats
    slope: Floats
    shift: Floats
    features: str = "text"

    def probabilities(self, features: Floats) -> Floats:
        """[n] that reasoning helps, of features [n, d]."""
        scaled = (features - self.mean) / self.scale
        margin = scaled @ self.weight.T + self.bias
        raised = self.slope * margin + self.shift
        return (0.5 * (1 + np.tanh(raised / 2))).mean(1)  # a sigmoid that cannot overflow

    def predict(self, prompts: Sequence[str]) -> Floats:
        """[n] that reasoning helps with these prompts.

        Raises:
            DataError: it was fitted on other features than those of text.
        """
        if self.features != "text":
            raise DataError(
                f"this classifier reads {self.features!r}; give those to `probabilities`"
            )
        if not prompts:
            return np.empty(0)
        return self.probabilities(text_features(prompts))

    def save(self, folder: Path) -> None:
        """Write it as safetensors and JSON; an older folder of this name is replaced."""
        from safetensors.numpy import save_file

        with new_folder(folder) as aside:
            names = ("mean", "scale", "weight", "bias", "slope", "shift")
            arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in names}
            save_file(arrays, aside / "complexity.safetensors")
            write_json(aside / "complexity.json", {"format": FORMAT, "features": self.features})

    @classmethod
    def load(cls, folder: Path) -> "Complexity":
        """Read what `save` wrote.

        Raises:
            ModelError: it is not there or not one of ours.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            about: Any = json.loads((folder / "complexity.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / "complexity.safetensors")
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']} is not {FORMAT}")
            return cls(**arrays, features=str(about["features"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(f"{folder} holds no complexity classifier: {error}") from error


def fit(
    features: Floats,
    helps: Sequence[bool],
    *,
    folds: int = 5,
    strength: float = 0.01,
    seed: int = 0,
    name: str = "text",
) -> Complexity:
    """Fit a classifier on labelled prompts.

    Args:
        features: [n, d], such as `text_features(prompts)`.
        helps: of each prompt, whether it was answered right only with reasoning.
        folds: of the calibration.
        strength: of the regression's data beside its penalty (C in scikit-learn).
        seed: of the folds.
        name: what the features are.

    Raises:
        DataError: one of both answers is rarer than there are folds.
        LimbeckError: scikit-learn is not installed.
    """
    try:
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise LimbeckError(
            "to fit a classifier, scikit-learn is needed: pip install 'limbeck[synth]'"
        ) from error
    labels = np.asarray(helps, dtype=np.int64)
    rarer = int(min(labels.sum(), len(labels) - labels.sum()))
    if rarer < folds:
        raise DataError(
            f"{len(labels)} prompts hold only {rarer} of the rarer answer, and {folds} folds need"
            " one each; give more prompts or fewer folds"
        )
    mean, scale = features.mean(0), features.std(0)
    if name == "text":  # each by itself, a word that was met once would count as much as any
        scale[COUNTED:] = np.sqrt((scale[COUNTED:] ** 2).mean())
    scale = np.where(scale > 0, scale, 1.0)
    fitted: Any = CalibratedClassifierCV(
        LogisticRegression(C=strength, max_iter=2000),
        method="sigmoid",
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    ).fit((features - mean) / scale, labels)
    parts = [(one.estimator, one.calibrators[0]) for one in fitted.calibrated_classifiers_]
    return Complexity(
        mean=mean,
        scale=scale,
        weight=np.stack([regression.coef_[0] for regression, _ in parts]).astype(np.float64),
        bias=np.array([float(regression.intercept_[0]) for regression, _ in parts]),
        # scikit-learn's calibration is sigmoid(-(a f + b)).
        slope=np.array([-float(calibrator.a_) for _, calibrator in parts]),
        shift=np.array([-float(calibrator.b_) for _, calibrator in parts]),
        features=name,
    )


def brier_score(probabilities: Sequence[float] | Floats, outcomes: Sequence[bool]) -> float:
    """mean of (p - y)^2: 0 where all is foreseen, 1/4 for a coin.

    Source: Brier, "Verification of forecasts expressed in terms of probability" (1950).

    >>> brier_score([1.0, 0.5], [True, False])
    0.125
    """
    if not len(outcomes):
        raise ValueError("no outcome, no score")
    pairs = zip(probabilities, outcomes, strict=True)
    return math.fsum((float(p) - bool(y)) ** 2 for p, y in pairs) / len(outcomes)


@dataclass(frozen=True, slots=True)
class Bin:
    """Of the prompts with probabilities from `low` to `high`: how many, their mean, what was so."""

    low: float
    high: float
    count: int
    predicted: float | None
    observed: float | None


def reliability(
    probabilities: Sequence[float] | Floats, outcomes: Sequence[bool], bins: int = 10
) -> list[Bin]:
    """What became of prompts by the probability they were given, in bins of equal width."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    place = np.minimum((p * bins).astype(np.int64), bins - 1)
    table: list[Bin] = []
    for index in range(bins):
        mine = place == index
        count = int(mine.sum())
        means = (float(p[mine].mean()), float(y[mine].mean())) if count else (None, None)
        table.append(Bin(index / bins, (index + 1) / bins, count, *means))
    return table
