"""install_as_peft(): `import peft` gives peft_fast. Each case in a process of its own, most where peft is not there."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import peft
import pytest

import peft_fast
from peft_fast.integrations import stand_in

ROOT = Path(__file__).parents[2]
try:
    import trl  # noqa: F401

    HAS_TRL = True
except ImportError:
    HAS_TRL = False

with_trl = pytest.mark.skipif(not HAS_TRL, reason="TRL is not installed: pip install trl==1.16.0")


@pytest.fixture(scope="session")
def without_peft(tmp_path_factory) -> Path:
    """All that is installed here but peft: a folder of links, which stands in for site-packages."""
    folder = tmp_path_factory.mktemp("hidden") / "site-packages"  # by that name dill, which TRL uses, knows libraries
    folder.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name.partition("-")[0] != "peft" and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def run(without_peft, tmp_path):
    """Runs code; `peft`: with real peft installed."""

    def ran(code: str, *command: str, peft: bool = False, fails: bool = False, **env: str) -> str:
        script = tmp_path / "script.py"
        script.write_text(code)
        options = [] if peft else ["-S", "-s"]
        paths = [str(ROOT)] if peft else [str(ROOT), str(without_peft)]
        done = subprocess.run(
            [sys.executable, *options, *command, str(script)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **env},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert (done.returncode != 0) == fails, done.stderr[-3000:]
        return done.stderr if fails else done.stdout

    return ran


SURFACE = """
import importlib.metadata, importlib.util, sys
assert importlib.util.find_spec("peft") is None  # it is really hidden
assert not [one for one in importlib.metadata.distributions() if one.metadata["Name"] == "peft"]
import peft_fast
peft_fast.install_as_peft()
finders = list(sys.meta_path)
peft_fast.install_as_peft()
assert sys.meta_path == finders
import peft, peft.utils
import peft.tuners.lora as lora
from peft import (AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model,
    get_peft_model_state_dict, inject_adapter_in_model, prepare_model_for_kbit_training, set_peft_model_state_dict,
    PeftMixedModel, PrefixTuningConfig, PromptLearningConfig, LoKrConfig)
from peft.functional import delete_adapter
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, _get_submodules
from peft.utils.other import AuxiliaryTrainingWrapper, fsdp_auto_wrap_policy
assert PeftModel is peft_fast.PeftModel and LoraLayer is peft_fast.tuners.lora.LoraLayer and lora.LoraLayer is LoraLayer
assert importlib.metadata.version("peft") == peft.__version__ == "0.21.2"
assert importlib.util.find_spec("peft") is not None and importlib.util.find_spec("os") is not None
assert "LoraConfig" in dir(peft) and not hasattr(peft, "no_such_thing")
from transformers.utils import is_peft_available
from transformers.utils.peft_utils import check_peft_version
from accelerate.utils import is_peft_available as accelerate_says
assert is_peft_available() and accelerate_says()
check_peft_version(min_version="0.18.0")
import transformers.trainer, transformers.trainer_utils
assert transformers.trainer.PeftModel is PeftModel
print("all there")
"""
MISSING = """
import peft_fast
peft_fast.install_as_peft()
import peft
for statement in ("from peft import NoSuchConfig", "from peft.tuners import nosuch",
                  "import peft.tuners.nosuch.layer", "from peft.tuners.nosuch import Layer"):
    try:
        exec(statement)
    except ImportError as error:
        assert "peft_fast stands in for peft" in str(error) and "is not built in it" in str(error), error
        assert "pip install peft" in str(error)
    else:
        raise AssertionError(statement)
try:
    peft.NoSuchConfig
except AttributeError as error:
    assert "peft.NoSuchConfig is not built in it" in str(error)
from peft import PrefixTuningConfig
assert not isinstance(peft.LoraConfig(), PrefixTuningConfig)
if not hasattr(peft_fast, "PrefixTuningConfig"):
    try:
        PrefixTuningConfig(num_virtual_tokens=4)
    except NotImplementedError as error:
        assert "peft.PrefixTuningConfig is not built" in str(error)
print("clear")
"""
LATE = """
import transformers.trainer, transformers.trainer_utils
from transformers.utils import is_peft_available
assert not is_peft_available() and not hasattr(transformers.trainer, "PeftModel")
import peft_fast
peft_fast.install_as_peft()
assert is_peft_available() and transformers.trainer.PeftModel is peft_fast.PeftModel
assert transformers.trainer_utils.PeftMixedModel is not None
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
model = LlamaForCausalLM(LlamaConfig(**sizes))
made = peft_fast.get_peft_model(model, peft_fast.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
assert transformers.trainer_utils._is_peft_model(made) and made.__class__ is peft_fast.PeftModelForCausalLM
print("told")
"""
NATIVE = """
import peft_fast
peft_fast.install_as_peft()
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
model = LlamaForCausalLM(LlamaConfig(**sizes))
ids = torch.randint(0, 40, (2, 5))
plain = model(ids).logits
model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
changed = model(ids).logits
assert not torch.equal(plain, changed)
model.disable_adapters()
assert torch.equal(model(ids).logits, plain)
model.enable_adapters()
assert torch.equal(model(ids).logits, changed)
assert model.active_adapters() == ["default"]
print("native")
"""
LOADING = """
import sys, warnings
warnings.simplefilter("ignore")
import peft_fast
peft_fast.install_as_peft()
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
sys.path.insert(0, FOLDER)
import runs
ids = torch.arange(4, 14).view(1, 10)
runs.base(OUT + "/base")
def saved(name, **options):
    model = AutoModelForCausalLM.from_pretrained(OUT + "/base")
    options = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **options}
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(len(name))
    for key, parameter in made.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    made.save_pretrained(OUT + "/" + name)
    return made(input_ids=ids).logits
