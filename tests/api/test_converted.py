"""convert_to_lora and save_as_lora, beside peft's."""

import peft
import pytest
import torch
from peft.tuners.lora import convert_to_lora as theirs_convert
from peft.tuners.lora import save_as_lora as theirs_save
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import peft_fast
from peft_fast.tuners.lora import convert_to_lora, save_as_lora

CONVERT = {peft: theirs_convert, peft_fast: convert_to_lora}
SAVE = {peft: theirs_save, peft_fast: save_as_lora}
LIBRARIES = (peft, peft_fast)
TARGETS = ["q_proj", "down_proj"]
METHODS = {
    "LoHa": {"r": 3, "init_weights": False},
    "LoKr": {"r": 3, "init_weights": False},
    "Vera": {"r": 4, "init_weights": False, "save_projection": True},
    "RandLora": {"r": 4, "init_weights": False},
    "FourierFT": {"n_frequency": 60},
    "Lora": {"r": 6, "init_lora_weights": False, "use_rslora": True},
}


def adapted(library, base, method, **options):
    torch.manual_seed(4)
    config = getattr(library, f"{method}Config")
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **METHODS[method], **options}
    return library.get_peft_model(base, config(**options)).eval()


@pytest.fixture(params=METHODS)
def pair(request, llama):
    """The same adapter in both libraries."""
    models = [adapted(library, llama(), request.param) for library in LIBRARIES]
    shared = ("base_model.randlora_A", "base_model.randlora_B")  # which the layers have too
    state = models[0].state_dict()
    models[1].load_state_dict({key: value for key, value in state.items() if not key.startswith(shared)})
    return models


def deltas(tensors):
    """{path: B A}"""
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {n: tensors[f"{n}.lora_B.weight"].flatten(1) @ tensors[f"{n}.lora_A.weight"].flatten(1) for n in names}


@pytest.mark.filterwarnings("ignore:.*LoRA a")
class TestAsInPeft:
    @pytest.mark.parametrize("rank", [5, 0.6])
    def test_factors(self, rank, pair):
        (their_config, theirs), (our_config, ours) = (
            CONVERT[library](model, rank) for library, model in zip(LIBRARIES, pair)
        )
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        expected = deltas(theirs)
        for name, delta in deltas(ours).items():
            torch.testing.assert_close(delta, expected[name], atol=1e-5, rtol=1e-3)
        if rank == 5:
            assert (our_config.r, our_config.lora_alpha) == (their_config.r, their_config.lora_alpha) == (5, 5)
        else:
            paths = [name.removeprefix("base_model.model.") for name in expected]
            ranks = {path: our_config.rank_pattern.get(path, our_config.r) for path in paths}
            assert ranks == their_config.rank_pattern

    def test_files(self, pair, llama, tokens, tmp_path):
        for library, model in zip(LIBRARIES, pair):
            folder = tmp_path / library.__name__
            SAVE[library](folder, model, 64)  # of full rank: nothing is lost
            for other in LIBRARIES:
                loaded = other.PeftModel.from_pretrained(llama(), folder).eval()
                expected = model(input_ids=tokens).logits
                torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=1e-3, rtol=1e-3)
        assert isinstance(peft_fast.PeftModel.from_pretrained(llama(), folder), peft_fast.PeftModelForCausalLM)


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.out = nn.Conv1d(4, 6, 3), nn.Conv2d(1, 5, 3, padding=1), nn.Linear(30, 3)

    def forward(self, x):
        return self.out(self.two(self.one(x)[:, None]).amax(1))


@pytest.mark.parametrize("method", ["Lora", "LoHa", "LoKr"])
@pytest.mark.filterwarnings("ignore:.*LoRA a")
def test_convolutions(method):
    """peft refuses them."""
    model = adapted(peft_fast, Convolved(), method, target_modules=["one", "two", "out"], task_type=None)
    config, tensors = convert_to_lora(model, 0.9999999)
    again = peft_fast.get_peft_model(Convolved(), config).eval()
    result = peft_fast.set_peft_model_state_dict(again, tensors)
    assert not result.unexpected_keys
    x = torch.randn(2, 4, 32)
    torch.testing.assert_close(again(x), model(x), atol=1e-3, rtol=1e-3)
    with pytest.raises(TypeError):
        theirs_convert(adapted(peft, Convolved(), method, target_modules=["one"], task_type=None), 2)


