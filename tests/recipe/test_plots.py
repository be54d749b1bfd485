"""Plots: drawn where there is data, readable as PNG, absent where there is none."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from limbeck.evals.score import Score
from limbeck.recipe.plots import draw, read_metrics
from limbeck.recipe.report import Arms, ModelFacts, Report


def write_metrics(
    path: Path,
    steps: int = 200,
    *,
    terms: tuple[str, ...] = ("forward_kl", "ce"),
    scale: float = 1.0,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for step in range(1, steps + 1):
        base = scale * (0.4 + 3 * math.exp(-step / 40) + 0.2 * math.sin(step * 1.7))
        line = {"step": step, "loss": base, "tokens": 16384, "seconds": 0.2}
        line |= {f"loss/{term}": base * (0.4 + 0.5 * i) for i, term in enumerate(terms)}
        if step % 20 == 0:
            line |= {"eval/kl_nats": base / 2, "eval/top1": 0.9 - base / 6}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")


def share(value: float) -> Score:
    interval = (max(0.0, value - 0.026), value + 0.026)
    return Score(value=value, n=1319, interval95=interval, better="higher", unit="share")


def example() -> Report:
    arms = Arms(
        teacher={"gsm": share(0.452)},
        before={"gsm": share(0.021), "top1": share(0.41)},
        after={"gsm": share(0.420), "top1": share(0.81)},
        control={"gsm": share(0.391), "top1": share(0.70)},
    )
    return Report(
        teacher=ModelFacts(name="big", parameters=494_032_768),
        student=ModelFacts(name="tiny", parameters=124_439_808),
        agreement=arms.agreement(),
        evals=arms.evals(),
    )


def test_all_plots(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl")
    write_metrics(tmp_path / "control" / "metrics.jsonl", terms=("ce",), scale=1.2)
    paths = draw(tmp_path, example(), tmp_path / "metrics.jsonl")
    assert [path.name for path in paths] == ["loss.png", "agreement.png", "quality_size.png"]
    for path in paths:
        content = path.read_bytes()
        assert path.parent == tmp_path / "plots"
        assert content.startswith(b"\x89PNG")
        assert int.from_bytes(content[16:20]) == 800  # pixels wide
        assert len(content) > 5000
    assert len(list((tmp_path / "plots").iterdir())) == 3
    assert "matplotlib.pyplot" not in sys.modules


def test_without_data_nothing_is_drawn(tmp_path: Path) -> None:
    assert draw(tmp_path, Report(), tmp_path / "metrics.jsonl") == []
    assert not (tmp_path / "plots").exists()


def test_quality_falls_back_to_top1(tmp_path: Path) -> None:
    report = replace(example(), evals={})
    names = [path.name for path in draw(tmp_path, report, tmp_path / "none")]
    assert names == ["quality_size.png"]


def test_quality_needs_a_size(tmp_path: Path) -> None:
    report = replace(example(), student=ModelFacts(name="tiny"))
    assert draw(tmp_path, report, tmp_path / "none") == []


def test_one_term_and_no_evaluations(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {i}, "loss": 1.0, "loss/ce": 1.0}}\n' for i in range(3)))
    assert [path.name for path in draw(tmp_path, Report(), file)] == ["loss.png"]


def test_a_term_may_have_steps_without_rows_or_none_with(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    losses = [{"loss/a": 1.0, "loss/b": 2.0 if i == 3 else None, "loss/c": None} for i in range(9)]
    lines = [{"step": i, "loss": 1.0, **found} for i, found in enumerate(losses)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [path.name for path in draw(tmp_path, Report(), file)] == ["loss.png"]


@pytest.mark.parametrize("last", ['{"step": 3, "lo', "", "[]", '{"loss": 1}'])
def test_metrics_of_a_crashed_and_resumed_run(tmp_path: Path, last: str) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 9}', '{"step": 2, "loss": NaN}', '{"step": 1, "loss": 5}', last]
    file.write_text("\n".join(lines))
    found = read_metrics(file)
    assert [line["step"] for line in found] == [1, 2]
    assert found[0]["loss"] == 5
