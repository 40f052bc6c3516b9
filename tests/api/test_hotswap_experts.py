"""Hot-swapping adapters on experts' parameters, whose A and B hold an adapter for each expert. peft 0.21.2 pads none of
them, and takes the first rows of A for a smaller rank, which are those of the first experts."""

import json
import math

import peft
import pytest
import torch
import torch._dynamo.testing
import transformers as tf
from safetensors.torch import load_file, save_file

import peft_fast
from peft_fast.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from peft_fast.tuners.lora import ParamWrapper

E, X = 32, 3  # experts of X
IDS = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": 64, "hidden_size": E, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2,
}  # fmt: skip
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATTERNS = {"rank_pattern": {r"mlp\.experts\.down_proj": 5}, "alpha_pattern": {"gate_up_proj": 3}}


def base(kind="qwen3_moe"):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if kind == "mixtral":
            model = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=X))
        else:
            model = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, num_experts=X, moe_intermediate_size=24))
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that the experts matter
    return model.eval()


@pytest.fixture
def adapter(tmp_path):
    """Writes an adapter of these options, of weights of its own; returns its folder."""

    def write(seed, **options):
        torch.manual_seed(seed)
        options = {"r": 4, "lora_alpha": 8, "target_parameters": BOTH, **options}
        config = peft_fast.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **options)
        peft_fast.get_peft_model(base(), config).save_pretrained(tmp_path / str(seed))
        return tmp_path / str(seed)

    return write


def fresh(folder, library=peft_fast, kind="qwen3_moe"):
    return library.PeftModel.from_pretrained(base(kind), folder).eval()


@torch.no_grad()
def outputs(model):
    return model(input_ids=IDS).logits


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def saved(model, folder):
    """An adapter's tensors, and what both libraries' models give with it."""
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors"), [outputs(fresh(folder, lib)) for lib in (peft_fast, peft)]


@pytest.mark.parametrize("implementation", ["grouped_mm", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, PATTERNS, {"use_rslora": True, "rank_pattern": {"gate_up_proj": 6}}], ids=str)
def test_swapped_is_loaded(options, implementation, adapter, tmp_path):
    shared = {name: value for name, value in options.items() if name != "rank_pattern"}
    one, other, small = adapter(0, **shared), adapter(1, lora_alpha=5, **options), adapter(2, r=2, **shared)
    model = fresh(one)
    model.set_experts_implementation(implementation)
    close(outputs(model), outputs(fresh(one, peft)))
    prepare_model_for_compiled_hotswap(model, target_rank=7)
    close(outputs(model), outputs(fresh(one)))
    for wrapper in wrappers(model):
        A, B = wrapper.factors("default")
        assert (A.out_features, B.in_features) == (A.weight.shape[0], B.weight.shape[1]) == (7 * X, 7 * X)
    kept = dict(model.named_parameters())
    for i, folder in enumerate((other, small, one)):
        hotswap_adapter(model, folder, "default")
        assert all(kept[name] is value for name, value in model.named_parameters())
        expected = outputs(fresh(folder, peft))
        close(outputs(model), expected)
        tensors, loaded = saved(model, tmp_path / f"saved{i}")
        written = load_file(folder / "adapter_model.safetensors")
        assert tensors.keys() == written.keys()
        assert all(torch.equal(tensors[key], value) for key, value in written.items())
        close(loaded[0], expected)
        close(loaded[1], expected)
        ranks, of_peft = ([w.r["default"] for w in ws] for ws in (wrappers(model), wrappers(fresh(folder))))
        assert ranks == of_peft


@pytest.mark.slow
def test_twenty_adapters_compile_once(adapter):
    folders = [adapter(i, r=1 + (5 * i) % 7, lora_alpha=3 + i) for i in range(20)]
    model = fresh(folders[0])
    prepare_model_for_compiled_hotswap(model, target_rank=7)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    first = outputs(compiled)
    frames = counter.frame_count
    assert frames >= 1
    for folder in folders[1:]:
        hotswap_adapter(compiled, folder, "default")
        found = outputs(compiled)
        close(found, outputs(fresh(folder)))
        assert not torch.allclose(found, first, atol=1e-3)
    assert counter.frame_count == frames


def test_gradients_of_a_padded_adapter(adapter):
    folder = adapter(0, r=2)
    grads = []
    for rank in (None, 6):
        model = peft_fast.PeftModel.from_pretrained(base(), folder, is_trainable=True)
        if rank:
            prepare_model_for_compiled_hotswap(model, target_rank=rank)
        model(input_ids=IDS).logits.square().mean().backward()
        grads.append(
            [(w.factors("default")[0].weight.grad, w.factors("default")[1].weight.grad) for w in wrappers(model)]
        )
    for (A, B), (A_padded, B_padded) in zip(*grads, strict=True):
        close(A_padded.unflatten(0, (X, -1))[:, :2].flatten(0, 1), A)
        close(B_padded.unflatten(1, (-1, X))[:, :2].flatten(1), B)
        assert A_padded.count_nonzero() == A.count_nonzero()


def test_the_new_rank_in_the_config_is_that_of_the_file(adapter, tmp_path):
    model = fresh(adapter(0, rank_pattern={"down_proj": 2}))
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config["default"])
    assert (model.peft_config["default"].r, model.peft_config["default"].rank_pattern) == (6, {"down_proj": 6})
    tensors, _ = saved(model, tmp_path / "saved")
    assert {t.shape[0] for key, t in tensors.items() if "experts" in key and "lora_A" in key} == {6 * X}


def test_a_rank_that_is_there_is_not_cut_off(adapter, untouched):
    model = fresh(adapter(0, rank_pattern={"gate_up_proj": 6}))
    with untouched(model), pytest.raises(ValueError, match="'default' has 6, got 5"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)


def test_patterns_of_a_state_dict(adapter):
    """By the names in the model, as diffusers calls it: down_proj's wrapper is around gate_up_proj's."""
    other = fresh(adapter(1, **PATTERNS))
    model = fresh(adapter(0))
    tensors = {name: value.detach() for name, value in other.named_parameters() if "lora_" in name}
    hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    scales = {w.parameter_name: (w.r["default"], w.scaling["default"]) for w in wrappers(model)}
    assert scales == {"down_proj": (5, 8 / 5), "gate_up_proj": (4, 3 / 4)}
    close(outputs(model), outputs(other))


def of_single_experts(folder, rank, seed, **options):
    """An adapter of transformers 4, with layers for each expert."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for i in range(X):
        for name, K, N in (("w1", E, 24), ("w3", E, 24), ("w2", 24, E)):
            key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{i}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, K, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(N, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["w1", "w2", "w3"], **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_of_single_experts(use_rslora, tmp_path):
    """gate and up, joined, have twice the rank and alpha, in the model and in what is saved."""
    one, other = (of_single_experts(tmp_path / str(r), r, r, use_rslora=use_rslora) for r in (4, 2))
    model, expected = fresh(one, kind="mixtral"), fresh(other, kind="mixtral")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, other, "default")
    close(outputs(model), outputs(expected))
    for mine, wanted in zip(wrappers(model), wrappers(expected), strict=True):
        assert mine.r == wanted.r
        assert math.isclose(mine.scaling["default"], wanted.scaling["default"], rel_tol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    for library in (peft_fast, peft):
        close(outputs(fresh(tmp_path / "saved", library, "mixtral")), outputs(expected))
