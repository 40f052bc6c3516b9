"""diffusers' methods for adapters on a small UNet, with install_as_peft, beside the same with real peft.

diffusers is no dependency of the tests: where it is installed this runs (0.42.1: pip install --no-deps --target FOLDER
diffusers requests urllib3 idna certifi charset_normalizer importlib_metadata zipp pillow, and FOLDER in PYTHONPATH).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("diffusers") is None,
        reason="diffusers is not installed: pip install --no-deps diffusers",
    ),
]
CODE = """
import json, sys, warnings
warnings.simplefilter("ignore")
LIBRARY, OUT, OTHER = sys.argv[1:]
if LIBRARY == "peft_fast":
    import peft_fast
    peft_fast.install_as_peft()
import peft, torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.peft import PeftAdapterMixin
assert peft.LoraConfig.__module__.partition(".")[0] == LIBRARY
torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=8, attention_head_dim=4,
).eval()
assert isinstance(unet, PeftAdapterMixin)
names = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
config = lambda: peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=names)
x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
found = {}
def see(name):
    with torch.no_grad():
        found[name] = unet(x, 1, text).sample.flatten().tolist()
see("plain")
torch.manual_seed(1)
unet.add_adapter(config(), "a")
see("a")
unet.add_adapter(config(), "b")
see("b")
assert unet.active_adapters() == ["b"]
unet.set_adapters(["a", "b"], [0.5, 0.25])
see("both")
unet.disable_lora()
see("disabled")
unet.enable_lora()
unet.set_adapters("a", {"down": 0.3, "up": 0.7})
see("blocks")
unet.set_adapters("a")
unet.save_lora_adapter(OUT, adapter_name="a")
unet.fuse_lora(adapter_names=["a"])
see("fused")
unet.unfuse_lora()
see("unfused")
unet.delete_adapters("b")
assert list(unet.peft_config) == ["a"]
unet.unload_lora()
see("unloaded")
for name, folder in {"own file": OUT, "the other's file": OTHER}.items():
    unet.load_lora_adapter(folder, prefix=None, adapter_name="read", weight_name="pytorch_lora_weights.safetensors")
    see(name)
    unet.unload_lora()
torch.manual_seed(1)
unet.add_adapter(config(), "trained")
unet.train()
unet(x, 1, text).sample.square().mean().backward()
trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
assert trained and all("lora_" in name and p.grad is not None for name, p in trained.items())
found["gradients"] = [float(trained[name].grad.abs().sum()) for name in sorted(trained)]
print(json.dumps(found))
"""
SAME = {"a": ("unfused", "fused", "own file", "the other's file"), "plain": ("disabled", "unloaded")}


def run(library, folder, other):
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CODE, library, str(folder), str(other)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_adapters_of_diffusers_are_what_they_are_with_peft(tmp_path):
    """Adding, scaling, by block too, switching off, fusing, deleting, saving, reading either's file, gradients."""
    theirs = run("peft", tmp_path / "peft", tmp_path / "peft")
    ours = run("peft_fast", tmp_path / "ours", tmp_path / "peft")
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    for name, others in SAME.items():
        for other in others:
            assert ours[other] == pytest.approx(ours[name], abs=1e-4), other
    different = ("plain", "a", "b", "both", "blocks")
    assert len({tuple(round(value, 4) for value in ours[name]) for name in different}) == len(different)
