"""Adapters that are broken or hostile: see damage.py for what is wrong with them.

Whatever is in a folder, loading it raises an error of our own that says what is wrong, or does what peft does too. It
does not hang, runs no code, takes no memory to speak of, and after an error no file and no weight is different.
"""

import hashlib
import os
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fast
from peft_fast import LoraConfig, PeftModel, get_peft_model

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
import damage_configs
import damage_folders
import damage_pickles
import damage_weights
from damage import EITHER, KINDS, LOADS, REFUSED, Case

ERRORS = (ValueError, TypeError, NotImplementedError)
OURS = str(Path(peft_fast.__file__).parent)
SECONDS, MEGABYTES = 20, 400
KINDS_IN = (damage_weights, damage_pickles, damage_configs, damage_folders)  # importing them fills KINDS
ALL = [(kind, number, case) for kind, make in KINDS.items() for number, case in enumerate(make(Random(kind)))]


def base() -> LlamaForCausalLM:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    model = with_an_adapter()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def with_an_adapter() -> PeftModel:
    return get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """The same two for all cases, as each has to leave them as they were; those that an adapter got into are new."""
    return {"plain": base(), "adapted": with_an_adapter()}


def fingerprint(model: nn.Module) -> str:
    """Of every module, its attributes' names and flags, and every weight's bits and flag."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, list, tuple))}
        digest.update(f"{path} {id(module)} {type(module)} {sorted(vars(module))} {attributes}".encode())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {id(value)} {value.requires_grad}".encode())
        digest.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(repr(getattr(model, "peft_config", None)).encode())
    return digest.hexdigest()


def files(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "file" if path.is_file() else "other"
        content = os.readlink(path).encode() if kind == "link" else path.read_bytes() if kind == "file" else b""
        found[f"{kind} {path}"] = hashlib.sha256(content).hexdigest()
    return found


@contextmanager
def limited() -> Iterator[None]:
    """Fails a block that takes too long, or too much memory."""

    def stop(*_: object) -> None:
        pytest.fail(f"took more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


def outcome(load, expected: str) -> Exception | None:
    """The error that `load` gives, after a look at whether it is the kind that was expected, and ours."""
    kind, _, warning = expected.partition(": ")
    raised: Exception | None = None
    with warnings.catch_warnings(record=True) as said, limited():
        warnings.simplefilter("always")
        try:
            load()
        except ERRORS as error:
            raised = error
    if raised is not None:
        assert kind in (REFUSED, EITHER), raised
        raised_in = traceback.extract_tb(raised.__traceback__)[-1].filename
        assert raised_in.startswith(OURS), f"{raised!r} comes from {raised_in}, and says nothing about the adapter"
        assert len(str(raised)) > 25
        return raised
    assert kind in (LOADS, EITHER), "it was loaded"
    if warning:
        assert any(warning in str(one.message) for one in said), [str(one.message) for one in said]
    return None


def parameters() -> list:
    """The first two cases of each kind are in the quick run."""
    marked = []
    for kind, number, case in ALL:
        quick = number < 2 and kind != "expressions_without_end"
        label = f"{kind}-{case[0]}".encode("ascii", "backslashreplace").decode()[:60]
        marked.append(pytest.param(case, id=f"{label}-{number}", marks=() if quick else pytest.mark.slow))
    return marked


@pytest.mark.parametrize("case", parameters())
def test_damaged(case: Case, good, models, tmp_path, monkeypatch):
    _, expected, change = case
    monkeypatch.setattr("peft_fast.tuners.slow_patterns.SECONDS", 1.0)
    folder, marker = tmp_path / "adapter", tmp_path / "marker"
    shutil.copytree(good, folder)
    change(folder, marker)
    plain, adapted = models["plain"], models["adapted"]
    before = files(folder), fingerprint(plain), fingerprint(adapted)

    loaded: list[PeftModel] = []
    if outcome(lambda: loaded.append(PeftModel.from_pretrained(plain, folder)), expected):
        assert fingerprint(plain) == before[1]
    else:
        assert weights(loaded[0].unload()) == weights(base())
        models["plain"] = base()
    if outcome(lambda: adapted.load_adapter(folder, "other"), expected.partition(":")[0]):
        assert fingerprint(adapted) == before[2]
    else:
        assert weights(adapted.unload()) == weights(base())
        models["adapted"] = with_an_adapter()
    assert files(folder) == before[0]
    assert not marker.exists()


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in model.state_dict().items()}


def test_there_are_enough():
    assert len(KINDS) >= 25
    assert len(ALL) >= 500


def test_saving_over_a_damaged_adapter(good, tmp_path):
    """Whatever lies in the folder, the next save puts a good adapter there, and nothing outside of it is touched."""
    model = with_an_adapter()
    (tmp_path / "outside").write_text("mine")
    for _, _, (label, _, change) in [one for one in ALL if one[0] in ("forged_notes_of_saves", "cut_configs")]:
        folder = tmp_path / "adapter"
        shutil.copytree(good, folder)
        change(folder, tmp_path / "marker")
        model.save_pretrained(folder)
        assert type(PeftModel.from_pretrained(base(), folder)) is type(model), label
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "outside"]
        shutil.rmtree(folder)
    assert (tmp_path / "outside").read_text() == "mine"
