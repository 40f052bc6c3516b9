"""Run by test_killed.py in a process of its own: saves adapters in children that are killed, and looks at what is left.

    python killed_saves.py FOLDER random TRIALS SEED     at a random moment of a loop of saves
    python killed_saves.py FOLDER steps                  before and after every single step of a save on the disk
    python killed_saves.py FOLDER together               nobody is killed, and three save the same at a time

Prints one line of JSON: how often each adapter was found, and in how many cases the moves were half done.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peft_fast.files
from peft_fast import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

# As different as adapters of one model get: rank, scale, targets and the format of the file.
OPTIONS: dict[str, dict[str, Any]] = {
    "one": {"r": 2, "lora_alpha": 4, "target_modules": ["0"]},
    "two": {"r": 5, "lora_alpha": 1, "target_modules": ["0", "1"]},
}
SAFE = {"one": True, "two": False}
STEPS = [(os, "replace"), (os, "link"), (os, "fsync"), (pathlib.Path, "unlink"), (torch, "save"), (Path, "write_text")]


def base() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))


def adapters() -> dict[str, PeftModel]:
    made = {}
    for name, options in OPTIONS.items():
        torch.manual_seed(len(made))
        made[name] = get_peft_model(base(), LoraConfig(**options, init_lora_weights=False))
    return made


def save(models: dict[str, PeftModel], name: str, folder: Path) -> None:
    models[name].save_pretrained(folder, safe_serialization=SAFE[name])


def found(models: dict[str, PeftModel], folder: Path) -> str:
    """Which adapter is in the folder: completely, or this raises."""
    read = PeftModel.from_pretrained(base(), folder)
    config = read.peft_config["default"]
    name = next(n for n, o in OPTIONS.items() if o["r"] == config.r)
    assert (config.lora_alpha, config.target_modules) == (
        OPTIONS[name]["lora_alpha"],
        set(OPTIONS[name]["target_modules"]),
    )
    state = get_peft_model_state_dict(models[name])
    loaded = get_peft_model_state_dict(read)
    assert state.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in state.items())
    return name


def in_a_child(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - a child must never get back into the parent's code
            print(f"the child failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    return pid


def killed_at_random(folder: Path, trials: int, seed: int) -> dict[str, int]:
    rng, models = random.Random(seed), adapters()
    save(models, "one", folder)
    seen = {"one": 0, "two": 0, "half": 0}

    def forever() -> None:
        while True:
            for name in ("two", "one"):
                save(models, name, folder)

    for _ in range(trials):
        pid = in_a_child(forever)
        time.sleep(rng.uniform(0.001, 0.06))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        seen["half"] += any(folder.glob(f"{peft_fast.files.NOTE}*"))
        seen[found(models, folder)] += 1
    return seen


def killed_at_step(number: int, after: bool) -> None:
    """This process dies at the number-th step that touches the disk, before it or after it."""
    count = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            mine = count == number
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for owner, name in STEPS:
        setattr(owner, name, dying(getattr(owner, name)))


def killed_at_every_step(folder: Path) -> dict[str, int]:
    models = adapters()
    seen = {"one": 0, "two": 0, "half": 0, "steps": 0}
    for old, new in (("one", "two"), ("two", "one")):
        for after in (False, True):
            number = status = 0
            while number == 0 or status != 0:
                number += 1
                save(models, old, folder)
                assert found(models, folder) == old

                def work(number: int = number, after: bool = after, new: str = new) -> None:
                    killed_at_step(number, after)
                    save(models, new, folder)

                pid = in_a_child(work)
                _, status = os.waitpid(pid, 0)
                assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
                seen["half"] += any(folder.glob(f"{peft_fast.files.NOTE}*"))
                seen[found(models, folder)] += 1
                seen["steps"] += 1
            assert found(models, folder) == new
    peft_fast.files.STALE = 0  # as if an hour had passed
    save(models, "one", folder)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    return seen


def together(folder: Path) -> dict[str, int]:
    """As where is_main_process is forgotten: the same adapter by all, over another one."""
    models, failed = adapters(), 0
    for number in range(24):
        old, new = ("one", "two") if number % 2 else ("two", "one")
        save(models, old, folder)
        children = [in_a_child(lambda new=new: save(models, new, folder)) for _ in range(3)]
        failed += sum(os.waitpid(pid, 0)[1] != 0 for pid in children)
        assert found(models, folder) == new
    return {"failed": failed, "left": len(list(folder.glob(f"{peft_fast.files.NOTE}*")))}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if sys.argv[2] == "random":
        print(json.dumps(killed_at_random(place, int(sys.argv[3]), int(sys.argv[4]))))
    elif sys.argv[2] == "together":
        print(json.dumps(together(place)))
    else:
        print(json.dumps(killed_at_every_step(place)))
