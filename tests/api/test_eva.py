"""EVA beside peft's: components, ranks, scales, what is saved."""

import copy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import nn

import peft_fast
from peft_fast.utils.integrations import dequantize_module_weight

LIBRARIES = (peft, peft_fast)
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
MODULES = {library: library.tuners.lora.eva for library in LIBRARIES}


def config(library, eva=None, **options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": "eva"} | options
    return library.LoraConfig(**options, eva_config=library.EvaConfig(**{"tau": 0.9, **(eva or {})}))


def adapted(library, base, **options):
    return library.get_peft_model(base, config(library, **options), low_cpu_mem_usage=True)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(5):
        tokens = torch.randint(1, 96, (4, 24), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, :9] = 0
        labels = tokens.clone()
        labels[:, :4] = -100
        labels[1, 4:8] = 7
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return batches


def both(base, data, call=None, **options):
    """[(model, components)] of both libraries, on copies of the base."""
    found = []
    for library in LIBRARIES:
        model = adapted(library, copy.deepcopy(base), **options)
        components = library.get_eva_state_dict(model, data, show_progress_bar=False, **(call or {}))
        library.initialize_lora_eva_weights(model, eva_state_dict=dict(components))
        found.append((model, components))
    return found


def same_components(theirs, ours, atol=2e-5):
    assert list(theirs) == list(ours)
    for name, vectors in theirs.items():
        torch.testing.assert_close(ours[name], vectors, atol=atol, rtol=1e-4, msg=name)
        assert not len(vectors) or ours[name].dtype == vectors.dtype


def same_models(theirs, ours, tokens, trained):
    for option in ("rank_pattern", "alpha_pattern"):
        assert getattr(theirs.peft_config["default"], option) == getattr(ours.peft_config["default"], option)
    names = [name for name, _ in theirs.named_parameters()]
    assert names == [name for name, _ in ours.named_parameters()]
    flags = [[parameter.requires_grad for parameter in model.parameters()] for model in (theirs, ours)]
    assert flags[0] == flags[1]
    outputs = [trained(model.eval())(input_ids=tokens).logits for model in (theirs, ours)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-3)


CASES = [
    {},
    {"eva": {"rho": 1.5, "adjust_scaling_factors": False, "label_mask_value": 7}, "rank_pattern": {"up_proj": 6}},
    {"eva": {"whiten": True}, "target_modules": ["o_proj", "q_proj"], "use_dora": True},
]
MORE = [
    {"eva": {"rho": 1.0}},
    {"eva": {"tau": 0.99}, "target_modules": "all-linear"},
    {"eva": {"use_label_mask": False, "rho": 3}, "alpha_pattern": {"k_proj": 3}, "use_rslora": True},
]


@pytest.mark.parametrize("options", [*CASES, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE)], ids=str)
def test_as_in_peft(options, llama, data, tokens, trained):
    (theirs, components), (ours, own) = both(llama(), data, **options)
    same_components(components, own)
    same_models(theirs, ours, tokens, trained)


def test_the_model_does_what_it_did_and_ranks_have_moved(llama, data, tokens):
    base = llama().eval()
    expected = base(input_ids=tokens).logits
    model = adapted(peft_fast, base).train()
    state = torch.get_rng_state()
    peft_fast.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    assert torch.equal(torch.get_rng_state()[:8], state[:8])
    assert model.training
    torch.testing.assert_close(model.eval()(input_ids=tokens).logits, expected)
    layers = dict(model.base_model.layers())
    ranks = [layer.r["default"] for layer in layers.values()]
    assert len(set(ranks)) > 1
    assert sum(ranks) == 4 * 2 * len(TARGETS)  # what layers without a rank had, others have
    for layer in layers.values():
        A = layer.lora_A["default"].weight
        torch.testing.assert_close(A @ A.t(), torch.eye(len(A)), atol=1e-5, rtol=0)
        assert layer.scaling["default"] == 6 / 4
    assert not any(module._forward_pre_hooks for module in layers.values())


