"""What tests of layouts share: a run under torchrun, and the comparison of two runs' losses."""

import json
import os
import subprocess
import sys

import pytest
import torch

STEPS = 20


def losses_of(folder):
    """Every loss of each step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [[v for k, v in json.loads(line).items() if k.startswith("loss")] for line in lines]


@pytest.fixture
def losses():
    return losses_of


@pytest.fixture
def assert_same():
    """That two runs of 20 steps had the same losses to 1e-5."""

    def check(found, expected):
        assert len(found) == len(expected) == STEPS
        for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            assert mine == pytest.approx(theirs, abs=1e-5), f"step {step + 1}"

    return check


@pytest.fixture
def torchrun():
    """Runs a recipe on two processes."""

    if torch.cuda.device_count() == 1:
        pytest.skip("two processes need two GPUs, or none")

    def start(recipe, out, *more):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--standalone", "-m", "limbeck", "run", str(recipe), "--out", str(out), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    return start
