"""The README's Python, run as it stands there, on a tiny model; and its command for FSDP2 against the tested one."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .distributed.processes import LAUNCHERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

LLAMA = """
import sys
sys.path.insert(0, {ecosystem!r})
import runs
import torch
"""
OF_PEFT = """
import peft
model = peft.get_peft_model(runs.base(), peft.LoraConfig(target_modules="all-linear"))
"""
ADAPTED = """
import peft_fast
tokenizer = runs.tokenizer()
model = peft_fast.get_peft_model(
    peft_fast.quantize_linear_layers(runs.base()), peft_fast.LoraConfig(target_modules="all-linear")
)
"""
ALONE = """
import torch.distributed as dist
rank = 0
dist.init_process_group("gloo", init_method="file://" + OUT + "/store", rank=0, world_size=1)
"""
# {a line of the block: (what comes before it, what must be true after it)}
AROUND = {
    "explain(model)  # one row": ("", "assert (folder / 'adapter' / 'adapter_config.json').exists()"),
    "# 1. your script": ("", "assert get_peft_model.__module__.startswith('peft_fast')"),
    "# 3. a model that peft": (
        OF_PEFT, "assert {row.route for row in peft_fast.explain(model, show=False).rows} >= {'mlp', 'group'}",
    ),
    "trainer = SFTTrainer(": ("", "assert sorted(p.name for p in (folder / 'adapter').glob('*.safetensors')) == "
        "['adapter_model.safetensors']"),
    "fully_shard(model)": (ADAPTED + ALONE, "assert len(peft_fast.load_peft_weights(folder / 'adapter')) == 28"),
    "vllm_compatible=True": (
        ADAPTED,
        "from transformers import AutoModelForCausalLM\n"
        "ids = torch.arange(4, 14).view(1, 10)\n"
        "read = AutoModelForCausalLM.from_pretrained('merged', dtype=torch.bfloat16)\n"
        "assert torch.equal(read(ids).logits, merged.eval()(ids).logits)\n"
        "assert (folder / 'for-vllm' / 'adapter_model.safetensors').exists()",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with ./llama and notes.jsonl in it."""
    folder = tmp_path_factory.mktemp("readme")
    code = LLAMA.format(ecosystem=str(ROOT / "tests" / "ecosystem"))
    run(f"{code}\nruns.base('llama')\nruns.tokenizer().save_pretrained('llama')\n", folder)
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["all is well"] * 8))
    return folder


def run(code: str, folder: Path) -> None:
    changes = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    environment = {**os.environ, **changes}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_block_is_known():
    assert all(sum(line in block for block in BLOCKS) == 1 for line in AROUND)
    assert len(BLOCKS) == len(AROUND)


@pytest.mark.slow
@pytest.mark.parametrize("line", AROUND, ids=lambda line: line.strip("# ")[:20])
def test_a_block_runs_as_it_stands(place, line):
    if "SFTTrainer" in line:
        pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")
    before, after = AROUND[line]
    block = next(block for block in BLOCKS if line in block)
    if not torch.cuda.is_available():  # where TRL wants to be told so
        block = block.replace("num_train_epochs=1", "num_train_epochs=1, use_cpu=True, bf16=False")
    head = LLAMA.format(ecosystem=str(ROOT / "tests" / "ecosystem"))
    head += f"from pathlib import Path\nOUT = {str(place)!r}\nfolder = Path(OUT)\n"
    run(f"{head}{before}\n{block}\n{after}\n", place)


def test_the_command_for_fsdp2_is_the_one_that_is_tested():
    command = re.search(r"^accelerate launch (.*?)train\.py", README, re.DOTALL | re.MULTILINE)
    assert command is not None
    words = shlex.split(command[1].replace("\\\n", " "))
    options = {word: words[i + 1] for i, word in enumerate(words) if word.startswith("--") and i + 1 < len(words)}
    tested = LAUNCHERS["accelerate-fsdp"]
    assert options.pop("--num_processes") == "8"
    for name, value in options.items():
        assert name in tested
        assert value.startswith("--") or tested[tested.index(name) + 1] == value
