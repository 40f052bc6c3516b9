"""DoRA on 8-bit layers, beside peft's and beside the dense layer of the same weight; and the accelerator for norms."""

import copy

import bitsandbytes
import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peft_fast
from peft_fast import ops
from peft_fast.tuners.base_weight import quantized_weight

K, N = 64, 48
X = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(1))
LIBRARIES = (peft, peft_fast)


def base():
    torch.manual_seed(3)
    layer = bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(K, N).state_dict())
    return nn.ModuleDict({"layer": layer.to("cpu")})


def adapted(library, **options):
    torch.manual_seed(5)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], "use_dora": True} | options
    model = library.get_peft_model(base(), library.LoraConfig(**config))
    started = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    torch.manual_seed(6)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, model.base_model.model["layer"], started


def test_starts_outputs_and_gradients_are_pefts():
    found = []
    for library in LIBRARIES:
        model, _, started = adapted(library)
        x = X.clone().requires_grad_(True)
        y = model.train().base_model.model["layer"](x)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append({"y": y, "x": x.grad, **started, **{f"{name}.grad": grad for name, grad in gradients.items()}})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert (found[1][name] - value).norm() <= 0.02 * value.norm(), name  # peft multiplies in 16 bits in between


def test_it_is_what_the_dense_layer_is():
    model, layer, _ = adapted(peft_fast)
    weight = ops.dequantize(layer.base_weight(), torch.float32)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = weight + 6 / 4 * B @ A
    merged = merged * (layer.lora_magnitude_vector["default"].weight / merged.norm(dim=1))[:, None]
    for training in (True, False):
        torch.testing.assert_close(
            model.train(training).base_model.model["layer"](X), F.linear(X, merged, layer.bias), atol=1e-4, rtol=1e-4
        )


def test_merged_and_given_back():
    model, layer, _ = adapted(peft_fast)
    model.eval()
    before, codes = layer(X), layer.base_layer.weight.detach().clone()
    plain = copy.deepcopy(model).base_model.merge_to_16bit(torch.bfloat16, progressbar=False)["layer"]
    torch.testing.assert_close(plain(X.bfloat16()).float(), before, atol=0.05, rtol=0.05)
    with pytest.warns(UserWarning, match="k-bit weight rounds"):
        model.merge_adapter()
    assert (layer(X) - before).norm() < 0.02 * before.norm()
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, codes)
    torch.testing.assert_close(layer(X), before)
    with pytest.warns(UserWarning, match="k-bit weight rounds"):  # peft loses the codes' scales on a CPU
        merged = model.merge_and_unload()["layer"]
    assert isinstance(merged, bitsandbytes.nn.Linear8bitLt)
    exact = F.linear(X, ops.dequantize(quantized_weight(merged), torch.float32), merged.bias)
    assert (exact - before).norm() < 0.02 * before.norm()


def test_files_both_ways(tmp_path):
    for writer, reader in (LIBRARIES, LIBRARIES[::-1]):
        model, _, _ = adapted(writer)
        model.save_pretrained(tmp_path / writer.__name__)
        read = reader.PeftModel.from_pretrained(base(), tmp_path / writer.__name__)
        states = [{k: v for k, v in m.state_dict().items() if "lora_" in k} for m in (model, read)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_norms_are_taken_on_the_accelerator_that_is_asked_for(monkeypatch):
    """There is none here: the CPU under another name stands for it, and the weights that go there are counted."""
    went = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cpu:0"))
    to = torch.Tensor.to

    def counted(tensor, *args, **kwargs):
        if args[:1] == (torch.device("cpu:0"),):
            went.append(tuple(tensor.shape))
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    for offload in (False, True):
        went.clear()
        dense = nn.ModuleDict({"layer": nn.Linear(K, N)})
        runtime = peft_fast.LoraRuntimeConfig(ephemeral_gpu_offload=offload)
        config = peft_fast.LoraConfig(r=4, target_modules=["layer"], use_dora=True, runtime_config=runtime)
        layer = peft_fast.get_peft_model(dense, config).base_model.model["layer"]
        assert ((N, K) in went) == offload
        norms = layer.base_layer.weight.norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.detach(), norms.detach())
