"""The report: what it computes, what stays null, how it is written, and what the page says."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from limbeck.core.errors import DataError
from limbeck.evals.score import Score
from limbeck.recipe.report import (
    AgreementFigures,
    Arms,
    Cost,
    EvalFigures,
    ModelFacts,
    Report,
    Speed,
    TrainFigures,
    make_report,
    versions,
)
from limbeck.recipe.schema import Price


def share(value: float, reach: float = 0.02, n: int = 1319) -> Score:
    interval = (value - reach, value + reach)
    return Score(value=value, n=n, interval95=interval, better="higher", unit="share")


def low(value: float, unit: str, reach: float = 0.01) -> Score:
    interval = (value - reach, value + reach)
    return Score(value=value, n=9000, interval95=interval, better="lower", unit=unit)


def example(*, control: bool = True) -> Report:
    def student(gsm: float, kl: float, top1: float, perplexity: float) -> dict[str, Score]:
        return {
            "kl_nats": low(kl, "nats/token"),
            "top1": share(top1, n=9000),
            "perplexity": low(perplexity, "per token", 0.1),
            "gsm": share(gsm),
        }

    arms = Arms(
        teacher={"gsm": share(0.452), "perplexity": low(6.1, "per token", 0.1)},
        before=student(0.021, 1.92, 0.41, 15.2),
        after=student(0.420, 0.21, 0.81, 7.3),
        control=student(0.411, 0.55, 0.70, 7.2) if control else None,
    )
    speed = Speed.of(21.0, 65.1)
    return Report(
        recipe_sha256="ab" * 32,
        versions={"limbeck": "0.1.0", "torch": "2.13.0"},
        teacher=ModelFacts(name="org/big", parameters=494_032_768),
        student=ModelFacts(name="tiny", parameters=124_439_808),
        agreement=arms.agreement(),
        evals=arms.evals(),
        train=TrainFigures(
            steps=500,
            tokens=8_192_000,
            seconds=1800.0,
            tokens_per_second=4551.1,
            peak_memory_bytes=3 * 2**30,
            skipped_steps=2,
            truncated_tokens=1234,
            dropped_samples=0,
        ),
        speed=speed,
        cost=Cost.of(
            speed, teacher_usd_per_hour=2.0, student_usd_per_hour=0.5, training_seconds=1800.0
        ),
    )


def test_the_contract() -> None:
    """Keys that other programs rely on."""
    found = example().to_json()
    assert list(found) == [
        "recipe_sha256",
        "versions",
        "teacher",
        "student",
        "agreement",
        "evals",
        "train",
        "speed",
        "cost",
    ]
    assert found["teacher"] == {"name": "org/big", "parameters": 494_032_768}
    assert found["agreement"]["before"]["kl_nats"] == 1.92
    assert found["agreement"]["after"]["top1"] == 0.81
    assert found["agreement"]["control"]["n"] == 9000
    gsm = found["evals"]["gsm"]
    assert (gsm["teacher"], gsm["before"], gsm["after"], gsm["control"]) == (
        0.452,
        0.021,
        0.42,
        0.411,
    )
    assert gsm["retention"] == pytest.approx(0.42 / 0.452)
    assert gsm["n"] == 1319
    assert gsm["interval95"] == pytest.approx([0.4, 0.44])
    assert list(gsm["intervals"]) == ["teacher", "before", "control"]
    assert {"steps", "tokens", "seconds", "tokens_per_second", "peak_memory_bytes"} <= set(
        found["train"]
    )


def test_retention_only_where_higher_is_better() -> None:
    assert example().evals["perplexity"].retention is None
    assert EvalFigures.of({"teacher": share(0.0), "after": share(0.1)}).retention is None
    assert EvalFigures.of({"after": share(0.1)}).retention is None
    assert EvalFigures.of({"teacher": share(0.2)}).n is None


def test_cost_of_a_thousand_tokens() -> None:
    cost = example().cost
    assert cost.teacher_usd_per_1k_tokens == pytest.approx(2.0 / 3600 / 21.0 * 1000)
    assert cost.student_usd_per_1k_tokens == pytest.approx(0.5 / 3600 / 65.1 * 1000)
    assert cost.reduction == pytest.approx(1 - (0.5 / 65.1) / (2.0 / 21.0))
    assert cost.training_usd == pytest.approx(1.0)  # half an hour at the dearer price


def test_made_of_what_a_run_knows() -> None:
    state = SimpleNamespace(
        step=5, skipped=1, tokens=1000, positions=1250, seconds=4.0, unaligned=3
    )
    prices = Price(teacher_usd_per_hour=3.6, student_usd_per_hour=1.8)
    made: dict[str, Any] = {
        "recipe_sha256": "ab",
        "student": {"name": "tiny", "parameters": 10},
        "arms": Arms(after={"gsm": share(0.4)}),
        "preparation": SimpleNamespace(truncated_tokens=7, dropped_samples=2),
        "peak_memory_bytes": 99,
    }
    report = make_report(
        SimpleNamespace(price=prices),
        teacher={"name": "big", "parameters": 20},
        state=state,
        speeds={"teacher": 10.0, "student": 20.0},
        devices=2,
        **made,
    )
    assert report.train == TrainFigures(
        steps=5,
        tokens=1000,
        seconds=4.0,
        tokens_per_second=250.0,
        padding_share=pytest.approx(0.2),
        peak_memory_bytes=99,
        skipped_steps=1,
        truncated_tokens=7,
        dropped_samples=2,
        unaligned_samples=3,
    )
    assert report.speed.speedup == 2.0
    assert report.cost.reduction == pytest.approx(0.75)
    assert report.cost.training_usd == pytest.approx(3.6 / 3600 * 4 * 2)
    alone = make_report(
        SimpleNamespace(price=Price()),
        teacher=None,
        state=SimpleNamespace(step=0, skipped=0, tokens=0, positions=0, seconds=0.0, unaligned=0),
        speeds={"teacher": None, "student": 20.0},
        **made,
    )
    assert alone.teacher == ModelFacts()
    assert alone.cost == Cost()
    assert alone.train.tokens_per_second is None
    assert alone.train.padding_share is None


def test_what_was_not_measured_is_null() -> None:
    speed = Speed.of(None, 65.1)
    cost = Cost.of(speed, teacher_usd_per_hour=2.0, student_usd_per_hour=None, training_seconds=9.0)
    assert speed.speedup is None
    assert cost == Cost()
    empty = Report().to_json()
    assert empty["cost"] == dict.fromkeys(
        [
            *("teacher_usd_per_1k_tokens", "student_usd_per_1k_tokens", "reduction"),
            *("training_usd", "servers_usd"),
        ]
    )
    assert empty["agreement"]["control"] is None
    assert empty["agreement"]["before"]["kl_nats"] is None
    assert not empty["evals"]


def test_nan_is_never_written(tmp_path: Path) -> None:
    lost = Score(value=math.nan, n=3, interval95=(0.0, math.inf), better="lower", unit="nats")
    arms = Arms(after={"kl_nats": lost, "perplexity": lost})
    assert arms.agreement().after.kl_nats is None
    assert arms.evals()["perplexity"] == EvalFigures(n=3, better="lower", unit="nats")
    by_hand = EvalFigures(after=0.5, interval95=(0.1, math.nan))
    report = replace(
        Report(),
        evals={"a": by_hand},
        train=TrainFigures(seconds=math.inf),
        speed=Speed.of(math.nan, 1.0),
    )
    report.write(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["train"]["seconds"] is None
    assert found["evals"]["a"]["interval95"] is None
    assert "nan" not in (tmp_path / "report.md").read_text().lower()


@pytest.mark.parametrize("report", [example(), example(control=False), Report()])
def test_round_trip(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "run")
    assert Report.from_json(tmp_path / "run" / "report.json") == report


def test_later_keys_are_left_out(tmp_path: Path) -> None:
    found = example().to_json() | {"probes": {"a": 1}}
    (tmp_path / "r.json").write_text(json.dumps(found))
    assert Report.from_json(tmp_path / "r.json") == example()


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        Report.from_json(tmp_path / "none.json")
    for text in ("{", '{"train": {"steps": "many"}}', "[]"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(DataError, match="not a report"):
            Report.from_json(tmp_path / "r.json")


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example().write(tmp_path)
    before = (tmp_path / "report.json").read_text()

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        Report().write(tmp_path)
    assert (tmp_path / "report.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


PAGE = """\
# tiny, distilled from org/big

