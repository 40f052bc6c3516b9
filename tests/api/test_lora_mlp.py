"""MLPs that run as one op: which, that nothing else about them changes, and that they compute the same."""

import copy
import io
import pickle

import peft
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.llama.modeling_llama import LlamaMLP

import peft_fast
from peft_fast import LoraConfig, PeftModel, get_peft_model, quantize_linear_layers, set_lora_mlp
from peft_fast.testing import assert_as_accurate_as_torch, relative_error
from peft_fast.tuners.base_weight import base_weight
from peft_fast.tuners.lora.mlp import LoraMLP

from .lora_mlp_models import (
    TARGETS,
    Block,
    Calling,
    Dropping,
    Gated,
    Inherits,
    K,
    N,
    Scaled,
    Swapped,
    adapted,
    four_bit,
    mlp_of,
    results,
    row,
)


def repr_of(activation) -> str:
    """The same in every process: a function's repr has its address."""
    return getattr(activation, "__name__", repr(activation))


class TestWhich:
    @pytest.mark.parametrize(
        "config", [MistralConfig, Qwen2Config, Qwen3Config, GemmaConfig, Gemma2Config, Gemma3TextConfig]
    )
    def test_transformers_models(self, config):
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
        base = AutoModelForCausalLM.from_config(config(**sizes, num_key_value_heads=1, vocab_size=32, pad_token_id=0))
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
        assert row(model)[0] == "mlp"
        ids = torch.randint(1, 32, (2, 5))
        fused = model(ids).logits
        set_lora_mlp(model, "off")
        torch.testing.assert_close(fused, model(ids).logits)

    @pytest.mark.parametrize("cls", [Gated, Inherits])
    def test_somebodys_own_with_the_same_forward(self, cls):
        model = adapted(cls())
        assert row(model)[0] == "mlp"
        assert isinstance(mlp_of(model), cls)

    @pytest.mark.parametrize("cls", [Scaled, Swapped, Dropping, Calling])
    def test_look_alikes_run_as_they_are(self, cls):
        mlp = cls()
        model, x = adapted(mlp), torch.randn(3, K)
        assert type(mlp) is cls
        unknown = f"{cls.__name__}.forward is not known to be down(act(gate(x)) * up(x))"
        together = "; up_proj, gate_proj" if cls is Swapped else "; gate_proj, up_proj"
        assert row(model) == ("group", f"{unknown}{together} share their input: one op")
        layers = {name: getattr(mlp, name) for name in TARGETS}
        torch.manual_seed(0)
        y = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(y, cls.__call__(mlp, x) if cls is Calling else cls.forward(mlp, x))
        plain = layers["down_proj"](F.silu(layers["gate_proj"](x)) * layers["up_proj"](x))
        assert relative_error(y, plain) > 0.1

    def test_a_transformers_look_alike(self):
        """Gemma3n drops most of its gates out."""
        from transformers import Gemma3nTextConfig

        config = Gemma3nTextConfig(
            hidden_size=K, intermediate_size=N, num_hidden_layers=1, activation_sparsity_pattern=[0.9]
        )
        assert "Gemma3nTextMLP.forward is not known" in row(adapted(Gemma3nTextMLP(config, 0)))[1]

    @pytest.mark.parametrize(
        "name", ["silu", "swish", "gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new"]
    )
    def test_activations_by_the_names_of_model_configs(self, name):
        model, x = adapted(Gated(ACT2FN[name])), torch.randn(9, K)
        assert row(model)[0] == "mlp"
        fused, unfused = results(model, x, "fused"), results(model, x, "off")
        for key, value in unfused.items():
            torch.testing.assert_close(fused[key], value, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), F.silu, F.gelu], ids=repr_of)
    def test_torchs_own_activations(self, act):
        model, x = adapted(Gated(act)), torch.randn(9, K)
        assert row(model)[0] == "mlp"
        torch.testing.assert_close(results(model, x, "fused")["x"], results(model, x, "off")["x"])

    @pytest.mark.parametrize("name", ["relu", "quick_gelu", "gelu_fast", "gelu_10", "relu2"])
    def test_other_activations_stand_down(self, name):
        route, because = row(adapted(Gated(ACT2FN[name])))
        assert route == "layers"
        assert because.startswith("its activation is none of")


