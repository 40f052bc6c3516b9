"""prepare_model_for_kbit_training and cast_mixed_precision_params: dtypes and flags beside peft, and training after."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from peft_fast import (
    LoraConfig,
    QuantizedLinear,
    cast_mixed_precision_params,
    get_peft_model,
    prepare_model_for_kbit_training,
    quantize_linear_layers,
)
from peft_fast.finetune.memory import kept_for_backward

HALF = [torch.bfloat16, torch.float16]
REENTRANT = [None, {}, {"use_reentrant": True}, {"use_reentrant": False}]


@pytest.fixture(autouse=True)
def _bitsandbytes_in_eager_mode():
    """bitsandbytes compiles its CPU dequantisation anew for every shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def adapted(model, **options):
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))


def photograph(model):
    """What preparing a model changes."""
    checkpointing = {}
    for name, module in model.named_modules():
        if hasattr(module, "gradient_checkpointing"):
            function = vars(module).get("_gradient_checkpointing_func")  # a partial of torch's checkpoint
            # peft says nothing where nothing was asked for, and torch then takes True, with a warning
            options = function and {"use_reentrant": True} | function.keywords
            checkpointing[name] = module.gradient_checkpointing, options
    return {
        "parameters": {n: (type(p).__name__, p.dtype, p.shape, p.requires_grad) for n, p in model.named_parameters()},
        "buffers": {name: buffer.dtype for name, buffer in model.named_buffers()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "checkpointing": checkpointing,
        "is_checkpointing": model.is_activation_checkpointing,
        "tied": len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters())),
    }


