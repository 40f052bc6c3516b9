"""LoraConfig(target_parameters=...), LoRA on the 3-d parameters of experts, beside peft 0.21.2; and names in
target_modules of the layers that experts were in transformers 4, which become such."""

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import peft_fast
from peft_fast.tuners.lora import ParamWrapper

V, E = 96, 32
IDS = torch.randint(1, V, (2, 9), generator=torch.Generator().manual_seed(3))
SIZES = {
    "vocab_size": V, "hidden_size": E, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **EXPERTS)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**SIZES, num_local_experts=4, sliding_window=4)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=False)),
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "both": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "alone": ("qwen3_moe", {"target_modules": [], "target_parameters": ["down_proj"]}),
    "full-path": ("qwen3_moe", {"target_modules": [], "target_parameters": [f"model.layers.0.{BOTH[0]}"]}),
    "router": ("qwen3_moe", {"target_modules": ["v_proj"], "target_parameters": ["gate.weight"]}),
    "all-linear": ("qwen3_moe", {"target_modules": "all-linear"}),
    "layers-of-old": ("qwen3_moe", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
    "expression": ("qwen3_moe", {"target_modules": r".*\.(q_proj|down_proj)"}),
    "expression-of-old": ("qwen3_moe", {"target_modules": r".*experts\.(gate|up|down)_proj"}),
    "attention": ("qwen3_moe", {"target_modules": ["q_proj", "v_proj"]}),
    "mixtral": ("mixtral", {"target_modules": ["w1", "w2", "w3", "q_proj"]}),
    "mixtral-all-linear": ("mixtral", {"target_modules": "all-linear"}),
    "transposed": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": BOTH}),
    "matrix": ("llama", {"target_modules": [], "target_parameters": ["up_proj.weight", "q_proj.weight"]}),
    "patterns": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": BOTH,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {r".*gate_up_proj": 32},
        },
    ),
    "options": (
        "qwen3_moe",
        {"target_modules": [], "target_parameters": BOTH, "use_rslora": True, "init_lora_weights": "gaussian"},
    ),
    "no-init": ("qwen3_moe", {"target_modules": [], "target_parameters": BOTH, "init_lora_weights": False}),
}
every_case = pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES.keys())


