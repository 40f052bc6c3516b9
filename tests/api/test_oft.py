"""What is particular to OFT: convolutions whose patches overlap, sizes that do not divide, files of older versions."""

import json

import peft
import pytest
import torch
from peft.tuners.oft.layer import OFTLayer
from torch import nn
from torch.nn import functional as F

import peft_fast
from peft_fast.tuners.oft.layer import cayley, cayley_neumann, divisor_near

LIBRARIES = (peft_fast, peft)


def convolution():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1, padding_mode="circular"))


@pytest.mark.parametrize("options", [{}, {"coft": True, "eps": 0.5}, {"block_share": True}])
def test_patches_that_overlap(options):
    """As the model that peft merges, and at first as the base model; before merging peft's is neither."""
    x = torch.randn(2, 4, 6, 6)
    outputs = {}
    for library in LIBRARIES:
        for init in (True, False):
            torch.manual_seed(2)
            config = library.OFTConfig(target_modules=["0"], oft_block_size=6, init_weights=init, **options)
            model = library.get_peft_model(convolution(), config)
            outputs[library, init] = model(x), model.merge_and_unload()(x)
    for init in (True, False):
        ours, merged = outputs[peft_fast, init]
        torch.testing.assert_close(ours, merged, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, outputs[peft, init][1], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(outputs[peft, init][0], outputs[peft, init][1], atol=0.1)
    torch.testing.assert_close(outputs[peft_fast, True][0], convolution()(x))


def test_dilated_convolutions():
    """Which peft refuses."""
    x = torch.randn(2, 4, 6, 6)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2))
    weight, bias = base[0].weight.detach().clone(), base[0].bias.detach().clone()
    config = peft_fast.OFTConfig(target_modules=["0"], oft_block_size=6, init_weights=False)
    model = peft_fast.get_peft_model(base, config)
    R = model.base_model.model[0].get_delta_weight("default")
    expected = F.conv2d(x, (weight.flatten(1) @ R.T).reshape(weight.shape), bias, dilation=2)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_rotations():
    """The exact one is orthogonal, and the series goes to its inverse."""
    Q = torch.randn(3, 5, 5, dtype=torch.double) * 0.1
    Q = Q - Q.transpose(1, 2)
    R = cayley(Q)
    torch.testing.assert_close(R @ R.transpose(1, 2), torch.eye(5, dtype=torch.double).expand(3, 5, 5))
    torch.testing.assert_close(cayley_neumann(Q, 60), R.transpose(1, 2))
    assert torch.equal(cayley_neumann(Q, 1), torch.eye(5, dtype=torch.double).expand(3, 5, 5))


def test_sizes_that_do_not_divide():
    for features in (*range(1, 40), 96, 127, 768):
        for wanted in range(1, 50):
            assert divisor_near(features, wanted) == (
                wanted if features % wanted == 0 else OFTLayer.adjust_oft_parameters(None, features, wanted)
            )


def test_blocks_of_one(tmp_path):
    """Which turn nothing, and have nothing to learn: of an odd number of features, say."""
    outputs = []
    for library in LIBRARIES:
        torch.manual_seed(2)
        layers = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 3))
        with pytest.warns(UserWarning, match="oft_block_size"):
            model = library.get_peft_model(layers, library.OFTConfig(target_modules=["0", "1"], oft_block_size=2))
        assert model.base_model.model[0].oft_R["default"].weight.shape == (7, 0)
        model.save_pretrained(tmp_path / library.__name__)
        outputs.append(model(torch.ones(2, 7)))
        with pytest.warns(UserWarning, match="oft_block_size"):
            again = peft_fast.PeftModel.from_pretrained(model.unload(), tmp_path / library.__name__)
        torch.testing.assert_close(again(torch.ones(2, 7)), outputs[-1])
        torch.testing.assert_close(again.merge_and_unload()(torch.ones(2, 7)), outputs[-1])
    torch.testing.assert_close(*outputs)


def test_module_dropout_is_where_peft_has_it():
    """Nowhere."""
    x = torch.randn(4, 8)
    with pytest.warns(UserWarning, match="module_dropout has no effect"):
        config = peft_fast.OFTConfig(target_modules=["0"], oft_block_size=2, module_dropout=0.5, init_weights=False)
    for library, made in ((peft_fast, config), (peft, peft.OFTConfig(**{**config.to_dict(), "peft_type": None}))):
        torch.manual_seed(3)
        model = library.get_peft_model(nn.Sequential(nn.Linear(8, 8)), made).train()
        expected = model(x)
        assert all(torch.equal(model(x), expected) for _ in range(5))


@pytest.mark.parametrize("library", LIBRARIES)
def test_files_of_older_versions(library, tmp_path):
    model = library.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), library.OFTConfig(target_modules=["0"], r=2, oft_block_size=0)
    )
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "peft_version": "0.17.1"}))
    with pytest.warns(UserWarning, match="[Cc]ayley"):
        library.PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 8)), tmp_path)
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "oft_block_size"}))
    base = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"0\.14"):
        library.PeftModel.from_pretrained(base, tmp_path)
    assert type(base[0]) is nn.Linear


def test_constrained_weights_are_written_back():
    config = peft_fast.OFTConfig(target_modules=["0"], oft_block_size=4, coft=True, eps=0.1, init_weights=False)
    model = peft_fast.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    rotation = model.base_model.model[0].oft_R["default"]
    rotation.weight.data.fill_(1.0)
    rotation.weight.data[1] = 1e-4
    model.base_model.model[0].get_delta_weight("default")
    assert rotation.weight[0, 0] == 1  # merging reads, and does not write
    model(torch.randn(2, 8))
    norms = rotation.skew(rotation.weight).norm(dim=(1, 2))
    torch.testing.assert_close(norms[0], torch.tensor(0.1 / 2**0.5))
    torch.testing.assert_close(rotation.weight[1], torch.full((6,), 1e-4))


def test_embeddings_that_scale():
    """Gemma's, which multiply what they look up."""

    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    model = peft_fast.get_peft_model(
        nn.Sequential(Scaled(5, 8)), peft_fast.OFTConfig(target_modules=["0"], oft_block_size=4, init_weights=False)
    )
    ids = torch.arange(5)
    expected = model(ids)
    torch.testing.assert_close(model.merge_and_unload()(ids), expected, rtol=1e-4, atol=1e-5)


def test_scales():
    model = peft_fast.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), peft_fast.OFTConfig(oft_block_size=4, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    for call in (lambda: layer.scale_layer(2), layer.unscale_layer, lambda: layer.set_scale("default", 2)):
        with pytest.warns(UserWarning, match="a rotation has no scale"):
            call()
    layer.scale_layer(1)
    layer.set_scale("other", 2)
