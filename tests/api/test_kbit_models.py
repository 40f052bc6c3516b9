"""Models on bitsandbytes' 4- and 8-bit layers, as from_pretrained makes them: training, evaluating, saving."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import peft_fast
from peft_fast import LoraConfig, get_peft_model, quantize_linear_layers
from peft_fast.quant import bitsandbytes
from peft_fast.tuners import BaseTunerLayer

KINDS = ("llama", "qwen2", "gpt2")
SUBSET = {"llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
every_model = pytest.mark.parametrize("kind", KINDS)
every_width = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(autouse=True)
def _bitsandbytes_in_eager_mode():
    """bitsandbytes compiles its CPU dequantisation anew for every shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def adapted(library, model, seed=5, **options):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = library.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
        return library.get_peft_model(model, config)


def repackable(model):
    """bitsandbytes' 4-bit layers that would rewrite their weight in eval mode."""
    return [m for m in model.modules() if bitsandbytes.is_linear4bit(m) and getattr(m, bitsandbytes.REPACKS)]


def losses(model, tokens, steps, evaluate):
    """The losses of so many steps of training; halfway the model is evaluated, or not. Every gradient must be there."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    found = []
    for step in range(steps):
        if evaluate and step == steps // 2:
            with torch.no_grad():
                for inputs in (tokens, tokens[:1, :1]):  # a single token takes bitsandbytes' other kernel
                    assert model.eval()(inputs).logits.isfinite().all()
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.requires_grad}
        zero = [name for name, norm in norms.items() if not norm > 0 and not (step == 0 and "lora_A" in name)]
        assert not zero, f"step {step}: no gradient in {zero}"
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@every_model
@every_width
@pytest.mark.parametrize("targets", ["all-linear", "subset"])
def test_evaluating_changes_nothing_about_the_training(load, tokens, kind, bits, targets):
    """bitsandbytes' 4-bit layers would repack themselves in eval mode on CPUs with bf16 instructions, adapted or not,
    and pass no gradient from then on."""
    options = {"target_modules": SUBSET[kind] if targets == "subset" else targets}
    runs = [losses(adapted(peft_fast, load(kind, bits), **options), tokens, 6, evaluate) for evaluate in (False, True)]
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0] - 0.05


def test_evaluating_through_the_trainer(load, tokens, tmp_path):
    """With eval_steps, as users meet it; only some layers are adapted. Gradients: trainer's own log."""
    rows = [{"input_ids": row, "labels": row} for row in tokens.tolist() * 8]
    logs = []
    for evaluation in ({"eval_strategy": "no"}, {"eval_strategy": "steps", "eval_steps": 2}):
        model = adapted(peft_fast, load("llama", 4), target_modules=["q_proj", "v_proj"])
        arguments = TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=3, learning_rate=1e-2, logging_steps=1, seed=1,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **evaluation,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        logs.append([(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "grad_norm" in row])
    assert logs[0] == logs[1]
    assert all(norm > 0 for _, norm in logs[0])


def test_the_layers_may_not_repack_while_there_is_an_adapter_and_may_again_afterwards(load, tokens, untouched):
    base = load("llama", 4)
    before = repackable(base)
    if not before:
        pytest.skip("bitsandbytes does not repack on this CPU")
    assert len(before) == 14
    with untouched(base), pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(base, LoraConfig(target_modules=["nothing"]))
    assert repackable(base) == before
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    assert not repackable(base)
    model.add_adapter("other", LoraConfig(target_modules=["v_proj"]))
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="'other' is active now"):
        model.delete_adapter("default")
    assert not repackable(base)
    model.delete_adapter("other")
    assert repackable(base) == before
    model.add_adapter("third", LoraConfig(target_modules=["q_proj"]))
    assert not repackable(base)
    assert model.unload() is base
    assert repackable(base) == before
    assert not repackable(twin)
    assert len(repackable(twin.merge_and_unload())) == 14


