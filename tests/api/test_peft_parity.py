"""Beside peft 0.21.2 itself: the same names, the same initial weights, the same numbers, the same files."""

import warnings

import peft
import pytest
import torch

import peft_fast

CONFIGS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.layers\.1\.mlp\.(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "by-architecture": {},
    "full-path": {"target_modules": ["model.layers.0.mlp.up_proj", "o_proj"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["up_proj", "layers.0.self_attn.q_proj"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.0.mlp.up_proj": 2, "q_proj": 6},
        "alpha_pattern": {r".*\.1\..*up_proj": 32},
    },
    "rslora-gaussian": {"target_modules": ["q_proj"], "use_rslora": True, "init_lora_weights": "gaussian"},
    "no-init": {"target_modules": ["q_proj"], "init_lora_weights": False},
    "modules-to-save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved-and-meant": {"target_modules": "all-linear", "modules_to_save": ["down_proj"]},
    "bias-all": {"target_modules": ["q_proj", "up_proj"], "bias": "all"},
    "bias-lora-only": {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    "lora-bias": {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
    "head": {"target_modules": ["lm_head", "k_proj"]},
}
WITH_BIASES = {"attention_bias": True, "mlp_bias": True}


def make(library, model, seed=5, **options):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = library.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
        return library.get_peft_model(model, config)


def values(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_names_shapes_flags_and_initial_values_are_pefts(llama, options):
    ours, theirs = (make(library, llama(**WITH_BIASES), **options) for library in (peft_fast, peft))
    assert values(ours).keys() == values(theirs).keys()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert mine.dtype == other.dtype, name
        assert mine.requires_grad == other.requires_grad, name
        assert torch.equal(mine, other), name
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapters_on_half_precision_models_start_as_in_peft(llama, dtype, autocast_adapter_dtype):
    found = []
    for library in (peft_fast, peft):
        torch.manual_seed(5)
        config = library.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
        model = library.get_peft_model(llama(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
        found.append({name: value for name, value in values(model).items() if "lora_" in name})
    for name, mine in found[0].items():
        assert mine.dtype == found[1][name].dtype == (torch.float32 if autocast_adapter_dtype else dtype)
        assert torch.equal(mine, found[1][name])


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_gradients_are_pefts(llama, trained, tokens, options):
    ours, theirs = (trained(make(library, llama(**WITH_BIASES), **options)) for library in (peft_fast, peft))
    outputs = [model(input_ids=tokens, labels=tokens) for model in (ours, theirs)]
    assert relative(outputs[0].logits, outputs[1].logits) <= 1e-5
    for output in outputs:
        output.loss.backward()
    compared = 0
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None:
            assert relative(mine.grad, other.grad) <= 1e-5, name
            compared += 1
    assert compared


def test_several_active_adapters_add_up_as_in_peft(llama, trained, tokens):
    outputs = []
    for library in (peft_fast, peft):
        model = make(library, llama(), target_modules=["q_proj", "up_proj"])
        model.add_adapter("other", library.LoraConfig(r=3, lora_alpha=9, target_modules=["up_proj", "o_proj"]))
        model.base_model.set_adapter(["default", "other"])
        outputs.append(trained(model)(tokens).logits)
    assert relative(*outputs) <= 1e-5


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_files_load_both_ways_with_equal_logits(llama, trained, tokens, tmp_path, options):
    for writer, reader in ((peft_fast, peft), (peft, peft_fast)):
        written = trained(make(writer, llama(**WITH_BIASES), **options)).eval()
        folder = tmp_path / writer.__name__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # both say that they save an embedding
            written.save_pretrained(folder)
            read = reader.PeftModel.from_pretrained(llama(**WITH_BIASES), folder)
        assert type(read).__name__ == "PeftModelForCausalLM"
        assert relative(read(tokens).logits, written(tokens).logits) <= 1e-5


def test_files_have_the_same_keys(llama, tmp_path):
    from safetensors.torch import load_file

    for options in CONFIGS.values():
        keys = []
        for library in (peft_fast, peft):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                make(library, llama(**WITH_BIASES), **options).save_pretrained(tmp_path / library.__name__)
            keys.append(load_file(tmp_path / library.__name__ / "adapter_model.safetensors").keys())
        assert keys[0] == keys[1], options


def test_4bit_adapter_files_load_both_ways(llama_4bit, trained, tokens, tmp_path):
    for writer, reader in ((peft_fast, peft), (peft, peft_fast)):
        written = trained(make(writer, llama_4bit(), target_modules="all-linear"))
        written.save_pretrained(tmp_path / writer.__name__)
        read = reader.PeftModel.from_pretrained(llama_4bit(), tmp_path / writer.__name__, is_trainable=True)
        # Train mode: in eval mode bitsandbytes repacks its weights on some CPUs, with other scales.
        assert relative(read.train()(tokens).logits, written.train()(tokens).logits) <= 1e-5


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=str)
def test_fifty_steps_of_qlora_stay_beside_peft_and_bitsandbytes(llama_4bit, dtype, allowed):
    starts = torch.randint(0, 95, (50, 4, 1), generator=torch.Generator().manual_seed(1))
    data = 1 + (starts + torch.arange(16)) % 95  # counting: something that can be learnt
    losses = []
    for library in (peft_fast, peft):
        model = make(library, llama_4bit(dtype), target_modules="all-linear", r=8, lora_alpha=16).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses.append([])
        for batch in data:
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    ours, theirs = (torch.tensor(values) for values in losses)
    assert (ours - theirs).abs().max() <= allowed
    assert ours[-1] < 0.9 * ours[0]  # it did train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_gives_pefts_weights(llama, trained, dtype):
    merged = [
        trained(
            make(library, llama(dtype, **WITH_BIASES), target_modules="all-linear", lora_bias=True)
        ).merge_and_unload()
        for library in (peft_fast, peft)
    ]
    for (name, mine), other in zip(merged[0].named_parameters(), merged[1].parameters()):
        assert torch.equal(mine, other), name
