"""The profile: written once, of few steps, with sums that add up; absent when it is off."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import record_function

from limbeck.recipe.run import run
from limbeck.train.loop import Step
from limbeck.train.phases import phase
from limbeck.train.profile import OPERATORS, PHASES, Profile, time_table


def rows(table, title):
    """{name: (milliseconds, share)} of the part whose first column is `title`."""
    part = table.split(f"| {title} |")[1].split("\n\n")[0]
    cells = [line.strip("| ").split(" | ") for line in part.splitlines()[2:]]
    return {
        cell[0]: (float(cell[1].replace(",", "")), float(cell[2].rstrip("%")) / 100)
        for cell in cells
    }


def test_a_run_says_where_the_time_goes(make_recipe, tmp_path):
    run(make_recipe({"profile": True}), tmp_path / "a")
    folder = tmp_path / "a" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["table.md", "trace.json"]
    table = (folder / "table.md").read_text()
    total = float(re.search(r"3 steps, ([\d,.]+) ms each", table)[1].replace(",", ""))
    phases = rows(table, "phase")
    assert set(phases) == {*PHASES.values(), "rest"}
    assert sum(time for time, _ in phases.values()) == pytest.approx(total, abs=0.1)
    assert sum(share for _, share in phases.values()) == pytest.approx(1, abs=0.005)
    assert all(time > 0 for time, _ in phases.values())
    operators = rows(table, "operator")
    assert len(operators) == OPERATORS
    assert "`aten::mm`" in operators
    assert list(operators.values()) == sorted(operators.values(), reverse=True)

    trace = (folder / "trace.json").read_text()
    assert str(tmp_path) not in trace
    written = json.loads(trace)
    # Not every version of torch writes these; where they stand they are empty.
    assert {written.get(key, "") for key in ("host_name", "traceName")} == {""}
    events = written["traceEvents"]
    # A GPU's time line says each range once more.
    names = [event.get("name") for event in events if event.get("cat") != "gpu_user_annotation"]
    assert names.count("limbeck.step") == 3
    for name in PHASES:
        assert names.count(name) >= 3, name


def test_off_writes_nothing_and_changes_nothing(make_recipe, tmp_path):
    seen = {}
    for on in (True, False):
        run(make_recipe({"profile": on}), tmp_path / str(on))
        lines = (tmp_path / str(on) / "metrics.jsonl").read_text().splitlines()
        seen[on] = [json.loads(line)["loss"] for line in lines]
        assert (tmp_path / str(on) / "profile").exists() == on
    assert seen[True] == seen[False]


@pytest.mark.parametrize(("steps", "traced"), [(2, 1), (3, 2), (4, 3), (5, 3), (9, 3)])
def test_a_short_run_is_traced_as_far_as_it_goes(steps, traced, tmp_path):
    profile = Profile(tmp_path / "profile", steps)
    with profile:
        for number in range(1, steps + 1):
            with record_function("limbeck.step"):
                torch.ones(8, 8).mm(torch.ones(8, 8))
            torch.ones(8).cos()  # what a listener does
            profile.on_step(Step(number, steps))
    table = (tmp_path / "profile" / "table.md").read_text()
    assert f"{traced} steps, " in table
    assert "`aten::mm`" in rows(table, "operator")
    assert "`aten::cos`" not in rows(table, "operator")


def interrupted(folder, before):
    """A run of nine steps that is interrupted in step `before`."""
    with Profile(folder, 9) as profile:
        for step in range(1, before + 1):
            with record_function("limbeck.step"):
                torch.ones(8).sum()
                if step == before:
                    raise KeyboardInterrupt
            profile.on_step(Step(step, 9))


def test_an_interrupted_run_leaves_a_whole_profile_or_none(tmp_path):
    for before in range(1, 8):
        with pytest.raises(KeyboardInterrupt):
            interrupted(tmp_path / str(before), before)
    found = [before for before in range(1, 8) if (tmp_path / str(before)).exists()]
    assert found == [3, 4, 5, 6, 7]
    for before in found:
        files = sorted(path.name for path in (tmp_path / str(before)).iterdir())
        assert files == ["table.md", "trace.json"]
    assert not list(tmp_path.glob(".*"))


def test_a_run_of_one_step_has_no_profile(tmp_path):
    for steps in (0, 1):
        with Profile(tmp_path / "profile", steps) as profile:
            for step in range(steps):
                with record_function("limbeck.step"):
                    torch.ones(8).sum()
                profile.on_step(Step(step, steps))
        assert not (tmp_path / "profile").exists()


def event(name, start, end, *, thread=1, own=0.0, device="CPU"):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name,
        time_range=span,
        thread=thread,
        self_cpu_time_total=own,
        self_device_time_total=0.0 if device == "CPU" else own,
        device_type=SimpleNamespace(name=device),
    )


def test_a_phase_inside_another_counts_once():
    table = time_table(
        [
            event("limbeck.step", 0, 10_000),
            event("limbeck.student", 1_000, 6_000),
            event("limbeck.loss", 4_000, 6_000),
            event("limbeck.backward", 6_000, 9_000),
            event("limbeck.prepare", 0, 9_000, thread=2),  # beside the step, not in it
            event("limbeck.teacher", 20_000, 30_000),  # an evaluation
            event("a", 1_000, 2_000, own=700.0),
            event("b", 3_000, 4_000, own=300.0),
            event("c", 20_000, 21_000, own=900.0),
        ]
    )
    assert rows(table, "phase") == {
        "student forward": (3.0, 0.3),
        "head and loss": (2.0, 0.2),
        "backward": (3.0, 0.3),
        "rest": (2.0, 0.2),
    }
    assert rows(table, "operator") == {"`a`": (0.7, 0.7), "`b`": (0.3, 0.3)}
    assert "on the host" in table


def test_on_a_device_operators_are_told_by_the_time_of_their_kernels():
    kernel = event("kernel", 2_000, 2_500, own=500.0, device="CUDA")
    operator = event("a", 1_000, 1_100, own=100.0)
    operator.self_device_time_total = 500.0
    table = time_table([event("limbeck.step", 0, 10_000), operator, kernel])
    assert rows(table, "operator") == {"`a`": (0.5, 1.0)}
    assert "waits for the device" in table
    assert "alone, on the device" in table


def test_a_phase_is_a_range_only_while_somebody_traces():
    made = []

    @phase("limbeck.made")
    def make(value):
        made.append(torch.autograd.profiler._is_profiler_enabled)
        with phase("limbeck.inside"):
            return value

    assert make(1) == 1
    with torch.profiler.profile(acc_events=True) as traced:
        assert make(2) == 2
        with pytest.raises(ZeroDivisionError), phase("limbeck.broken"):
            raise ZeroDivisionError
    assert make(3) == 3
    assert made == [False, True, False]
    names = [event.name for event in traced.events() if event.name.startswith("limbeck")]
    assert sorted(names) == ["limbeck.broken", "limbeck.inside", "limbeck.made"]