class TestTheSame:
    @pytest.mark.parametrize("targets", [TARGETS, ["gate_proj", "up_proj"], ["down_proj"]], ids=len)
    @pytest.mark.parametrize("kind", ["dense", "bitsandbytes", "ours", "ours-int8"])
    @pytest.mark.parametrize("p", [0.0, 0.2])
    @pytest.mark.usefixtures("keys_drawn_one_by_one")
    def test_as_layer_by_layer(self, kind, targets, p):
        """The same gradients from the same masks, whether x is kept or g and u too."""
        mlp = Gated()
        if kind == "bitsandbytes":
            four_bit(mlp)
        elif kind != "dense":
            quantize_linear_layers(mlp, 8 if kind.endswith("int8") else 4)
        model = adapted(mlp, target_modules=targets, lora_dropout=p, lora_bias=True)
        if kind == "ours-int8" and len(targets) < 3:
            assert "has no adapter and multiplies in 8 bits" in row(model)[1]
        else:
            assert row(model)[0] == "mlp"
        x = torch.randn(2, 6, K)
        unfused = results(model, x, "off")
        for mode in ("fused", "recompute"):
            fused = results(model, x, mode)
            assert fused.keys() == unfused.keys()
            for name, value in unfused.items():
                torch.testing.assert_close(fused[name], value, atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_as_accurate_as_peft_in_a_fp32_stream(self, autocast, seed):
        """4-bit layers that compute in bf16 under a fp32 residual stream. peft returns fp32 from gate and up and takes
        the activation there; ours keeps them, and without Triton act(g), in bf16. Against fp64 on the dequantised
        weights: no worse than our layers one by one, and under autocast than peft (without it, peft runs A and B in
        fp32, and our layers in bf16, fused or not)."""
        torch.manual_seed(seed)
        mlp = four_bit(Gated(bias=False).to(torch.bfloat16), torch.bfloat16)
        twin, x = copy.deepcopy(mlp), torch.randn(64, K)
        ours = adapted(mlp)
        theirs = peft.get_peft_model(Block(twin), _peft_config())
        exact = Block(Gated(bias=False)).double()
        for name in TARGETS:
            weight = base_weight(getattr(mlp, name).base_layer)
            getattr(exact.mlp, name).weight.data = peft_fast.ops.dequantize(weight, torch.float32).double()
        exact = get_peft_model(exact, LoraConfig(r=4, target_modules=TARGETS), autocast_adapter_dtype=False).double()
        adapters = {name: value for name, value in ours.state_dict().items() if "lora_" in name}
        for model in (theirs, exact):
            assert not model.load_state_dict(adapters, strict=False).unexpected_keys
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            fused, unfused, by_peft = results(ours, x, "fused"), results(ours, x, "off"), results(theirs, x)
        truth = results(exact, x.double(), "off")
        assert fused.keys() == by_peft.keys() == truth.keys()
        for name, value in fused.items():
            assert value.dtype == unfused[name].dtype
            yardstick = by_peft if autocast else unfused
            assert_as_accurate_as_torch(name, value, yardstick[name], truth[name], torch.bfloat16)

    def test_an_input_that_needs_no_gradient(self):
        model, x = adapted(), torch.randn(4, K)
        model(x).sum().backward()
        fused = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        set_lora_mlp(model, "off")
        model.zero_grad()
        model(x).sum().backward()
        for name, grad in fused.items():
            torch.testing.assert_close(grad, model.get_parameter(name).grad)

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("mode", ["fused", "recompute"])
    def test_checkpointing_gives_identical_gradients(self, llama, tokens, reentrant, mode):
        grads = []
        for checkpoint in (False, True):
            torch.manual_seed(0)
            base = llama()
            if checkpoint:
                base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)).train()
            set_lora_mlp(model, mode)
            torch.manual_seed(1)
            model(tokens, labels=tokens).loss.backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])

    @pytest.mark.parametrize("train", [True, False])
    def test_compiles_whole_with_two_graphs_as_m_varies(self, train):
        model = adapted(lora_dropout=0.1 if train else 0.0).train(train)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(mlp_of(model), backend=counter, fullgraph=True)
        for M in (2, 5, 8, 16, 33, 3):
            outs = []
            for function in (compiled, mlp_of(model)):
                torch.manual_seed(M)
                x = torch.randn(1, M, K, requires_grad=train)
                with torch.set_grad_enabled(train):
                    outs.append([function(x)])
                if train:
                    outs[-1] += torch.autograd.grad(outs[-1][0].sum(), [x, *_trained(model)])
            assert all(torch.equal(a, b) for a, b in zip(*outs))
        assert counter.frame_count <= 2

    def test_generate(self, llama, tokens):
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
        assert row(model)[0] == "mlp"
        fused = model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False)
        set_lora_mlp(model, "off")
        assert torch.equal(fused, model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False))