kinds = {"plain": {}, "second": {}, "larger": {"r": 8}, "dora": {"use_dora": True},
    "heads": {"modules_to_save": ["lm_head"]}, "tokens": {"trainable_token_indices": [5, 6]},
    "patterns": {"use_rslora": True, "rank_pattern": {"up_proj": 2}}}
logits = {name: saved(name, **options) for name, options in kinds.items()}
for name, expected in logits.items():
    model = runs.base().eval()
    info = model.load_adapter(OUT + "/" + name)
    assert not info.missing_keys and not info.unexpected_keys, (name, info)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5), name
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".lora_" in key)
model = runs.base().eval()
model.load_adapter(OUT + "/plain")
model.load_adapter(OUT + "/second", adapter_name="second", is_trainable=True)
for name, adapter in (("second", "second"), ("plain", "default")):
    model.set_adapter(adapter)
    assert torch.allclose(model(ids).logits, logits[name], atol=1e-5), name
assert len(model.get_adapter_state_dict("second")) == 8
model.delete_adapter("second")
assert list(model.peft_config) == ["default"]
model = runs.base().eval()
model.enable_peft_hotswap(target_rank=8)
model.load_adapter(OUT + "/plain", adapter_name="default")
model.load_adapter(OUT + "/second", adapter_name="default")
assert torch.allclose(model(ids).logits, logits["second"], atol=1e-5)
assert list(model.peft_config) == ["default"]
model = AutoModelForCausalLM.from_pretrained(OUT + "/plain").eval()
assert torch.allclose(model(ids).logits, logits["plain"], atol=1e-5)
model.save_pretrained(OUT + "/again")
model = runs.base().eval()
model.load_adapter(OUT + "/again")
assert torch.allclose(model(ids).logits, logits["plain"], atol=1e-5)
print("loaded")
"""
FIRST = """
import peft_fast
peft_fast.install_as_peft()
import peft
assert peft.PeftModel is peft_fast.PeftModel
import transformers.trainer
assert transformers.trainer.PeftModel is peft_fast.PeftModel
print("first")
"""
TRAIN = """
import sys
from pathlib import Path
if "late" in MODE:
    import trl, transformers.trainer
    import trl.trainer.sft_trainer, trl.trainer.dpo_trainer, trl.trainer.grpo_trainer
if "real" not in MODE:
    import peft_fast
    peft_fast.install_as_peft()