@pytest.mark.parametrize("method", ["Vera", "Lora"])
@pytest.mark.filterwarnings("ignore:.*LoRA a")
def test_k_bit_bases_and_dora(method, llama_4bit, tokens):
    """In peft DoRA's magnitudes are lost without a word."""
    options = {"use_dora": True} if method == "Lora" else {}
    model = adapted(peft_fast, llama_4bit(), method, **options)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.2
    config, tensors = convert_to_lora(model, 64)
    again = peft_fast.get_peft_model(llama_4bit(), config).eval()
    peft_fast.set_peft_model_state_dict(again, tensors)
    expected = model(input_ids=tokens).logits
    torch.testing.assert_close(again(input_ids=tokens).logits, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_large_layer_by_its_largest_vectors(monkeypatch):
    """Whether that route finds them or stands down: what is kept of the delta is what a full SVD keeps."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": nn.Linear(1024, 1040)})
    config = peft_fast.LoHaConfig(r=16, alpha=64, target_modules=["layer"], init_weights=False)
    model = peft_fast.get_peft_model(base, config)
    delta = model.base_model.model["layer"].get_delta_weight("default")
    full = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda x, **options: full(x, **options) if min(x.shape) < 100 else 1 / 0)
    _, tensors = convert_to_lora(model, 8)
    U, S, Vh = full(delta, full_matrices=False)
    (kept,) = deltas(tensors).values()
    torch.testing.assert_close(kept, (U[:, :8] * S[:8]) @ Vh[:8], atol=1e-3 * float(delta.abs().max()), rtol=0)


def test_conv1d_whole_modules_and_excluded_layers(tokens, tmp_path):
    """In peft the converted adapter is on the excluded layers too."""

    def gpt2():
        torch.manual_seed(1)
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2))

    lora = {"target_modules": ["c_attn"], "exclude_modules": ["h.0.attn.c_attn"], "modules_to_save": ["ln_f"]}
    vera = {"target_modules": ["h.1.attn.c_attn"], "modules_to_save": ["ln_f"]}
    for method, options in (("Lora", lora), ("Vera", vera)):
        model = adapted(peft_fast, gpt2(), method, **options)
        model.base_model.model.transformer.ln_f.modules_to_save["default"].bias.data += 1
        save_as_lora(tmp_path, model, 32)
        expected = model(input_ids=tokens).logits
        for library in LIBRARIES:
            loaded = library.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
            torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=1e-4, rtol=1e-3)
            layers = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
            assert layers == ["base_model.model.transformer.h.1.attn.c_attn"]


def test_without_a_peft_model(llama, tokens):
    base = llama().eval()
    peft_fast.inject_adapter_in_model(peft_fast.LoHaConfig(r=2, target_modules=TARGETS, init_weights=False), base)
    config, tensors = convert_to_lora(base, 4, progressbar=True)
    plain = peft_fast.inject_adapter_in_model(config, llama()).eval()
    peft_fast.set_peft_model_state_dict(plain, tensors)
    torch.testing.assert_close(plain(input_ids=tokens).logits, base(input_ids=tokens).logits, atol=1e-3, rtol=1e-3)


def test_compiled_with_a_bar(llama, capsys):
    model = adapted(peft_fast, llama(), "LoHa")
    plain = convert_to_lora(model, 3)[1]
    compiled = convert_to_lora(model, 3, progressbar=True, compile_kwargs={"backend": "eager"})[1]
    assert "converting" in capsys.readouterr().err
    for one, other in zip(deltas(plain).values(), deltas(compiled).values()):
        torch.testing.assert_close(one, other)


class TestRefused:
    def test_and_nothing_written(self, llama, tmp_path, untouched):
        model = adapted(peft_fast, llama(), "LoHa")
        wrong = {65: "at most 64", 0: "positive", -1: "positive", 1.5: "up to 1", -0.5: "above 0", True: "positive"}
        save_as_lora(tmp_path, model, 2)
        for rank, match in wrong.items():
            with untouched(model, tmp_path), pytest.raises(ValueError, match=match):
                save_as_lora(tmp_path, model, rank)
        with pytest.raises(ValueError, match="does not exist"):
            convert_to_lora(model, 2, adapter_name="other")

    def test_what_is_no_matrix_added(self, llama):
        for config in (
            peft_fast.LoraConfig(target_modules=["embed_tokens", "q_proj"]),
            peft_fast.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
            peft_fast.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
        ):
            model = peft_fast.get_peft_model(llama(), config)
            assert not model.base_model.supports_lora_conversion()
            with pytest.raises(TypeError, match="cannot be converted"):
                convert_to_lora(model, 2)
        lora = peft_fast.LoraConfig(target_modules=["q_proj"], lora_bias=True)
        with pytest.raises(ValueError, match="biases"), pytest.warns(UserWarning, match="LoRA already"):
            convert_to_lora(peft_fast.get_peft_model(llama(), lora), 2)