**tiny keeps 92.9% of org/big's score on gsm (42.0% of 45.2%), with 4 times fewer parameters \
(124 M; the teacher 494 M); it writes 3.1 times faster and costs 92% less a token.**

Did the teacher help? Against the same student, data and steps on hard labels alone:

- gsm: distilled 42.0% and labels only 41.1% are **not distinguishable at 95%**
- perplexity: distilled 7.30 and labels only 7.20 are **not distinguishable at 95%**, and the \
control is equal or better
- same top token as the teacher: distilled 81.0% is **better** than labels only 70.0%
- KL from the teacher: distilled 0.210 is **better** than labels only 0.550

## Quality

|  | teacher | student before | labels only | student after | kept | n |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| gsm (higher is better) | 45.2% [43.2, 47.2] | 2.1% [0.1, 4.1] | 41.1% [39.1, 43.1] | \
42.0% [40.0, 44.0] | 92.9% | 1,319 |
"""


def test_the_page() -> None:
    page = example().to_markdown(["plots/loss.png"])
    ordered = page.split("| perplexity")[0]
    assert ordered == PAGE
    for line in (
        "| perplexity, per token (lower is better) | 6.10 [6.00, 6.20] | 15.2 [15.1, 15.3] | "
        "7.20 [7.10, 7.30] | 7.30 [7.20, 7.40] | – | 9,000 |",
        "| parameters | 494 M | 124 M | 4 times fewer |",
        "| tokens per second | 21.0 | 65.1 | 3.1 times faster |",
        "| USD per 1,000 tokens | 0.0265 | 0.00213 | 92% less |",
        "| steps | 500 |",
        "| tokens | 8.19 M |",
        "| peak memory | 3.00 GiB |",
        "| cost, USD | 1.00 |",
        "- 2 steps were skipped: loss or gradient not finite.",
        "- 1,234 tokens were cut off: raise `max_length`.",
        "![loss](plots/loss.png)",
        "limbeck 0.1.0, torch 2.13.0",
    ):
        assert line in page.splitlines()
    assert "dropped" not in page


def test_the_page_says_where_distillation_did_harm() -> None:
    arms = Arms(before={"gsm": share(0.6)}, after={"gsm": share(0.3)}, control={"gsm": share(0.5)})
    page = Report(agreement=arms.agreement(), evals=arms.evals()).to_markdown()
    assert "distilled 30.0% is **worse** than labels only 50.0%" in page
    assert "- gsm is worse after training than before." in page


def test_the_page_without_control_has_no_verdict() -> None:
    page = example(control=False).to_markdown()
    assert "Did the teacher help" not in page
    assert "labels only" not in page


def test_the_page_of_a_larger_slower_dearer_student() -> None:
    report = replace(
        example(),
        teacher=ModelFacts(name="small", parameters=100),
        student=ModelFacts(name="large|x", parameters=250),
        speed=Speed.of(10.0, 5.0),
        cost=Cost(reduction=-0.5),
    )
    page = report.to_markdown()
    assert "2.5 times more parameters (250; the teacher 100)" in page
    assert "it writes 2 times slower and costs 50% more a token" in page
    assert page.startswith("# large\\|x, ")


def test_headlines_without_tasks() -> None:
    after = {"top1": share(0.812), "bits_per_byte": low(1.21, "bits/byte")}
    arms = Arms(after=after)
    student = ModelFacts(name="tiny")
    with_top1 = Report(
        agreement=arms.agreement(), evals=arms.evals(), student=student
    ).to_markdown()
    assert "**tiny finds the same next token most likely as its teacher in 81.2% of" in with_top1
    bits = Report(evals=arms.evals(), student=student).to_markdown()
    assert "**tiny predicts held-out text with 1.21 bits a byte.**" in bits
    assert "its quality was not measured" in Report().to_markdown()
    nothing = "the recipe has no `evals`, or none of them found anything to measure; the log says"
    assert nothing in Report().to_markdown()


def test_the_page_of_a_student_of_the_teachers_size() -> None:
    size = ModelFacts(name="same", parameters=1000)
    report = replace(example(), teacher=size, student=size, speed=Speed.of(100.0, 97.0))
    page = report.to_markdown()
    assert "with as many parameters (1,000; the teacher 1,000); it writes as fast" in page
    assert "| parameters | 1,000 | 1,000 | as many |" in page
    assert "| tokens per second | 100 | 97.0 | as fast |" in page
    assert "1 times" not in page


def test_written_page_embeds_the_plots_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "quality_size.png").touch()
    Report().write(tmp_path)
    assert "![quality size](plots/quality_size.png)" in (tmp_path / "report.md").read_text()


def test_agreement_keeps_its_intervals() -> None:
    figures = AgreementFigures.of({"top1": share(0.8)})
    assert figures.intervals == {"top1": (0.78, pytest.approx(0.82))}
    assert figures.kl_nats is None


def test_versions_name_no_machine() -> None:
    found = versions()
    assert {"python", "torch", "transformers", "platform"} <= set(found)
    assert os.uname().nodename not in json.dumps(found)
    assert "/" not in json.dumps(found)
