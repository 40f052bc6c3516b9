"""A process that is killed while it saves leaves the old adapter or the new one, and never a mixture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*arguments: object) -> dict[str, int]:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(HERE / "killed_saves.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_at_every_step(tmp_path):
    seen = run(tmp_path, "steps")
    assert seen["steps"] > 40
    assert seen["half"] > 4  # the dangerous moments were among them
    assert min(seen["one"], seen["two"]) > 10


@pytest.mark.parametrize("trials", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, trials):
    seen = run(tmp_path, "random", trials, 1)
    assert seen["one"] + seen["two"] == trials


@pytest.mark.slow
def test_every_process_of_a_job_saves(tmp_path):
    assert run(tmp_path, "together") == {"failed": 0, "left": 0}
