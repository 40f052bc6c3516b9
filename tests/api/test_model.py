"""PeftModel as the rest of the ecosystem meets it."""

import copy
import inspect
import pickle

import pytest
import torch
from transformers import GenerationConfig

import peft_fast
from peft_fast import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft_fast.quant import blockwise
from peft_fast.quant.bitsandbytes import read_linear
from peft_fast.quantized_linear import QuantizedLinear, quantize_linear_layers


def adapted(model, **options):
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))


def test_the_class_follows_the_task(llama):
    assert type(adapted(llama())) is PeftModelForCausalLM
    assert type(adapted(llama(), task_type=None)) is PeftModel


def test_forward_names_its_arguments(llama, tokens):
    names = list(inspect.signature(PeftModelForCausalLM.forward).parameters)
    assert names == [
        "self", "input_ids", "attention_mask", "inputs_embeds", "labels", "output_attentions", "output_hidden_states",
        "return_dict", "task_ids", "kwargs",
    ]  # fmt: skip
    model = adapted(llama())
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(tokens).logits)
    assert len(model(tokens, output_hidden_states=True).hidden_states) == 3
    assert isinstance(model(tokens, return_dict=False), tuple)
    mask = torch.ones_like(tokens)
    mask[:, :4] = 0
    assert not torch.equal(model(tokens, attention_mask=mask).logits, model(tokens).logits)
    assert model(tokens, position_ids=torch.arange(10)[None]).logits.shape == (3, 10, 96)


def test_what_is_not_built_is_refused(llama, tokens):
    with pytest.raises(ValueError, match="task_ids"):
        adapted(llama())(tokens, task_ids=tokens)


def test_the_base_model_shines_through(llama, trained, tokens):
    base = llama()
    model = trained(adapted(base)).eval()
    assert model.config is base.config
    assert model.get_base_model() is base
    assert model.base_model.model is base
    assert model.base_model.prefix == "lora_"
    assert model.device == base.device
    assert model._hf_peft_config_loaded
    assert model.active_peft_config is model.peft_config["default"]
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
    text = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=1, do_sample=False)
    step = model(tokens).logits[:, -1].argmax(-1)
    assert torch.equal(text[:, -1], step)
    model.generation_config = GenerationConfig(max_new_tokens=2, pad_token_id=0)
    assert model.generate(tokens, attention_mask=torch.ones_like(tokens)).shape == (3, 12)


def test_the_base_models_name_is_noted(llama):
    base = llama()
    base.name_or_path = "some/model"
    model = get_peft_model(base, LoraConfig(), revision="v2")
    assert model.peft_config["default"].base_model_name_or_path == "some/model"
    assert model.peft_config["default"].revision == "v2"
    with pytest.warns(UserWarning, match="was 'other/model' in the config"):
        get_peft_model(llama(), LoraConfig(base_model_name_or_path="other/model"))