def test_a_4bit_layer_with_hooks_is_called_and_not_repacked(load, tokens):
    """What a hook does must happen, so the layer itself runs, in eval mode too."""
    model = adapted(peft_fast, load("llama", 4), target_modules="all-linear", init_lora_weights=False)
    layer, modes = model.base_model.model.model.layers[0].mlp.up_proj.base_layer, []
    before = layer.weight.data.clone()
    layer.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    with torch.no_grad():
        model.eval()(tokens)
    assert modes == [False]
    assert torch.equal(layer.weight.data, before)
    losses(model, tokens, 2, evaluate=True)


@every_width
def test_copies_and_pickles_are_the_same_model(load, trained, tokens, bits):
    model = trained(adapted(peft_fast, load("qwen2", bits), target_modules="all-linear"))
    expected = model.train()(tokens).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens).logits, expected)
        losses(twin, tokens, 2, evaluate=True)
        twin.merge_and_unload()
        assert len(repackable(twin)) == len(model.base_model._kept_unpacked)
    assert torch.equal(model(tokens).logits, expected)


def test_layers_that_are_repacked_already_are_unpacked(load, tokens):
    """With the bf16 rounding of their scales that the repacking brought, those without an adapter too."""
    base = load("llama", 4)
    exact = base.train()(tokens).logits
    with torch.no_grad():
        base.eval()(tokens)
    if not bitsandbytes.is_repacked(base.model.layers[0].mlp.up_proj):
        pytest.skip("bitsandbytes does not repack on this CPU")
    with pytest.warns(UserWarning, match="rounds their scales to bf16"):
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert not any(bitsandbytes.is_repacked(m) for m in base.modules() if bitsandbytes.is_linear4bit(m))
    torch.testing.assert_close(model.train()(tokens).logits, exact, rtol=2e-2, atol=2e-2)
    losses(model, tokens, 4, evaluate=True)