def base(kind="qwen3_moe", dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return MODELS[kind]().eval().to(dtype)


def adapted(library, kind="qwen3_moe", shake=True, dtype=torch.float32, **options):
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = library.LoraConfig(**{"r": 4, "lora_alpha": 8, **options})
        model = library.get_peft_model(base(kind, dtype), config).eval()
    return shaken(model) if shake else model


def shaken(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def logits(model):
    return model(input_ids=IDS).logits


def close(a, b, **tolerances):
    torch.testing.assert_close(a, b, **{"rtol": 1e-4, "atol": 1e-5, **tolerances})


@every_case
def test_names_values_configs_outputs_and_gradients_are_pefts(kind, options):
    fresh = [adapted(library, kind, shake=False, **options) for library in (peft_fast, peft)]
    for (name, mine), (theirs, other) in zip(*(m.named_parameters() for m in fresh), strict=True):
        assert (name, mine.requires_grad) == (theirs, other.requires_grad)
        assert torch.equal(mine, other), name
    configs = [model.peft_config["default"] for model in fresh]
    for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "r"):
        assert getattr(configs[0], name) == getattr(configs[1], name), name
    status = [[(s.name, s.module_type, s.requires_grad) for s in model.get_layer_status()] for model in fresh]
    assert status[0] == status[1]
    ours, theirs = (adapted(library, kind, **options) for library in (peft_fast, peft))
    outputs = [logits(model) for model in (ours, theirs)]
    close(*outputs)
    assert (outputs[0] - logits(base(kind))).abs().max() > 1e-3
    for out in outputs:
        out.square().mean().backward()
    trained = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            close(mine.grad, other.grad, msg=name)
            trained += 1
    assert trained >= 2


@every_case
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_files_have_pefts_keys_and_load_both_ways(kind, options, low, tmp_path):
    keys = []
    for writer, reader in ((peft_fast, peft), (peft, peft_fast)):
        written = adapted(writer, kind, **options)
        written.save_pretrained(tmp_path / writer.__name__)
        keys.append(set(load_file(tmp_path / writer.__name__ / "adapter_model.safetensors")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = reader.PeftModel.from_pretrained(base(kind), tmp_path / writer.__name__, low_cpu_mem_usage=low)
        close(logits(read), logits(written))
    assert keys[0] == keys[1]


@pytest.mark.parametrize("case", ["both", "router", "transposed", "matrix", "mixtral"])
def test_merging_and_unloading(case):
    kind, options = CASES[case]
    ours, theirs = (adapted(library, kind, **options) for library in (peft_fast, peft))
    expected = logits(ours)
    ours.merge_adapter(safe_merge=True)
    close(logits(ours), expected)
    ours.unmerge_adapter()
    close(logits(ours), expected)
    with ours.disable_adapter():
        close(logits(ours), logits(base(kind)))
    merged = [model.merge_and_unload() for model in (ours, theirs)]
    for (name, mine), (other_name, other) in zip(*(m.named_parameters() for m in merged), strict=True):
        assert name == other_name
        close(mine, other, msg=name)
    plain = base(kind)
    model = shaken(peft_fast.get_peft_model(plain, peft_fast.LoraConfig(**options)))
    assert model.unload() is plain
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in base(kind).named_modules()]
    close(logits(plain), logits(base(kind)))


def test_several_adapters_are_pefts():
    options = CASES["both"][1]
    models = [adapted(library, **options) for library in (peft_fast, peft)]
    for model, library in zip(models, (peft_fast, peft)):
        torch.manual_seed(9)
        model.add_adapter("other", library.LoraConfig(**{**options, "r": 2}))
        shaken(model, seed=2)
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    for names in (["other"], ["default"], ["default", "other"]):
        for model in models:
            model.base_model.set_adapter(names)
        close(*(logits(model) for model in models))
        flags = [{n: p.requires_grad for n, p in model.named_parameters()} for model in models]
        assert flags[0] == flags[1]
    models[0].base_model.set_adapter("other")
    models[0].delete_adapter("default")
    models[1].base_model.set_adapter("other")
    close(*(logits(model) for model in models))


def test_training_is_pefts():
    models = [adapted(library, shake=False, **CASES["layers-of-old"][1]).train() for library in (peft_fast, peft)]
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), other in zip(models[0].named_parameters(), models[1].parameters()):
        close(mine, other, msg=name)


def test_in_16_bits_and_under_autocast():
    options = CASES["both"][1]
    ours, theirs = (adapted(library, dtype=torch.bfloat16, **options) for library in (peft_fast, peft))
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    close(logits(ours).float(), logits(theirs).float(), rtol=3e-2, atol=3e-2)
    ours, theirs = (adapted(library, **options) for library in (peft_fast, peft))
    with torch.autocast("cpu", torch.bfloat16):
        close(logits(ours).float(), logits(theirs).float(), rtol=3e-2, atol=3e-2)


def test_copies_pickles_attributes_and_explain():
    model = adapted(peft_fast, **CASES["both"][1])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(logits(twin), logits(model))
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    assert isinstance(wrapper, ParamWrapper)
    assert (wrapper.parameter_name, wrapper.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
    assert wrapper.get_base_layer().down_proj is wrapper.weight
    assert "ParamWrapper" in repr(wrapper)
    assert "parameter_name='down_proj'" in repr(wrapper)
    rows = {row.name: row for row in peft_fast.explain(model, show=False).rows}
    row = rows["base_model.model.model.layers.0.mlp.experts"]
    assert row.route == "reference"


def test_no_parameter_is_changed_by_a_forward_that_fails():
    model = adapted(peft_fast, **CASES["both"][1])
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    before = dict(experts.named_parameters())
    with pytest.raises(TypeError):
        model.base_model.model.model.layers[0].mlp.experts("no tensor", 1, 2, 3, 4, 5)
    assert dict(experts.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in experts.named_parameters())


OLD = {"qwen3_moe": ("mlp", ["gate_proj", "up_proj", "down_proj"]), "mixtral": ("block_sparse_moe", ["w1", "w3", "w2"])}


def of_single_experts(kind, folder, targets, drop=()):
    """An adapter as it was trained with transformers 4, with a layer for each expert."""
    module, _ = OLD[kind]
    wide = 24 if kind == "qwen3_moe" else 48
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name in [f"{module}.experts.{i}.{target}" for i in range(4) for target in targets if target[0] not in "vq"]:
        K, N = (wide, E) if name.endswith(("down_proj", "w2")) else (E, wide)
        for at in range(2):
            key = f"base_model.model.model.layers.{at}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, K, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(N, 4, generator=generator)
    for at in range(2):
        key = f"base_model.model.model.layers.{at}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, E, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(32, 4, generator=generator)
    folder.mkdir()
    save_file({key: value for key, value in tensors.items() if key not in drop}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", *targets]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("part", [slice(None), slice(2, 3)], ids=["all", "down"])
def test_adapters_of_single_experts_load_as_in_peft(kind, part, tmp_path):
    of_single_experts(kind, tmp_path / "old", OLD[kind][1][part])
    models = [library.PeftModel.from_pretrained(base(kind), tmp_path / "old") for library in (peft_fast, peft)]
    close(*(logits(model) for model in models))
    assert (logits(models[0]) - logits(base(kind))).abs().max() > 0.1
    for (name, mine), other in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(mine, other), name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], ["gate_proj", "up_proj"]], ids=len)
def test_they_change_each_expert_as_they_did(targets, tmp_path):
    """Without down_proj, too, where peft looks for the wrapper in a wrapper that there is not, and loads nothing."""
    tensors = of_single_experts("qwen3_moe", tmp_path / "old", targets)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "old").base_model.model.model.layers[1].mlp.experts
    assert bool(theirs.lora_B["default"].weight.any()) == (len(targets) == 3)
    merged = peft_fast.PeftModel.from_pretrained(base(), tmp_path / "old").merge_and_unload()
    plain, experts = base().model.layers[1].mlp.experts, merged.model.layers[1].mlp.experts
    for i in range(4):
        deltas = {}
        for name in targets:
            key = f"base_model.model.model.layers.1.mlp.experts.{i}.{name}"
            deltas[name] = 2 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        close(experts.down_proj[i] - plain.down_proj[i], deltas.get("down_proj", torch.zeros(E, 24)))
        joined = torch.cat([deltas["gate_proj"], deltas["up_proj"]])
        close(experts.gate_up_proj[i] - plain.gate_up_proj[i], joined)