import datasets, peft, trl
sys.path.insert(0, FOLDER)
import runs
folder = Path(OUT)
common = {"output_dir": str(folder), "bf16": False, **runs.SETTINGS, "save_strategy": "steps", "save_steps": 2,
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
config = lambda: peft.LoraConfig(r=4, target_modules=runs.TARGETS, task_type="CAUSAL_LM")
texts = {"text": runs.TEXTS}
pairs = {"prompt": [t[:8] for t in runs.TEXTS], "chosen": [t[8:] for t in runs.TEXTS]}
pairs["rejected"] = [t[::-1] for t in pairs["chosen"]]
rewards = lambda completions, **_: [t.count("e") / (len(t) + 1) for t in completions]
def make(name):
    rows = texts if "sft" in name else pairs if name == "dpo" else {"prompt": pairs["prompt"]}
    data = datasets.Dataset.from_dict(rows)
    given = dict(train_dataset=data, eval_dataset=data, processing_class=runs.tokenizer())
    if name == "trainer":
        options = {key: value for key, value in common.items() if key != "output_dir"}
        return runs.trainer(peft.get_peft_model(runs.base(), config()), folder, **options)
    if name == "sft-model":
        model = peft.get_peft_model(runs.base(), config())
        return trl.SFTTrainer(model=model, args=trl.SFTConfig(max_length=32, **common), **given)
    given |= dict(model=runs.base(), peft_config=config())
    if name == "sft":
        return trl.SFTTrainer(args=trl.SFTConfig(max_length=32, **common), **given)
    if name == "dpo":
        return trl.DPOTrainer(args=trl.DPOConfig(max_length=32, **common), **given)
    arguments = trl.GRPOConfig(num_generations=2, max_completion_length=6, beta=0.1, **common)
    return trl.GRPOTrainer(args=arguments, reward_funcs=rewards, **given)
import torch
torch.manual_seed(5)
made = make(NAME)
made.train()
assert not (folder / "checkpoint-2" / "model.safetensors").exists()
assert (folder / "checkpoint-2" / "adapter_model.safetensors").exists()
losses = runs.losses(made)
evaluated = [row["eval_loss"] for row in made.state.log_history if "eval_loss" in row]
assert len(evaluated) == 2 and made.state.best_metric == min(evaluated), evaluated
if NAME != "grpo":  # whose evaluations draw other answers each time
    assert abs(made.evaluate()["eval_loss"] - min(evaluated)) < 1e-4, evaluated
ids = torch.arange(4, 20).view(2, 8)
made.save_model(str(folder / "saved"))
read = peft.PeftModel.from_pretrained(runs.base(), str(folder / "saved")).eval()
with torch.no_grad():
    difference = read(input_ids=ids).logits - made.model.eval()(input_ids=ids).logits
assert not (folder / "saved" / "model.safetensors").exists() and difference.abs().max() < 1e-5
torch.manual_seed(5)
again = make(NAME)
again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
assert runs.distance(losses, runs.losses(again)) < 1e-5, (losses, runs.losses(again))
print(type(made.model).__module__, *losses, *(evaluated if NAME != "grpo" else ()))
"""


def test_what_transformers_trl_and_accelerate_import_is_there(run):
    assert run(SURFACE) == "all there\n"


def test_what_is_missing_says_so(run):
    assert run(MISSING) == "clear\n"


@pytest.mark.slow
def test_libraries_that_were_imported_before_are_told(run):
    assert run(LATE).endswith("told\n")


@pytest.mark.slow
def test_transformers_own_methods_for_adapters(run):
    assert run(NATIVE) == "native\n"


@pytest.mark.slow
def test_transformers_own_load_adapter(run, tmp_path):
    """Every kind of weights that a file has, several adapters, swapping, and a folder of an adapter as a model's name.
    (Adapters of other ranks cannot be swapped in by transformers 5.23, with peft neither.)"""
    code = f"FOLDER, OUT = {str(Path(__file__).parent)!r}, {str(tmp_path)!r}\n{LOADING}"
    assert run(code).endswith("loaded\n")


def test_it_is_refused_once_real_peft_is_loaded():
    finders = list(sys.meta_path)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must come before the first `import peft`.*peft_fast.accelerate"):
            peft_fast.install_as_peft()
    assert sys.meta_path == finders
    assert sys.modules["peft"] is peft
    assert peft.PeftModel is not peft_fast.PeftModel


@pytest.mark.slow
def test_it_goes_before_a_real_peft_that_is_not_loaded(run):
    assert run(FIRST, peft=True) == "first\n"


@pytest.mark.slow
def test_the_environment_variable(run, monkeypatch):
    code = "import peft_fast, peft, sys; print(peft.PeftModel is peft_fast.PeftModel)"
    assert run(code, PEFT_FAST_AS_PEFT="1") == "True\n"
    for value in ("0", ""):
        monkeypatch.setenv(stand_in.VARIABLE, value)
        stand_in.install_if_asked()
        assert not stand_in.is_installed()
    monkeypatch.setenv(stand_in.VARIABLE, "yes")
    with pytest.raises(ValueError, match="PEFT_FAST_AS_PEFT must be 0 or 1, got 'yes'"):
        stand_in.install_if_asked()


def test_the_command(run, tmp_path):
    (tmp_path / "beside.py").write_text("name = 'beside'")
    code = "import beside, peft, sys; print(peft.LoraConfig.__module__, __name__, beside.name, len(sys.argv))"
    assert run(code, "-m", "peft_fast.as_peft") == "peft_fast.tuners.lora.config __main__ beside 1\n"


@with_trl
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param("trainer", "early", marks=pytest.mark.slow),
        pytest.param("trainer", "late", marks=pytest.mark.slow),
        pytest.param("sft-model", "early", marks=pytest.mark.slow),
        pytest.param("sft", "early", marks=pytest.mark.slow),
        pytest.param("sft", "late", marks=pytest.mark.slow),
        pytest.param("dpo", "early", marks=pytest.mark.slow),
        pytest.param("grpo", "late", marks=pytest.mark.slow),
    ],
)
def test_trainers_do_all_that_they_do_with_peft(run, tmp_path, name, mode):
    """Losses, checkpoints of adapters alone, resuming from one, evaluating in between, the best model, saving, and
    reading what was saved: with real peft and, where that is absent, with install_as_peft."""
    header = f"FOLDER, NAME = {str(Path(__file__).parent)!r}, {name!r}\n"
    outputs = []
    for which, real in ((mode, False), ("real", True)):
        out = run(f"{header}MODE, OUT = {which!r}, {str(tmp_path / which)!r}\n{TRAIN}", peft=real)
        outputs.append(out.splitlines()[-1].split())
    (ours, *mine), (theirs, *others) = outputs
    assert (ours, theirs) == ("peft_fast.tasks", "peft.peft_model")
    # Adam's first steps are all but signs of gradients, which makes much of roundings: DPO's by 1.5e-5.
    assert max(abs(float(a) - float(b)) for a, b in zip(mine, others)) < 5e-5
    assert len(mine) == (4 if name == "grpo" else 6)