def prepared_by_peft(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it calls transformers by a name of the past
        return peft.prepare_model_for_kbit_training(model, **options)


class TestPreparing:
    @pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
    @pytest.mark.parametrize("bits", [4, 8, None])
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_dtypes_flags_and_hooks_are_pefts(self, load, kind, bits, dtype):
        ours, theirs = (
            photograph(prepare(load(kind, bits, dtype)))
            for prepare in (prepare_model_for_kbit_training, prepared_by_peft)
        )
        assert ours == theirs
        assert ours["is_checkpointing"] == (bits is not None)
        assert not any(flag for *_, flag in ours["parameters"].values())

    @pytest.mark.parametrize("kwargs", REENTRANT, ids=str)
    @pytest.mark.parametrize("checkpoint", [True, False])
    def test_checkpointing_is_pefts(self, load, kwargs, checkpoint):
        options = {"use_gradient_checkpointing": checkpoint, "gradient_checkpointing_kwargs": kwargs}
        ours, theirs = (
            photograph(prepare(load("llama", 8), **options))
            for prepare in (prepare_model_for_kbit_training, prepared_by_peft)
        )
        assert ours == theirs

    @pytest.mark.parametrize("build", ["nf4", "int8", "bitsandbytes"])
    @pytest.mark.parametrize("kwargs", REENTRANT, ids=str)
    def test_every_adapter_gets_a_gradient(self, llama, llama_4bit, tokens, build, kwargs):
        if build == "bitsandbytes":
            model = llama_4bit(torch.bfloat16)
        else:
            model = quantize_linear_layers(llama(torch.bfloat16), bits=8 if build == "int8" else 4)
        assert prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs) is model
        codes = {torch.int8} if build == "int8" else {torch.uint8}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} | codes
        seen = []
        model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model = adapted(model, target_modules="all-linear").train()
        model(tokens, labels=tokens).loss.backward()
        assert seen[0].requires_grad  # the output of the INPUT embedding
        assert seen[0].dtype == torch.float32
        assert all(p.grad.norm() > 0 for n, p in model.named_parameters() if "lora_B" in n)

    @pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("stripped", [False, True])
    def test_bytes_in_a_float_storage_are_left_alone(self, llama_4bit, storage, stripped):
        model = llama_4bit(torch.bfloat16)
        layer = model.model.layers[0].mlp.up_proj
        layer.weight.data = layer.weight.data.view(-1).view(storage).view(-1, 1)
        if stripped:  # as FSDP does
            layer.quant_state = layer.weight.quant_state
            layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        before = layer.weight.data.view(torch.uint8).clone()
        prepare_model_for_kbit_training(model)
        assert layer.weight.dtype == storage
        assert torch.equal(layer.weight.data.view(torch.uint8), before)
        assert model.model.norm.weight.dtype == torch.float32

    def test_tied_weights_stay_tied(self, llama):
        model = quantize_linear_layers(llama(torch.bfloat16, tie_word_embeddings=True))
        prepare_model_for_kbit_training(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == torch.float32

    def test_a_model_without_transformers_hooks(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.linear = nn.Embedding(4, 64), nn.Linear(64, 64)

            def get_input_embeddings(self):
                return self.embedding

            def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
                self.options = gradient_checkpointing_kwargs

        model = prepare_model_for_kbit_training(quantize_linear_layers(Own()))
        assert model.embedding(torch.zeros(1, dtype=torch.long)).requires_grad
        assert model.options == {"use_reentrant": True}


class TestTheLeanVariant:
    """upcast=False: the residual stream stays in the model's own bf16."""

    def model(self, llama_4bit, upcast, checkpoint=False):
        base = prepare_model_for_kbit_training(
            llama_4bit(torch.bfloat16, hidden_size=256, intermediate_size=704, num_hidden_layers=4),
            use_gradient_checkpointing=checkpoint,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpoint else None,
            upcast=upcast,
        )
        return adapted(base, target_modules="all-linear")

    def test_nothing_is_cast(self, llama_4bit):
        model = prepare_model_for_kbit_training(llama_4bit(torch.bfloat16), upcast=False)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16, torch.uint8}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.is_activation_checkpointing

    @pytest.mark.parametrize(("checkpoint", "ratio"), [(False, 0.80), (True, 0.75)])
    def test_keeps_three_quarters_of_the_bytes_for_backward(self, llama_4bit, checkpoint, ratio):
        kept = [kept_for_backward(self.model(llama_4bit, u, checkpoint), 256, torch.float32) for u in (False, True)]
        assert kept[0] <= ratio * kept[1]

    def test_learns_the_same(self, llama_4bit, tokens):
        """The distance to the fp32 residual stream: over 50 steps of three seeds 6e-4 at most and 1e-4 in the mean."""
        losses = []
        for upcast in (True, False):
            model = self.model(llama_4bit, upcast).train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
            found = []
            for _ in range(15):
                loss = model(tokens, labels=tokens).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            losses.append(torch.tensor(found))
        distance = (losses[0] - losses[1]).abs()
        assert losses[1][-1] < losses[1][0] - 0.5
        assert distance.max() < 2e-3
        assert distance.mean() < 5e-4


class TestCastingForMixedPrecision:
    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("build", ["dense", "nf4", "int8", "bitsandbytes"])
    def test_frozen_to_16_bits_trained_to_32(self, llama, llama_4bit, dtype, build):
        base = llama_4bit() if build == "bitsandbytes" else llama(tie_word_embeddings=True)
        if build in ("nf4", "int8"):
            quantize_linear_layers(base, bits=8 if build == "int8" else 4)
        model = adapted(base, target_modules="all-linear", modules_to_save=["norm"]).bfloat16()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        assert cast_mixed_precision_params(model, dtype) is None
        for name, parameter in model.named_parameters():
            kbit = not before[name].is_floating_point()
            expected = before[name].dtype if kbit else torch.float32 if parameter.requires_grad else dtype
            assert parameter.dtype == expected, name
            assert torch.equal(parameter, before[name].to(expected)), name
        if build != "bitsandbytes":
            assert base.lm_head.weight is base.model.embed_tokens.weight
        assert all(buffer.dtype != dtype or "inv_freq" not in name for name, buffer in llama().named_buffers())

    def test_bytes_in_a_float_storage_are_left_alone(self, llama_4bit):
        model = llama_4bit()
        layer = model.model.layers[0].mlp.up_proj
        layer.weight.data = layer.weight.data.view(-1).view(torch.bfloat16).view(-1, 1)
        before = layer.weight.data.clone()
        cast_mixed_precision_params(model, torch.float16)
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight.data.view(torch.uint8), before.view(torch.uint8))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, "bfloat16", None])
    def test_other_dtypes_are_refused(self, llama, dtype, untouched):
        model = llama()
        with untouched(model), pytest.raises(ValueError, match=r"must be torch\.float16 or torch\.bfloat16, got"):
            cast_mixed_precision_params(model, dtype)

    def test_no_second_copy_of_the_model_exists(self, monkeypatch):
        """Tensors are cast one at a time: when the next is cast, the one before has lost its fp32 values."""
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))).requires_grad_(False)
        in_fp32 = []
        cast = torch.Tensor.to

        def count(tensor, *args, **kwargs):
            in_fp32.append(sum(parameter.dtype == torch.float32 for parameter in model.parameters()))
            return cast(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "to", count)
        cast_mixed_precision_params(model, torch.bfloat16)
        assert in_fp32 == [4, 3, 2, 1]

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    @pytest.mark.parametrize("build", ["dense", "nf4", "int8", "bitsandbytes"])
    def test_training_under_autocast(self, llama, llama_4bit, tokens, dtype, build):
        """fp16 with a GradScaler, as it needs; beside the same training in fp32."""

        def base():
            if build == "bitsandbytes":
                return llama_4bit()
            return llama() if build == "dense" else quantize_linear_layers(llama(), bits=8 if build == "int8" else 4)

        exact, mixed = (adapted(base(), target_modules="all-linear").train() for _ in range(2))
        cast_mixed_precision_params(mixed, dtype)
        losses = []
        for model in (exact, mixed):
            scaler = torch.amp.GradScaler("cpu", enabled=model is mixed and dtype == torch.float16, init_scale=2**12)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
            found = []
            for _ in range(12):
                with torch.autocast("cpu", dtype, enabled=model is mixed):
                    loss = model(tokens, labels=tokens).loss
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                found.append(loss.item())
            losses.append(found)
        assert losses[1][-1] < losses[1][0] - 0.3
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=5e-2)


def test_copies_of_a_prepared_model_are_prepared(llama):
    model = prepare_model_for_kbit_training(quantize_linear_layers(llama(torch.bfloat16), bits=8))
    twin = copy.deepcopy(model)
    assert photograph(twin)["parameters"] == photograph(model)["parameters"]
    assert isinstance(twin.model.layers[0].mlp.up_proj, QuantizedLinear)


def test_what_cannot_be_checkpointed_is_refused_before_anything_changes():
    model = quantize_linear_layers(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).bfloat16())
    with pytest.raises(
        ValueError, match=r"Sequential cannot be checkpointed: .* pass use_gradient_checkpointing=False"
    ):
        prepare_model_for_kbit_training(model)
    assert model[1].weight.dtype == torch.bfloat16
    assert model[1].weight.requires_grad
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert model[1].weight.dtype == torch.float32


def test_adapters_that_are_there_already_are_frozen_with_a_warning():
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="call this before get_peft_model"):
        prepare_model_for_kbit_training(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_gradients_are_cast_with_their_parameters():
    layer = nn.Linear(8, 8).half()
    layer.weight.grad = torch.ones(8, 8, dtype=torch.float16)
    cast_mixed_precision_params(layer, torch.bfloat16)
    assert (layer.weight.dtype, layer.weight.grad.dtype) == (torch.float32, torch.float32)
