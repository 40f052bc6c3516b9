"""`make gpu`: the correctness suite compiled, every benchmark, the comparison, a profile and memory, on one card.

    python -m bench.gpu               all stages within LIMIT; those done on this card at this commit are not repeated
    python -m bench.gpu --all         without limits, the whole correctness suite
    python -m bench.gpu --rehearse    the same stages on the CPU and in Triton's interpreter, on the smallest shapes
    python -m bench.gpu --only ops --again

A stage is a process with a time limit of its own, and may use what the stages before it left. What came of it is in
bench/results/<device>/gpu.json, its output in <stage>.log there; after an error or a time-out the other stages run all
the same, and the next call begins with what is missing. Exit status: 0 where every stage has succeeded.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import LOADED, RESULTS, _version, device_name, folder_of

LIMIT = 470  # seconds for all: a call on a lent card has ten minutes
ROOT = Path(__file__).parents[1]
WORKERS = min(16, os.cpu_count() or 1)  # of pytest: the suite compiles more than it runs
SECONDS = "SECONDS"  # in a command: how long a stage may begin new work
GRACE = 8  # seconds between a stage's limit and its end by force
IMPORTS, LAST = 15, 15  # of a stage's seconds: before its first work, and for work that was begun
COMPARE = ["--seq-len", "2048", "--batch-size", "2", "--gradient-checkpointing"]  # the recipe that goals are set for


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]  # after the interpreter
    seconds: int  # at the most, and what others left
    everything: tuple[str, ...]  # in place of `command` with --all
    rehearsal: tuple[str, ...]  # with --rehearse


def compiled_tests() -> list[str]:
    """The files with tests for a GPU: others may import what is not on a lent machine (trl, datasets)."""
    files = (path for path in sorted((ROOT / "tests").rglob("test_*.py")))
    return [str(path.relative_to(ROOT)) for path in files if re.search(r"mark\.(kernel|gpu)\b", path.read_text())]


def stages(results: Path) -> tuple[Stage, ...]:
    model = _model()
    to = ("--results", str(results))
    suite = ("-m", "pytest", "-q", "-n", str(WORKERS), "-p", "no:cacheprovider", *compiled_tests(), "-m")
    tiny = ("--seq-len", "32", "--batch-size", "1", "--steps", "1", "--rank", "4", *to)
    return (
        Stage(
            "tests", (*suite, "(kernel or gpu) and not slow"), 150, (*suite, "kernel or gpu"),
            ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "kernel and not slow", "tests/test_glu.py"),
        ),
        Stage(
            "ops", ("-m", "bench.run", "--rounds", "11", "--seconds", SECONDS, "--missing", *to), 90,
            ("-m", "bench.run", *to),
            ("-m", "bench.run", "--rounds", "2", "--only", "layer_host", *to),
        ),
        Stage(
            "crossover",
            ("-m", "bench.crossover", "--rounds", "7", "--seconds", SECONDS, "--shapes", "4096x4096,14336x4096", *to),
            50,
            ("-m", "bench.crossover", *to), ("-m", "bench.crossover", "--rehearse", *to),
        ),
        Stage(
            "compare", ("-m", "bench.compare", "--model", model, *COMPARE, "--steps", "6", *to), 90,
            ("-m", "bench.compare", "--model", model, *COMPARE, *to),
            ("-m", "bench.compare", *tiny),
        ),
        Stage(
            "profile",
            ("-m", "bench.profile", "--model", "llama-3.2-1b", "--seq-len", "1024", "--profiled-steps", "3", *to), 45,
            ("-m", "bench.profile", "--model", model, *to),
            ("-m", "bench.profile", "--profiled-steps", "1", *tiny),
        ),
        Stage(
            "memory", ("-m", "bench.memory_try", "--model", "llama-3.2-1b", "--seconds", SECONDS, *to), 45,
            ("-m", "bench.memory_try", "--model", model, "--seconds", "600", *to),
            ("-m", "bench.memory_try", "--seconds", "5", "--only", "peft_fast, norms", *to),
        ),
    )  # fmt: skip


def _model() -> str:
    """To compare on: two libraries hold it at a time, and HF PEFT's activations."""
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return "llama-3-8b" if memory > 60 << 30 else "llama-3.2-1b"


