"""What is particular to SHiRA: where its entries are, and its products."""

import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft_fast

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
from tuner_cases import BY_NAME, adapted, config

LIBRARIES = (peft_fast, peft)
SHIRA = BY_NAME["Shira"]
FILE = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def small(library, model, **options):
    return adapted(library, model, SHIRA, **{**SHIRA.llama, **options})


def corner(base_layer, r):
    """A mask of one's own: the first entries, row by row."""
    out, into = base_layer.weight.shape
    mask = torch.zeros(out * into)
    mask[: r * (out + into)] = 1
    return mask.view(out, into)


def with_mask(library, **options):
    with pytest.warns(UserWarning, match="mask_type|mask_fn"):
        given = config(library, SHIRA, mask_type="corner", **{**SHIRA.llama, **options})
    given.mask_fn = corner
    return given


@pytest.mark.parametrize("seed", [None, 4])
def test_places_are_pefts(seed, llama):
    found = []
    for library in LIBRARIES:
        layer = small(library, llama(), random_seed=seed).base_model.model.model.layers[0].mlp.down_proj
        found.append(layer.shira_indices["default"])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert found[0].shape == (2, 2 * (64 + 128))


def test_a_mask_of_ones_own(llama, tokens, tmp_path):
    outputs = []
    for library in LIBRARIES:
        model = library.get_peft_model(llama(), with_mask(library))
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        layer.shira_weight["default"].data += torch.linspace(0, 1, layer.shira_weight["default"].numel())
        outputs.append(model.eval()(tokens).logits)
        model.save_pretrained(tmp_path / library.__name__)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for folder in LIBRARIES:
        for loading in LIBRARIES:
            loaded = loading.PeftModel.from_pretrained(llama(), tmp_path / folder.__name__)
            torch.testing.assert_close(loaded.eval()(tokens).logits, outputs[0], rtol=1e-4, atol=1e-5)


def test_no_mask(llama, tokens):
    given = with_mask(peft_fast)
    given.mask_fn = None
    model = peft_fast.get_peft_model(llama(), given)
    with pytest.raises(ValueError, match="config.mask_fn was not set before the model was made, nor was a file loaded"):
        model(tokens)


@pytest.mark.parametrize(
    "mask", [lambda b, r: torch.ones(2, 2), lambda b, r: torch.ones_like(b.weight), lambda b, r: None]
)
def test_masks_that_cannot_be(mask, llama, untouched):
    given, base = with_mask(peft_fast), llama()
    given.mask_fn = mask
    with untouched(base), pytest.raises(ValueError, match="mask_fn must give a tensor"):
        peft_fast.get_peft_model(base, given)


def test_small_changes_in_16_bits():
    """Of changes far below half an ulp of the weights nothing is left where they are added to these in bf16."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    outputs = {}
    for library in LIBRARIES:
        base = nn.Sequential(nn.Linear(32, 32, bias=False)).bfloat16()
        base[0].weight.data.fill_(1)
        model = library.get_peft_model(base, config(library, SHIRA, target_modules=["0"]))
        layer = model.base_model.model[0]
        layer.shira_weight["default"].data.fill_(1e-3)
        with torch.no_grad():
            change = model(x).float() - base[0].base_layer(x).float()
        outputs[library] = change.abs().sum()
        if library is peft_fast:
            assert layer.route(4).route == "added"
    assert outputs[peft] == 0
    assert outputs[peft_fast] > 0


def test_nothing_large_is_kept_for_backward(llama):
    """But x and the base weight itself: no sum, and no dense delta."""
    layer = small(peft_fast, llama()).base_model.model.model.layers[0].mlp.down_proj
    kept = []
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in kept if t.numel() >= layer.weight.numel()]
    assert all(t.data_ptr() == layer.weight.data_ptr() for t in large)
    assert layer.route(4).route == "sum"


def test_hooks_run(llama, tokens):
    """peft leaves them out, with a warning."""
    model = small(peft_fast, llama()).eval()
    expected = model(tokens).logits
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert seen


def test_scales(llama):
    layer = small(peft_fast, llama()).base_model.model.model.layers[0].self_attn.q_proj
    before = layer.get_delta_weight("default")
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), before / 2)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda places: places + 1000, "must be rows and columns of a weight"),
        (lambda places: -places - 1, "must be rows and columns of a weight"),
        (lambda places: places[:, :5].contiguous(), "do not fit"),
        (lambda places: places.float() + 0.5, "do not fit"),
    ],
)
def test_places_that_cannot_be(change, error, llama, tmp_path, untouched):
    small(peft_fast, llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = next(key for key in tensors if key.endswith("shira_indices"))
    save_file({**tensors, key: change(tensors[key])}, tmp_path / FILE)
    base = llama()
    with untouched(base, tmp_path), pytest.raises(ValueError, match=error):
        peft_fast.PeftModel.from_pretrained(base, tmp_path)


def test_files_of_peft_on_windows(llama, tokens, tmp_path):
    """Which have indices in fp32."""
    model = small(peft_fast, llama()).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file({key: value.float() for key, value in tensors.items()}, tmp_path / FILE)
    loaded = peft_fast.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_ranks_that_are_too_large(llama, untouched):
    base = llama()
    with untouched(base), pytest.raises(ValueError, match="SHiRA of rank 40 trains"):
        peft_fast.get_peft_model(base, config(peft_fast, SHIRA, r=40, target_modules=["q_proj"]))