def _trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class TestTheModule:
    def test_nothing_else_changes(self):
        mlp = Gated()
        names, attributes, identity = list(dict(mlp.named_modules())), set(vars(mlp)), id(mlp)
        model = adapted(mlp)
        assert mlp_of(model) is mlp
        assert id(mlp) == identity
        assert isinstance(mlp, LoraMLP)
        assert set(vars(mlp)) == attributes
        assert [name for name in dict(mlp.named_modules()) if "lora" not in name and "base_layer" not in name] == names
        assert set(model.state_dict()) == set(peft.get_peft_model(Block(Gated()), _peft_config()).state_dict())

    @pytest.mark.parametrize("leave", ["unload", "merge_and_unload", "merge_to_16bit"])
    def test_leaving_gives_the_class_back(self, leave):
        mlp = Gated()
        model = adapted(mlp)
        set_lora_mlp(model, "recompute")
        attributes = set(vars(Gated()))
        getattr(model, leave)()
        assert type(mlp) is Gated
        assert set(vars(mlp)) == attributes

    def test_copies(self):
        model, x = adapted(lora_dropout=0.1), torch.randn(3, K)
        set_lora_mlp(model, "recompute")
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
        for other in copies:
            assert type(mlp_of(other)) is type(mlp_of(model))
            assert mlp_of(other).lora_mlp_mode == "recompute"
            assert mlp_of(other).gate_proj is not mlp_of(model).gate_proj
            first, second = results(model, x), results(other, x)
            assert all(torch.equal(first[name], second[name]) for name in first)

    def test_classes_are_not_changed(self):
        before = (LlamaMLP.forward, LlamaMLP.__reduce_ex__)
        get_peft_model(AutoModelForCausalLM.from_config(MistralConfig(**_tiny())), LoraConfig(target_modules=TARGETS))
        assert (LlamaMLP.forward, LlamaMLP.__reduce_ex__) == before
        assert not isinstance(Gated(), LoraMLP)

    def test_hooks_on_the_mlp_itself_still_run(self):
        model, seen = adapted(), []
        mlp_of(model).register_forward_hook(lambda module, args, out: seen.append(out.shape))
        assert row(model)[0] == "mlp"
        model(torch.randn(3, K))
        assert seen == [(3, K)]

    def test_an_mlp_without_adapters_is_left_alone(self):
        block = nn.ModuleDict({"mlp": Gated(), "other": nn.Linear(K, K)})
        get_peft_model(block, LoraConfig(target_modules=["other"]))
        assert type(block["mlp"]) is Gated

    def test_a_second_adapter_keeps_the_mode(self, tmp_path):
        model = adapted()
        set_lora_mlp(model, "off")
        model.add_adapter("other", LoraConfig(r=2, target_modules=["up_proj"]))
        assert row(model) == ("layers", "switched off by set_lora_mlp")
        set_lora_mlp(model, "fused")
        model.set_adapter("other")
        assert row(model)[0] == "mlp"
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(Block(Gated()), tmp_path)
        assert isinstance(mlp_of(again), LoraMLP)

    def test_bad_calls(self):
        with pytest.raises(ValueError, match="mode must be one of fused, recompute, off, got 'on'"):
            set_lora_mlp(adapted(), "on")
        with pytest.raises(ValueError, match=r"no gated MLP with LoRA .* explain\(model\) says why"):
            set_lora_mlp(adapted(Scaled()), "off")


def _peft_config():
    return peft.LoraConfig(r=4, target_modules=TARGETS)


def _tiny():
    return dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32,
    )  # fmt: skip