def test_rank_zero_takes_the_adapter_away_and_files_travel(llama, data, tokens, trained, tmp_path):
    (theirs, _), (ours, _) = both(llama(), data, target_modules=[*TARGETS, "gate_proj"], r=2)
    for library, model in ((peft, theirs), (peft_fast, ours)):
        trained(model.eval()).save_pretrained(tmp_path / library.__name__)
    keys = [set(load_file(tmp_path / name.__name__ / "adapter_model.safetensors")) for name in LIBRARIES]
    assert keys[0] == keys[1]
    left = [path for path, _ in ours.base_model.layers()]
    assert len(left) < 12  # some have lost it
    removed = next(
        p for p, m in ours.base_model.model.named_modules() if p.endswith("_proj") and isinstance(m, nn.Linear)
    )
    assert removed not in left
    expected = ours(input_ids=tokens).logits
    for library in LIBRARIES:
        loaded = library.PeftModel.from_pretrained(llama(), tmp_path / "peft_fast").eval()
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-4)
    loaded = peft_fast.PeftModel.from_pretrained(llama(), tmp_path / "peft").eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, theirs(input_ids=tokens).logits, atol=1e-5, rtol=1e-4)
    assert [
        path for path, _ in peft_fast.PeftModel.from_pretrained(llama(), tmp_path / "peft_fast").base_model.layers()
    ] == left


def test_a_trained_adapter_less_its_start(llama, data, tokens, trained, tmp_path):
    """As in peft a plain adapter of twice the ranks, where EVA's A is taken out again."""
    model = adapted(peft_fast, llama(), r=2)
    peft_fast.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    model.save_pretrained(tmp_path / "initial")
    expected = trained(model.eval())(input_ids=tokens).logits
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    for library in LIBRARIES:
        loaded = library.PeftModel.from_pretrained(llama(), tmp_path / "plain")
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-4)
        assert loaded.peft_config["default"].rank_pattern
        assert loaded.peft_config["default"].eva_config is None


def test_a_second_adapter_stays_on_a_layer_that_loses_this_one(llama, data, tokens):
    model = adapted(peft_fast, llama(), target_modules=[*TARGETS, "gate_proj"], r=2)
    model.add_adapter("other", peft_fast.LoraConfig(r=3, target_modules=["gate_proj", "down_proj"]))
    before = {
        path: layer.lora_A["other"].weight.clone() for path, layer in model.base_model.layers() if "other" in layer.r
    }
    peft_fast.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    layers = dict(model.base_model.layers())
    assert any("default" not in layers[path].r for path in before)
    for path, A in before.items():
        assert torch.equal(layers[path].lora_A["other"].weight, A)
    assert model(input_ids=tokens).logits.isfinite().all()


def test_k_bit_base(llama, llama_4bit, data, tokens, trained):
    """As peft's of the dequantised weights: bitsandbytes' own product on CPUs is off by a few thousandths."""
    base, dense = llama_4bit(), llama()
    for path, layer in base.named_modules():
        if hasattr(layer, "compute_dtype"):
            dense.get_submodule(path).weight.data = dequantize_module_weight(layer).float()
    models, found = [], []
    for library, model in ((peft, dense), (peft_fast, base)):
        models.append(adapted(library, model, eva={"rho": 1.5}))
        found.append(library.get_eva_state_dict(models[-1], data, show_progress_bar=False))
        library.initialize_lora_eva_weights(models[-1], eva_state_dict=dict(found[-1]))
    same_components(*found)
    outputs = [trained(model.eval())(input_ids=tokens).logits for model in models]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-3)
    assert isinstance(next(layer for _, layer in models[1].base_model.layers()).get_base_layer(), Linear4bit)