@pytest.mark.parametrize("what", ["lora_A", "lora_B"])
def test_adapters_that_lack_an_expert_are_refused(what, tmp_path, untouched):
    drop = [f"base_model.model.model.layers.1.mlp.experts.2.up_proj.{what}.weight"]
    of_single_experts("qwen3_moe", tmp_path / "old", OLD["qwen3_moe"][1], drop)
    model = base()
    with untouched(model, tmp_path), pytest.raises(ValueError, match="A and B for every expert"):
        peft_fast.PeftModel.from_pretrained(model, tmp_path / "old")


def test_keys_with_the_adapters_name_mean_what_they_say():
    """Also those of a wrapper in a wrapper, whose names are one another's but for a "base_layer."."""
    written, model = (adapted(peft_fast, shake=shake, **CASES["both"][1]) for shake in (True, False))
    peft_fast.set_peft_model_state_dict(model, {n: p for n, p in written.named_parameters() if "lora_" in n})
    close(logits(model), logits(written))


class Odd(nn.Module):
    """Parameters that cannot be adapted: of the model itself, of one and of four dimensions, of integers."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.zeros(2, 2))
        self.inner = nn.Linear(4, 4)
        self.inner.flat, self.inner.deep = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2, 2, 2))


BAD = {
    "saved-whole": ({"modules_to_save": ["mlp"]}, "modules_to_save=.'mlp'. takes all of them away"),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout is not for target_parameters"),
    "bias": ({"lora_bias": True}, "lora_bias is not for target_parameters"),
    "dora": ({"use_dora": True}, "use_dora is not for target_parameters"),
    "unknown": ({"target_parameters": ["zzz"]}, "target_parameters .*not found"),
    "one-half": ({"target_modules": ["up_proj"], "target_parameters": None}, "must name both or none"),
    "both-ways": (
        {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]},
        "in target_modules, and its weight in target_parameters",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_done_changes_nothing(options, message, untouched):
    model = base()
    config = peft_fast.LoraConfig(**{"target_modules": [], "target_parameters": BOTH, **options})
    before = copy.deepcopy(vars(config))
    with untouched(model), pytest.raises(ValueError, match=message):
        peft_fast.get_peft_model(model, config)
    assert vars(config) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [("own", "a parameter of the model itself"), ("flat", r"flat is \(3,\)"), ("deep", r"deep is \(2, 2, 2, 2\)")],
)
def test_parameters_that_cannot_be_adapted(name, message, untouched):
    model = Odd()
    config = peft_fast.LoraConfig(target_modules=[], target_parameters=[name])
    with untouched(model), pytest.raises(ValueError, match=message):
        peft_fast.get_peft_model(model, config)


def test_adapters_of_other_parameters_of_a_module_are_refused(untouched):
    """The names of the first one's weights would change: peft does it, and cannot load the first any more."""
    model = adapted(peft_fast, **CASES["both"][1])
    config = peft_fast.LoraConfig(target_modules=["q_proj"], target_parameters=["down_proj"])
    with untouched(model), pytest.raises(ValueError, match="have to be on the same parameters"):
        model.add_adapter("other", config)
    with untouched(model), pytest.raises(ValueError, match="are not found in a state_dict"):
        peft_fast.inject_adapter_in_model(
            config, base(), state_dict={"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(8, E)}
        )


def test_modules_that_are_trained_as_a_whole_get_no_adapters(tmp_path):
    """As layers in them. peft adapts the parameters of the copy and of the original, and cannot load what it saves."""
    options = {"target_modules": ["q_proj"], "target_parameters": BOTH, "modules_to_save": ["layers.0.mlp"]}
    model = adapted(peft_fast, **options)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    first, second = ({n for n in trained if f"layers.{i}.mlp" in n} for i in range(2))
    assert len(first) == 3
    assert all(".modules_to_save.default." in name and "lora_" not in name for name in first)
    assert len(second) == 4
    assert all("lora_" in name for name in second)
    logits(model).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.base_model.model.model.layers[0].mlp.modules_to_save.default.experts.down_proj.data.mul_(1.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    close(logits(peft_fast.PeftModel.from_pretrained(base(), tmp_path)), expected)
    close(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("library", [peft_fast, peft], ids=["ours", "pefts"])
def test_a_string_is_no_list(library):
    with pytest.raises(TypeError, match="target_parameters"):
        library.LoraConfig(target_parameters="down_proj")


def test_names_that_match_nothing_are_said():
    config = peft_fast.LoraConfig(target_modules=[], target_parameters=["down_proj", "zzz"])
    with pytest.warns(RuntimeWarning, match="zzz.*match nothing"):
        peft_fast.get_peft_model(base(), config)
