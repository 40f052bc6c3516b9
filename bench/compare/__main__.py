"""Put the libraries side by side: python -m bench.compare --model llama-3-8b --seq-len 2048 --batch-size 2

Each runs in a process of its own, with the same base weights, adapters and text. They take their steps in turn, so that
a machine that slows down slows all of them; the one that begins changes from step to step.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.harness import append, device_name, folder_of

from . import report
from .options import PROVIDERS, Options, parse, why_not


class Worker:
    """A process that trains with one library, a step at a time."""

    def __init__(self, provider: str, options: Options) -> None:
        given = json.dumps({"provider": provider, "options": options.as_dict()})
        command = [sys.executable, "-m", "bench.compare.worker", given]
        self.provider = provider
        # A pipe that nobody reads would stop it when it is full.
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `stop`)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self.process.wait()
            self.said.seek(0)
            said = self.said.read().strip().splitlines()[-15:]
            raise RuntimeError(f"{self.provider} ended with an error:\n" + "\n".join(said))
        return json.loads(line)

    def ask(self, command: str) -> dict[str, Any]:
        with suppress(BrokenPipeError):  # it has ended: `answer` says why
            print(command, file=self.process.stdin, flush=True)
        return self.answer()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.said.close()


def compare(options: Options, providers: list[str]) -> dict[str, dict[str, Any]]:
    """Of each: seconds and losses of every step, memory in MiB, the number of trained parameters."""
    workers: dict[str, Worker] = {}
    found: dict[str, dict[str, Any]] = {}
    try:
        for provider in providers:
            workers[provider] = Worker(provider, options)  # which import at the same time
        for provider in tqdm(providers, desc="loading", unit="library", disable=None):
            # One after the other: loading takes the most memory.
            found[provider] = {"seconds": [], "losses": [], **workers[provider].ask("load")}
        for number in tqdm(range(options.steps), desc="training", unit="step", disable=None):
            for i in range(len(providers)):
                provider = providers[(number + i) % len(providers)]
                step = workers[provider].ask("step")
                found[provider]["seconds"].append(step["seconds"])
                found[provider]["losses"].append(step["loss"])
        for provider in tqdm(providers, desc="measuring memory", unit="library", disable=None):
            found[provider] |= workers[provider].ask("memory")
    finally:
        for worker in workers.values():
            worker.stop()
    return found


def main() -> int:
    options, providers, results = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{options}\non {device_name(device)}")
    for provider in PROVIDERS:
        if provider not in providers and (reason := why_not(provider, options)):
            print(f"without {provider}: {reason}")
    try:
        found = compare(options, providers)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    rows = report.rows(options, found)
    print(f"\n{report.table(rows)}")
    folder = folder_of(device, results)
    append(rows, folder / "compare.csv")
    report.plot(rows, folder / "compare.png")
    print(f"\nrows appended to {folder / 'compare.csv'}, drawn in {folder / 'compare.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