@pytest.mark.parametrize("build", ["llama", "llama_4bit"])
def test_copies_and_pickles_are_the_same_model(request, trained, tokens, build):
    model = trained(adapted(request.getfixturevalue(build)(), target_modules="all-linear", modules_to_save=["norm"]))
    model.add_adapter("other", LoraConfig())
    expected = model(tokens).logits
    twins = (
        [copy.deepcopy(model)] if build == "llama_4bit" else [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    )
    for twin in twins:
        assert torch.equal(twin(tokens).logits, expected)
        assert list(twin.peft_config) == ["default", "other"]
        twin.set_adapter("other")
        assert not torch.equal(twin(tokens).logits, expected)
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_checkpointing_gives_the_same_gradients(llama, trained, tokens, reentrant, method, first):
    name = method.replace("enable", "kwargs")

    def checkpoint(model):
        getattr(model, method)(**{name: {"use_reentrant": reentrant}})
        return model

    plain = trained(adapted(llama()))
    checkpointed = trained(adapted(checkpoint(llama()) if first else llama()))
    if not first:
        checkpoint(checkpointed)
    assert checkpointed.is_activation_checkpointing
    for model in (plain, checkpointed):
        model.train()(tokens, labels=tokens).loss.backward()
    grads = [[p.grad for p in model.parameters() if p.requires_grad] for model in (plain, checkpointed)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_a_checkpointed_model_gets_inputs_that_require_grad(llama, trained, tokens):
    """Older transformers leave that to the adapter library."""
    base = llama()
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    base.disable_input_require_grads()
    model = trained(adapted(base)).train()
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.norm() > 0 for parameter in model.parameters() if parameter.requires_grad)


def test_dropout_is_the_same_in_recomputation(llama, trained, tokens):
    grads = []
    for checkpointed in (False, True):
        model = trained(adapted(llama(), lora_dropout=0.3)).train()
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(11)
        model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_trainable_parameters_count_4bit_weights_by_elements(llama, llama_4bit, capsys):
    expected = adapted(llama()).get_nb_trainable_parameters()
    assert adapted(llama_4bit()).get_nb_trainable_parameters() == expected
    assert adapted(quantize_linear_layers(llama())).get_nb_trainable_parameters() == expected
    adapted(llama()).print_trainable_parameters()
    trainable, total = expected
    shown = f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
    assert capsys.readouterr().out == shown


def test_our_own_4bit_layers_can_be_adapted(llama, trained, tokens):
    """Beside the dense model that has the dequantised weights."""
    base, dense = quantize_linear_layers(llama()), llama()
    for name, layer in base.named_modules():
        if isinstance(layer, QuantizedLinear):
            dense.get_submodule(name).weight.data = blockwise.dequantize(layer.quantized_weight)
    models = [trained(adapted(model, target_modules="all-linear")) for model in (base, dense)]
    outputs = [model(tokens, labels=tokens) for model in models]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    for one, other in zip(*([p.grad for p in model.parameters() if p.requires_grad] for model in models)):
        torch.testing.assert_close(one, other)


def test_merging_a_4bit_model_writes_the_sum_back_in_4_bits(llama_4bit, trained, tokens):
    model = trained(adapted(llama_4bit(), target_modules="all-linear"), std=0.2)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    total = blockwise.dequantize(layer.base_weight()) + layer.get_delta_weight("default")
    with pytest.warns(UserWarning, match="k-bit weight rounds"):
        merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, peft_fast.tuners.BaseTunerLayer) for module in merged.modules())
    written = blockwise.dequantize(read_linear(merged.model.layers[1].mlp.up_proj))
    assert (written - total).norm() < 0.12 * total.norm()  # what NF4 loses of any normally distributed weight
    assert merged.train()(tokens).logits.isfinite().all()


def test_importing_the_library_is_cheap():
    import subprocess
    import sys

    code = (
        "import sys, peft_fast; print(sorted({'peft', 'trl', 'accelerate', 'matplotlib', 'triton'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_merge_and_unload_takes_the_copy_of_the_adapters_it_names(llama, trained):
    def model():
        model = adapted(llama(), modules_to_save=["lm_head"])
        model.add_adapter("b", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        model.add_adapter("c", LoraConfig(target_modules=["q_proj"]))
        return trained(model)

    copies = model().base_model.model.lm_head.modules_to_save
    base = llama().lm_head.weight
    assert torch.equal(model().merge_and_unload(adapter_names=["b"]).lm_head.weight, copies["b"].weight)
    assert torch.equal(model().merge_and_unload().lm_head.weight, copies["default"].weight)
    assert torch.equal(model().merge_and_unload(adapter_names=["c"]).lm_head.weight, base)
    assert torch.equal(model().unload().lm_head.weight, base)
    two = model()
    with pytest.raises(ValueError, match="take one of them"):
        two.merge_and_unload(adapter_names=["default", "b"])
    two.merge_adapter(["default"])
    with pytest.raises(ValueError, match="take one of them"):
        two.merge_and_unload(adapter_names=["b"])


@pytest.mark.parametrize("ours", [True, False])
def test_unload_gives_a_merged_4bit_model_back_byte_for_byte(llama, llama_4bit, trained, ours):
    base = quantize_linear_layers(llama()) if ours else llama_4bit()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = trained(adapted(base, target_modules="all-linear"))
    model.merge_adapter()
    after = model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
