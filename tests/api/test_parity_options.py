"""LoRA's options beside peft's, on tiny models of twelve architectures."""

import warnings

import peft
import pytest
import torch

import peft_fast

from .architectures import adapted, build, output, relative

EACH = [
    "llama",
    "qwen2",
    "qwen3-moe-attention",
    "mistral",
    "gemma2",
    "gpt2",
    "opt",
    "phi",
    "bert",
    "t5",
    "bart-scaled",
    "vit",
]
OPTIONS = {
    "rslora-gaussian": {"use_rslora": True, "init_lora_weights": "gaussian"},
    "no-init": {"init_lora_weights": False},
    "bias-all": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only"},
    "one-layer": {"layers_to_transform": [0]},
    "patterns": {"rank_pattern": {r".*\.1\..*": 2}, "alpha_pattern": {".*0.*": 32}},
    "norms-whole": {"modules_to_save": ["norm", "ln_f", "LayerNorm", "layer_norm", "layernorm", "final_layer_norm"]},
    "excluded": {"exclude_modules": r".*\.0\..*(v|value|v_proj|fc2)"},
    "tokens": {"trainable_token_indices": [1, 3, 5]},
    "ensured-tokens": {"trainable_token_indices": [1, 3, 5], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_give_pefts_names_values_outputs_gradients_and_files(kind, options, tmp_path):
    if kind == "vit" and "trainable_token_indices" in options:
        pytest.skip("pixels are no tokens")
    targets = {"vit": ["q_proj", "v_proj"], "qwen3-moe-attention": ["q_proj", "v_proj"]}.get(kind)
    options = {**options, "target_modules": targets}
    fresh = [adapted(library, kind, shake=False, **options) for library in (peft_fast, peft)]
    for (name, mine), (theirs, other) in zip(*(m.named_parameters() for m in fresh), strict=True):
        assert (name, mine.requires_grad) == (theirs, other.requires_grad)
        assert torch.equal(mine, other), name
    models = [adapted(library, kind, **options) for library in (peft_fast, peft)]
    outputs = [output(model, kind) for model in models]
    assert relative(*outputs) <= 1e-5
    for out in outputs:
        out.square().mean().backward()
    for (name, mine), other in zip(models[0].named_parameters(), models[1].parameters()):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None and other.grad.norm() > 1e-7:
            assert relative(mine.grad, other.grad) <= 5e-4, name
    keys = []
    for model, reader in zip(models, (peft, peft_fast)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.save_pretrained(tmp_path / reader.__name__)
            read = reader.PeftModel.from_pretrained(build(kind), tmp_path / reader.__name__).eval()
        assert relative(output(read, kind), output(model, kind)) <= 1e-5
        keys.append(set(peft_fast.load_peft_weights(tmp_path / reader.__name__)))
    assert keys[0] == keys[1]
