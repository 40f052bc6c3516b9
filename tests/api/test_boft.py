"""What is particular to BOFT: several butterfly factors, dropout of blocks, files that peft's fallback has written."""

import warnings

import peft
import pytest
import torch
from peft.tuners.boft import layer as theirs
from safetensors.torch import load_file
from torch import nn

import peft_fast
from peft_fast.tuners.boft.layer import butterfly

LIBRARIES = (peft_fast, peft)


class Extension:
    """What peft compiles for CUDA, in torch: block-diagonal matrices of the blocks, and the blocks' gradients."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*of_factor) for of_factor in blocks])]

    @staticmethod
    def backward(gradient, blocks):
        n, count, size, _ = blocks.shape
        parts = gradient.view(n, count, size, count, size).diagonal(dim1=1, dim2=3)
        return [parts.permute(0, 3, 1, 2)]


@pytest.fixture
def with_extension(monkeypatch):
    """peft as it is where its extension compiles."""
    monkeypatch.setattr(theirs, "_FBD_CUDA", Extension)


def base():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(2, 8, 2, stride=2), nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 8, bias=False)
        )


def adapted(library, **options):
    torch.manual_seed(2)
    options = {"target_modules": ["0", "2", "4"], "init_weights": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, which has no extension
        return library.get_peft_model(base(), library.BOFTConfig(**options))


X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options",
    [
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 3},
        {"boft_block_num": 2, "boft_block_size": 0, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "boft_dropout": 0.5},
    ],
)
def test_butterfly_factors(options, with_extension, tmp_path):
    results = []
    for library in LIBRARIES:
        model = adapted(library, **options).train()
        torch.manual_seed(4)
        y = model(X)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.eval()
        results.append((y, grads, model(X)))
        model.save_pretrained(tmp_path / library.__name__)
        merged = model.merge_and_unload()(X)
        torch.testing.assert_close(merged, results[-1][2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    for saved in LIBRARIES:
        for loading in LIBRARIES:
            model = loading.PeftModel.from_pretrained(base(), tmp_path / saved.__name__)
            torch.testing.assert_close(model.eval()(X), results[0][2], rtol=1e-4, atol=1e-5)


def test_the_factors_are_orthogonal():
    layer = adapted(peft_fast, boft_block_size=2, boft_n_butterfly_factor=3).base_model.model[2]
    R, _ = layer.get_delta_weight("default")
    torch.testing.assert_close(R @ R.T, torch.eye(128), rtol=1e-4, atol=1e-5)
    blocks, _ = layer.exact("default")
    torch.testing.assert_close(butterfly(R, blocks, inverse=True), torch.eye(128), rtol=1e-4, atol=1e-5)
    assert (R[0] != 0).sum() == 8  # three factors of blocks of 2


def test_dropout_of_blocks():
    """From the same seed the same blocks, with one factor, which is what peft's fallback has."""
    models = [adapted(library, boft_dropout=0.5).train() for library in LIBRARIES]
    for seed in range(3):
        outputs = []
        for model in models:
            torch.manual_seed(seed)
            outputs.append(model(X))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(outputs[0], models[0].eval()(X), atol=1e-3)
        models[0].train()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_of_peft_without_its_extension(low_cpu_mem_usage, tmp_path):
    """One factor, whatever their config says: here the others turn nothing."""
    model = adapted(peft, boft_n_butterfly_factor=3, boft_block_size=2).eval()
    expected = model(X)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.2.boft_R"].shape[0] == 1
    ours = peft_fast.PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert ours.base_model.model[2].boft_R["default"].shape[0] == 3
    torch.testing.assert_close(ours.eval()(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"boft_block_size": 3}, "boft_block_size must divide the 8 features"),
        ({"boft_block_size": 0, "boft_block_num": 3}, "boft_block_num must divide the 8 features"),
        ({"boft_n_butterfly_factor": 3}, "boft_n_butterfly_factor=3 needs blocks"),
        ({"boft_n_butterfly_factor": 2, "boft_block_size": 1}, "boft_n_butterfly_factor=2 needs blocks"),
        ({"boft_n_butterfly_factor": 10**9}, "needs blocks"),
    ],
)
def test_sizes_that_do_not_fit(options, error, untouched):
    model = nn.Sequential(nn.Linear(8, 8))
    config = peft_fast.BOFTConfig(target_modules=["0"], **options)
    with untouched(model), pytest.raises(ValueError, match=error):
        peft_fast.get_peft_model(model, config)


def test_convolutions_that_peft_computes_otherwise():
    """Oblong kernels and paddings, dilation, other borders: as the merged convolution."""
    x = torch.randn(2, 4, 9, 9)
    layers = nn.Sequential(nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(1, 0), dilation=2, padding_mode="reflect"))
    config = peft_fast.BOFTConfig(target_modules=["0"], boft_block_size=3, init_weights=False)
    model = peft_fast.get_peft_model(layers, config)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)
