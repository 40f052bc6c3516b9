"""What people do to a whole PeftModel: copy, pickle, compile and checkpoint it. Several processes: test_ddp.py."""

import copy
import io
import pickle
from pathlib import Path

import peft
import pytest
import torch

import peft_fast
from peft_fast import LoraConfig, PeftModel, get_model_status, get_peft_model

ROOT = Path(__file__).parents[2]
ALL = "all-linear"


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_torch_save,
}


def adapted(base, library=peft_fast, **options):
    torch.manual_seed(5)
    return library.get_peft_model(base, library.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))


def step(model, tokens, dropout_seed=0):
    """(loss, gradients by name) of one training step's backward."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(dropout_seed)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, **options):
    torch.testing.assert_close(one[0], other[0], **options)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], msg=lambda text, name=name: f"{name}: {text}", **options)


STATES = {
    "plain": lambda model: None,
    "second active": lambda model: model.set_adapter("other"),
    "both active": lambda model: model.base_model.set_adapter(["default", "other"]),
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "scaled": lambda model: [m.scale_layer(3) for m in model.modules() if hasattr(m, "scale_layer")],
    "frozen": lambda model: model.set_requires_grad("default", False),
    "eval": lambda model: model.eval(),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("state", STATES)
def test_a_copy_is_the_same_and_apart(llama, trained, tokens, how, state):
    with_bias = state != "merged"  # the MLP's layers have no bias to merge it into
    model = adapted(llama(attention_bias=True), target_modules=ALL, modules_to_save=["lm_head"], lora_bias=with_bias)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_alpha=3))
    trained(model)
    STATES[state](model)
    twin = COPIES[how](model)
    assert type(twin) is type(model)
    assert twin.peft_config == model.peft_config
    assert twin.active_adapters == model.active_adapters
    assert get_model_status(twin) == get_model_status(model)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    expected = model(tokens).logits
    assert torch.equal(twin(tokens).logits, expected)
    for parameter in twin.parameters():
        parameter.data.add_(1)
    assert torch.equal(model(tokens).logits, expected)
    assert not torch.equal(twin(tokens).logits, expected)
    twin.delete_adapter("other")
    assert list(model.peft_config) == ["default", "other"]
    if state == "merged":
        model.unmerge_adapter()
    assert type(model.unload()).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("how", COPIES)
def test_training_goes_on_in_a_copy(llama, trained, tokens, how):
    model = trained(adapted(llama(), target_modules=ALL, lora_dropout=0.1))
    twin = COPIES[how](model)
    assert_same(step(twin, tokens), step(model, tokens), rtol=0, atol=0)


def test_state_dicts_go_through_files_without_code(llama, trained, tokens, tmp_path):
    model = trained(adapted(llama(), modules_to_save=["lm_head"])).eval()
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    twin = adapted(llama(), modules_to_save=["lm_head"]).eval()
    result = twin.load_state_dict(torch.load(tmp_path / "whole.pt", weights_only=True))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(twin(tokens).logits, model(tokens).logits)


OPTIONS = [{}, pytest.param({"lora_dropout": 0.1, "modules_to_save": ["lm_head"]}, marks=pytest.mark.slow)]


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.usefixtures("keys_drawn_one_by_one")  # groups, which are not compiled, draw theirs together
    def test_losses_and_gradients_are_the_eager_ones(self, llama, trained, tokens, options):
        model = trained(adapted(llama(), target_modules=ALL, **options))
        expected = step(model, tokens)
        compiled = torch.compile(model, backend="aot_eager")
        loss, gradients = step(compiled, tokens)
        named = {name.removeprefix("_orig_mod."): value for name, value in gradients.items()}
        assert_same((loss, named), expected)

    @pytest.mark.slow
    def test_switching_adapters_and_saving(self, llama, trained, tokens, tmp_path):
        model = adapted(llama())
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        trained(model).eval()
        eager = copy.deepcopy(model)
        compiled = torch.compile(model, backend="aot_eager")
        with torch.no_grad():
            for name in ("default", "other", "default"):
                compiled.set_adapter(name)
                eager.set_adapter(name)
                torch.testing.assert_close(compiled(tokens).logits, eager(tokens).logits)
            with compiled.disable_adapter(), eager.disable_adapter():
                torch.testing.assert_close(compiled(tokens).logits, eager(tokens).logits)
        compiled.save_pretrained(tmp_path)
        read = PeftModel.from_pretrained(llama(), tmp_path)
        assert torch.equal(read(tokens).logits, eager(tokens).logits)

    @pytest.mark.slow
    def test_in_place(self, llama, trained, tokens):
        model = trained(adapted(llama())).eval()
        expected = model(tokens).logits
        keys = list(model.state_dict())
        model.compile(backend="aot_eager")
        torch.testing.assert_close(model(tokens).logits, expected)
        assert list(model.state_dict()) == keys

    @pytest.mark.slow
    def test_a_base_model_that_is_compiled_already(self, llama, trained, tokens, tmp_path):
        """Names have an _orig_mod in them then; files travel to models that are not compiled."""
        model = trained(
            get_peft_model(torch.compile(llama(), backend="aot_eager"), LoraConfig(target_modules=["q_proj"]))
        )
        model.eval().save_pretrained(tmp_path)
        read = PeftModel.from_pretrained(llama(), tmp_path)
        torch.testing.assert_close(read(tokens).logits, model(tokens).logits)


CHECKPOINTS = [{"use_reentrant": True}, {"use_reentrant": False}]


class TestCheckpointing:
    @pytest.mark.parametrize("kwargs", CHECKPOINTS, ids=str)
    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_gradients_are_those_without(self, llama, trained, tokens, kwargs, dropout, when):
        """Masks of dropout are drawn again, and are the same."""
        expected = step(trained(adapted(llama(), target_modules=ALL, lora_dropout=dropout)), tokens)
        base = llama()
        if when == "before":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model = trained(adapted(base, target_modules=ALL, lora_dropout=dropout)).train()
        if when == "after":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
        assert all(layer.gradient_checkpointing for layer in model.model.model.layers)
        got = step(model, tokens)
        assert len(got[1]) == len(expected[1]) == 28
        assert_same(got, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("kwargs", [*CHECKPOINTS, None], ids=str)
    def test_enabling_it_through_the_model_trains_what_peft_trains(self, llama, tokens, kwargs):
        trained_names = []
        for library in (peft_fast, peft):
            model = adapted(llama(), library).train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            trained_names.append(set(step(model, tokens)[1]))
        assert trained_names[0] >= trained_names[1]

    def test_with_4_bits(self, llama_4bit, trained, tokens):
        expected = step(trained(adapted(llama_4bit(), target_modules=ALL, lora_dropout=0.1)), tokens)
        base = llama_4bit()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        got = step(trained(adapted(base, target_modules=ALL, lora_dropout=0.1)).train(), tokens)
        assert_same(got, expected, rtol=0, atol=0)