@every_model
@every_width
def test_adapters_start_train_and_count_as_in_peft(load, trained, tokens, kind, bits):
    ours, theirs = (adapted(lib, load(kind, bits), target_modules="all-linear") for lib in (peft_fast, peft))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (mine.dtype, mine.shape, mine.requires_grad) == (other.dtype, other.shape, other.requires_grad), name
        assert torch.equal(mine, other), name
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    trained(ours), trained(theirs)
    outputs = [model.train()(input_ids=tokens, labels=tokens) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        mine, other = (model.eval()(tokens).logits for model in (ours, theirs))
    distance = ((mine - other).norm() / mine.norm()).item()
    if bits == 8:  # bitsandbytes rounds the activations to 8 bits in eval mode, ours do not
        assert 1e-3 < distance < 2e-2


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@every_width
def test_adapters_on_a_16bit_model_have_pefts_dtype(load, bits, autocast_adapter_dtype):
    found = []
    for library in (peft_fast, peft):
        torch.manual_seed(5)
        config = library.LoraConfig(r=4, target_modules=["q_proj"])
        model = load("llama", bits, torch.bfloat16)
        model = library.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
        found.append({n: p for n, p in model.named_parameters() if "lora_" in n})
    for name, mine in found[0].items():
        assert mine.dtype == found[1][name].dtype, name
        assert torch.equal(mine, found[1][name])


@every_model
@every_width
def test_saved_models_and_adapters_come_back_bit_for_bit(load, trained, tokens, tmp_path, kind, bits):
    """The quantised base through save_pretrained and from_pretrained, the adapter through files."""
    model = trained(adapted(peft_fast, load(kind, bits), target_modules="all-linear"))
    expected = [model.train(mode)(tokens).logits for mode in (True, False)]
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    again = load(tmp_path / "base", None)
    assert again.config.quantization_config.load_in_4bit == (bits == 4)
    again = peft_fast.PeftModel.from_pretrained(again, tmp_path / "adapter")
    for mode, logits in zip((True, False), expected):
        assert torch.equal(again.train(mode)(tokens).logits, logits)


@every_width
def test_merging_and_unmerging_a_loaded_model(load, trained, tokens, bits):
    base = load("qwen2", bits)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = trained(adapted(peft_fast, base, target_modules="all-linear"), std=0.2)
    exact, plain = model.train()(tokens).logits, None
    with model.disable_adapter():
        plain = model(tokens).logits
    with pytest.warns(UserWarning, match="k-bit weight rounds"):
        model.merge_adapter(safe_merge=True)
    merged = model(tokens).logits
    assert (merged - exact).norm() < 0.5 * (plain - exact).norm()
    twin = copy.deepcopy(model)
    after = model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    alone = twin.merge_and_unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in alone.modules())
    torch.testing.assert_close(alone.train()(tokens).logits, merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_in_a_float_storage(load, trained, tokens, tmp_path, storage):
    """What FSDP needs: the same model, whatever dtype its bytes lie in, also after its layers lost their Params4bit."""
    models = [adapted(peft_fast, load("qwen2", 4), target_modules="all-linear")]
    models += [
        adapted(library, load("qwen2", 4, bnb_4bit_quant_storage=storage), target_modules="all-linear")
        for library in (peft_fast, peft)
    ]
    assert models[1].get_nb_trainable_parameters() == models[2].get_nb_trainable_parameters()
    assert models[0].get_nb_trainable_parameters() == models[1].get_nb_trainable_parameters()
    plain, stored = map(trained, models[:2])
    layer = stored.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == storage
    expected = [plain.train(mode)(tokens).logits for mode in (True, False)]
    for mode, logits in zip((True, False), expected):
        assert torch.equal(stored.train(mode)(tokens).logits, logits)
    for module in stored.modules():
        if bitsandbytes.is_linear4bit(module):
            module.quant_state = module.weight.quant_state
            module.weight = torch.nn.Parameter(module.weight.data, requires_grad=False)
    assert type(layer.weight) is torch.nn.Parameter
    assert stored.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    for mode, logits in zip((True, False), expected):
        assert torch.equal(stored.train(mode)(tokens).logits, logits)
    assert losses(stored, tokens, 3, evaluate=True) == losses(plain, tokens, 3, evaluate=False)
    stored.merge_adapter()
    stored.unmerge_adapter()
    merged = [model.merge_to_16bit(progressbar=False) for model in (stored, plain)]
    for (name, mine), other in zip(merged[0].named_parameters(), merged[1].parameters(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("bits", [4, 8])
def test_our_own_layers_come_back_bit_for_bit(llama, trained, tokens, tmp_path, bits):
    """Through a file of safetensors, into a model that was quantised anew from other weights."""
    model = trained(adapted(peft_fast, quantize_linear_layers(llama(), bits=bits), target_modules="all-linear"))
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    save_file(model.unload().state_dict(), tmp_path / "base.safetensors")
    other = llama()
    for parameter in other.parameters():
        parameter.data.normal_()
    quantize_linear_layers(other, bits=bits).load_state_dict(load_file(tmp_path / "base.safetensors"))
    assert torch.equal(peft_fast.PeftModel.from_pretrained(other, tmp_path)(tokens).logits, expected)


def test_parameters_are_counted_unpacked(load, llama, capsys):
    """4 bits, 8 bits, ours and bitsandbytes': the number of the dense model's parameters, which is peft's too."""
    expected = adapted(peft, load("llama", None)).get_nb_trainable_parameters()
    models = [load("llama", bits) for bits in (4, 8)]
    models += [quantize_linear_layers(llama(), bits=bits) for bits in (4, 8)]
    for model in models:
        model = adapted(peft_fast, model)
        assert model.get_nb_trainable_parameters() == expected
        model.print_trainable_parameters()
        assert f"|| all params: {expected[1]:,d} ||" in capsys.readouterr().out