def test_plain_model(llama, data, tokens, trained):
    """Without an adapter: names are the base model's, in this model and, with the prefix, in the adapter."""
    found = [lib.get_eva_state_dict(llama(), data, config(lib), show_progress_bar=False) for lib in LIBRARIES]
    same_components(*found)
    assert "model.layers.0.self_attn.q_proj" in found[1]
    model = adapted(peft_fast, llama())
    peft_fast.initialize_lora_eva_weights(model, eva_state_dict=found[1])
    (_, _), (ours, _) = both(llama(), data)
    assert model.peft_config["default"].rank_pattern == ours.peft_config["default"].rank_pattern
    everything = config(peft_fast, {"tau": 0.5}, target_modules=None, r=1)
    assert "lm_head" in peft_fast.get_eva_state_dict(llama(), data, everything, show_progress_bar=False)


class Plain(nn.Module):
    """Layers of several kinds, and inputs that are no dicts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table, self.one, self.two = nn.Embedding(20, 40), nn.Linear(40, 48), nn.Linear(48, 40)

    def forward(self, x):
        return self.two(self.one(self.table(x)).relu())


def test_functions_of_ones_own(tokens):
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(0, 20, (16, 6), generator=generator) for _ in range(4)]
    seen = []

    def halved(inputs, prepared, name):
        seen.append((name, tuple(prepared.shape)))
        return inputs[0].flatten(0, 1)[::2].contiguous()

    for prepare in (None, halved, {"base_model.model.one": halved}):
        found = []
        for library in LIBRARIES:
            model = adapted(library, Plain(), target_modules=["one", "two", "table"], r=3)
            with pytest.warns(UserWarning, match="table"):
                library.initialize_lora_eva_weights(
                    model, data, forward_fn=lambda model, x: model(x), prepare_model_inputs_fn=None,
                    prepare_layer_inputs_fn=copy.copy(prepare), show_progress_bar=False,
                )  # fmt: skip
            found.append(dict(model.named_parameters()))
        for name, values in found[0].items():
            if "table" not in name:
                torch.testing.assert_close(found[1][name], values, atol=1e-5, rtol=1e-4)
        assert not any(parameter.is_meta for parameter in found[1].values())
    assert {shape for _, shape in seen} == {(16, 6)}


def test_trained_flags_and_dtypes_stay(llama, data):
    base = llama().to(torch.bfloat16)
    model = peft_fast.get_peft_model(base, config(peft_fast))
    peft_fast.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    weights = [p for _, layer in model.base_model.layers() for p in layer.adapter_parameters("default")]
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert all(weight.requires_grad for weight in weights)


def test_layers_of_one_input_are_whitened_once(llama, data):
    """In peft they share one tensor, which is divided again for each of them."""
    plain, whitened = (
        peft_fast.get_eva_state_dict(llama(), data, config(peft_fast, {"whiten": whiten}), show_progress_bar=False)
        for whiten in (False, True)
    )
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    sizes = [whitened[name].norm(dim=1) for name in names]
    for name, size in zip(names, sizes):
        torch.testing.assert_close(whitened[name] / size[:, None], plain[name])
        torch.testing.assert_close(size, sizes[0][: len(size)])
    eva, q = {"rho": 1.0, "whiten": True}, names[0]
    shared, alone = (
        peft_fast.get_eva_state_dict(
            llama(), data, config(peft_fast, eva, target_modules=targets), show_progress_bar=False
        )
        for targets in (["q_proj", "k_proj", "v_proj"], ["q_proj"])
    )
    torch.testing.assert_close(shared[q], alone[q])
    assert sizes[0][0] < sizes[0][-1]  # the larger a singular value, the smaller it is made


class TestRefused:
    def test_components_that_do_not_fit(self, llama, data, untouched):
        model = peft_fast.get_peft_model(llama(), config(peft_fast))
        good = peft_fast.get_eva_state_dict(model, data, show_progress_bar=False)
        name = next(iter(good))
        wrong = {
            "must be": good | {name: good[name][:, :3]},
            "inf or NaN": good | {name: good[name] * float("nan")},
            "not on": good | {"elsewhere": good[name]},
            "none of": {key: value[:0] for key, value in good.items()},
        }
        for match, components in wrong.items():
            with untouched(model), pytest.raises(ValueError, match=match):
                peft_fast.initialize_lora_eva_weights(model, eva_state_dict=components)
        model.merge_adapter()
        with untouched(model), pytest.raises(ValueError, match="merged"):
            peft_fast.initialize_lora_eva_weights(model, eva_state_dict=good)

    def test_data_that_do_not_do(self, llama, data, untouched, monkeypatch):
        model = peft_fast.get_peft_model(llama(), config(peft_fast))
        small = [{"input_ids": batch["input_ids"][:1, :3]} for batch in data]  # 3 rows: peft goes on for ever
        read_once = (batch for batch in data)
        wrong = {"no batch has the 8 rows": small, "empty": [], "read several times": read_once}
        for match, batches in wrong.items():
            with untouched(model), pytest.raises(ValueError, match=match):
                peft_fast.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        monkeypatch.setattr("peft_fast.tuners.lora.eva.EPOCHS", 3)
        never = peft_fast.get_peft_model(llama(), config(peft_fast, eva={"tau": 1.0}))
        with untouched(never), pytest.raises(ValueError, match=r"not settled after 3 readings.*a tau below 1.0"):
            peft_fast.initialize_lora_eva_weights(never, data, show_progress_bar=False)  # peft goes on for ever
        wide = adapted(peft_fast, llama(), r=40)
        with pytest.raises(ValueError, match="64 features, fewer than the 80 ranks"):
            peft_fast.initialize_lora_eva_weights(wide, data, show_progress_bar=False)
        with pytest.raises(ValueError, match="functions for layers that EVA does not look at"):
            peft_fast.get_eva_state_dict(model, data, prepare_layer_inputs_fn={"x": None}, show_progress_bar=False)
        with pytest.raises(ValueError, match=r"rows \[M, K\]"):
            peft_fast.get_eva_state_dict(
                model, data, prepare_layer_inputs_fn=lambda x, prepared, name: x[0], show_progress_bar=False
            )
        assert not any(module._forward_pre_hooks for _, module in model.base_model.layers())


def test_progress(llama, data, capsys):
    peft_fast.get_eva_state_dict(adapted(peft_fast, llama()), data)
    assert "of 10 layers are found" in capsys.readouterr().err


WORKER = """
import sys, torch, torch.distributed as dist
from torch.multiprocessing import spawn
import {library} as library

def run(rank, port, path):
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{{port}}", rank=rank, world_size=2)
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(40, 48), torch.nn.ReLU(), torch.nn.Linear(48, 40))
    config = library.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights="eva", eva_config=library.EvaConfig())
    generator = torch.Generator().manual_seed(rank)
    data = [torch.randn(30 + 5 * rank, 40, generator=generator) * torch.arange(40) for _ in range(4)]
    found = library.get_eva_state_dict(
        base, data, config, lambda model, x: model(x), None, None, show_progress_bar=False
    )
    torch.save(found, f"{{path}}/{{rank}}.pt")

if __name__ == "__main__":
    spawn(run, (int(sys.argv[1]), sys.argv[2]), nprocs=2)
"""


@pytest.mark.slow
def test_rows_of_several_processes(tmp_path):
    found = []
    for i, library in enumerate(LIBRARIES):
        script, folder = tmp_path / f"run_{library.__name__}.py", tmp_path / str(i)
        script.write_text(WORKER.format(library=library.__name__))
        folder.mkdir()
        subprocess.run(
            [sys.executable, script, str(29517 + i), folder], check=True, cwd=Path(__file__).parents[2], timeout=120
        )
        found += [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for other in found[1:]:
        same_components(found[0], other)