class State:
    """What was done on a device, in a file beside its results; written after every stage, atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def is_done(self, name: str, run: dict[str, Any]) -> bool:
        """At this very commit: with changes that are not committed nothing is."""
        found = self.stages.get(name, {})
        if not run["sha"] or run["sha"].endswith("+") or found.get("status") != "done":
            return False
        return all(found.get(key) == value for key, value in run.items())

    def write(self, name: str, entry: dict[str, Any]) -> None:
        self.stages[name] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.stages, indent=1) + "\n")
        beside.replace(self.path)


def this_run(device: torch.device, kind: str) -> dict[str, Any]:
    versions = {name: _version(name) for name in ("triton", "bitsandbytes", "peft", "transformers")}
    return {"sha": LOADED, "device": device_name(device), "kind": kind, "torch": torch.__version__, **versions}


def run_stage(command: tuple[str, ...], seconds: float, log: Path, rehearse: bool) -> tuple[str, float]:
    """("done", "failed" or "timed out", seconds it took); its output is in `log`."""
    environment = {**os.environ, "PEFT_FAST_SHA": LOADED, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if rehearse and {"pytest", "bench.crossover"} & set(command):
        environment["TRITON_INTERPRET"] = "1"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("w") as file, _heard(signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest says then which tests have failed so far
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return "timed out", time.perf_counter() - start
    finally:
        _end(process)
    return ("done" if code == 0 else "failed"), time.perf_counter() - start


@contextmanager
def _heard(number: signal.Signals) -> Iterator[None]:
    """What is started within hears this signal, even where we ignore it: that is inherited, and `make gpu &` in a
    script ignores SIGINT."""
    if signal.getsignal(number) is not signal.SIG_IGN:
        yield
        return
    signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_IGN)


def _end(process: subprocess.Popen) -> None:
    """It and what it has started and left: the group is the one that was made for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def seconds_for(stage: Stage, later: list[Stage], left: float) -> float:
    """Of `left`: what the stages after it do not need, or, where others took too much, no more than its own."""
    return max(min(stage.seconds, left), left - sum(other.seconds for other in later)) - GRACE


def filled(command: tuple[str, ...], seconds: float, again: bool) -> tuple[str, ...]:
    parts = (f"{max(1, seconds - IMPORTS - LAST):.0f}" if part == SECONDS else part for part in command)
    return tuple(part for part in parts if not (again and part == "--missing"))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in stages(RESULTS)]
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, to see that every stage runs")
    parser.add_argument("--all", action="store_true", help="everything, without limits of time")
    parser.add_argument("--only", default="", help=f"some of {', '.join(names)}, with commas between")
    parser.add_argument("--again", action="store_true", help="stages that are done too")
    parser.add_argument("--results", type=Path, default=None, help="default: bench/results; a rehearsal's: a temporary")
    given = parser.parse_args(arguments)
    given.only = [name for name in given.only.split(",") if name] or names
    if unknown := [name for name in given.only if name not in names]:
        parser.error(f"--only must name some of {', '.join(names)}, got {', '.join(unknown)}")
    if given.rehearse and given.all:
        parser.error("--rehearse has the smallest of everything, --all the most: give one of them")
    if given.results is None:
        given.results = Path("/tmp/peft_fast_rehearsal") if given.rehearse else RESULTS
    return given


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    if not given.rehearse and not torch.cuda.is_available():
        print(
            "make gpu needs a GPU, and there is none here; ARGS=--rehearse runs every stage on the CPU", file=sys.stderr
        )
        return 2
    device = torch.device("cpu" if given.rehearse else "cuda")
    if not LOADED or LOADED.endswith("+"):
        print(f"nothing done now will count as done: {'uncommitted changes' if LOADED else 'no commit known'}; commit "
              "first, or name a copy without git by PEFT_FAST_SHA", file=sys.stderr)  # fmt: skip
    kind = "rehearsal" if given.rehearse else "all" if given.all else "budget"
    folder, run = folder_of(device, given.results), this_run(device, kind)
    state, begin, statuses = State(folder / "gpu.json"), time.perf_counter(), []
    wanted = [stage for stage in stages(given.results) if stage.name in given.only]
    ahead = [stage for stage in wanted if given.again or not state.is_done(stage.name, run)]
    for stage in wanted:
        if state.is_done(stage.name, run) and not given.again:
            print(f"{stage.name:10} done before, at {run['sha']}", flush=True)
            statuses.append("done")
            continue
        command = stage.rehearsal if given.rehearse else stage.everything if given.all else stage.command
        ahead.remove(stage)
        left = LIMIT - (time.perf_counter() - begin)
        seconds = seconds_for(stage, ahead, left) if kind == "budget" else 7200
        command = filled(command, seconds, given.again)
        if seconds < 5:
            status, took = "no time left", 0.0
        else:
            status, took = run_stage(command, seconds, folder / f"{stage.name}.log", given.rehearse)
        today = datetime.date.today().isoformat()
        state.write(stage.name, {**run, "status": status, "seconds": round(took, 1), "date": today})
        print(f"{stage.name:10} {status} after {took:.0f} s: {folder / f'{stage.name}.log'}", flush=True)
        if status not in ("done", "no time left"):  # which has no log
            print("\n".join((folder / f"{stage.name}.log").read_text().splitlines()[-12:]), flush=True)
        statuses.append(status)
    print(f"results in {folder}; python -m bench.readme puts them into the README")
    return 0 if all(status == "done" for status in statuses) else 1


if __name__ == "__main__":
    # By default it would end this process alone and leave a stage on the card, which is in a session of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
