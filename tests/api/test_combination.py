"""add_weighted_adapter and the functions under it, beside peft's."""

import warnings

import peft
import peft.utils.merge_utils
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_fast
from peft_fast.tuners.lora import combination
from peft_fast.utils import merge_utils

LIBRARIES = (peft, peft_fast)
EXACT = ["svd", "cat", "linear", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]
RANDOM = ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"]
PRUNING = {"density": 0.6}


def model_with(library, base, trained, ranks=(4, 4, 4), targets=None, **options):
    """Adapters "default", "a1", "a2", ... with weights of their own, the same in both libraries."""
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "down_proj"], **options}
    model = library.get_peft_model(base, library.LoraConfig(r=ranks[0], **options))
    for i, rank in enumerate(ranks[1:], 1):
        more = {"target_modules": (targets or {}).get(i, options["target_modules"])}
        model.add_adapter(f"a{i}", library.LoraConfig(r=rank, lora_alpha=4 + i, **{**options, **more}))
    return trained(model).eval()


def names(model) -> list[str]:
    return list(model.peft_config)


def delta(layer, name: str) -> torch.Tensor:
    return layer.get_delta_weight(name).detach()


def layers(library, model) -> dict:
    return {path: m for path, m in model.named_modules() if isinstance(m, library.tuners.lora.LoraLayer)}


def combined(library, base, trained, weights, *, seed=3, name="new", adapters=None, **options):
    kinds = ("ranks", "targets", "fan_in_fan_out", "use_rslora", "modules_to_save", "target_modules")
    model = model_with(library, base, trained, **{k: options.pop(k) for k in kinds if k in options})
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(adapters or names(model), weights, name, **options)
    return model


@pytest.mark.parametrize("combination_type", [*EXACT, *RANDOM])
@pytest.mark.parametrize("weights", [[0.7, 1.2, 0.4], [0.7, -1.2, 0.4]])
def test_deltas_and_outputs_are_pefts(combination_type, weights, llama, trained, tokens):
    options = {"combination_type": combination_type, "density": None if combination_type in EXACT[:3] else 0.6}
    models = [combined(library, llama(), trained, weights, **options) for library in LIBRARIES]
    theirs, ours = (layers(library, model) for library, model in zip(LIBRARIES, models))
    assert theirs.keys() == ours.keys()
    for path, layer in theirs.items():
        torch.testing.assert_close(delta(ours[path], "new"), delta(layer, "new"), atol=1e-6, rtol=1e-4, msg=path)
    configs = [model.peft_config["new"] for model in models]
    assert (configs[0].r, configs[0].lora_alpha) == (configs[1].r, configs[1].lora_alpha)
    assert configs[0].target_modules == configs[1].target_modules
    for model in models:
        assert model.active_adapter == "default"
        assert not any(p.requires_grad for n, p in model.named_parameters() if ".new." in n)
        model.set_adapter("new")
    outputs = [model(input_ids=tokens).logits for model in models]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    merged = models[1].merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens).logits, outputs[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("combination_type", ["svd", "cat"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, -2.0]])
def test_the_sum_is_exact_where_the_rank_allows_it(combination_type, weights, llama, trained):
    model = combined(
        peft_fast, llama(), trained, weights, ranks=(3, 5), combination_type=combination_type,
        svd_rank=8 if combination_type == "svd" else None,
    )  # fmt: skip
    assert model.peft_config["new"].r == 8
    for layer in layers(peft_fast, model).values():
        expected = sum(w * delta(layer, name) for w, name in zip(weights, ("default", "a1")))
        torch.testing.assert_close(delta(layer, "new"), expected, atol=1e-6, rtol=1e-4)
        A = layer.lora_A["new"].weight
        assert A.shape[0] == 8


@pytest.mark.parametrize("svd_rank", [None, 2, 12])
@pytest.mark.parametrize("svd_clamp", [None, 0.9])
def test_options_of_the_svd(svd_rank, svd_clamp, llama, trained):
    if svd_rank == 12 and svd_clamp:
        svd_rank = 8  # beyond the rank of the sum peft's right vectors are arbitrary, and so the quantile
    options = {"combination_type": "svd", "svd_rank": svd_rank, "svd_clamp": svd_clamp, "ranks": (3, 5)}
    models = [combined(library, llama(), trained, [1.0, -0.5], **options) for library in LIBRARIES]
    theirs, ours = (layers(library, model) for library, model in zip(LIBRARIES, models))
    for path, layer in theirs.items():
        torch.testing.assert_close(delta(ours[path], "new"), delta(layer, "new"), atol=2e-6, rtol=1e-3)
        assert ours[path].lora_A["new"].weight.shape == layer.lora_A["new"].weight.shape


@pytest.mark.parametrize("combination_type", ["svd", "cat", "ties_svd"])
def test_adapters_of_other_ranks_and_other_layers(combination_type, llama, trained, tokens, tmp_path):
    options = {"ranks": (3, 5), "targets": {1: ["q_proj", "v_proj"]}, "combination_type": combination_type}
    models = [combined(library, llama(), trained, [1.0, 0.5], density=0.5, **options) for library in LIBRARIES]
    theirs, ours = (layers(library, model) for library, model in zip(LIBRARIES, models))
    new = {path for path, layer in ours.items() if "new" in layer.lora_A}
    assert new == {path for path, layer in theirs.items() if "new" in layer.lora_A}
    assert len(new) == 6
    for path in new:
        torch.testing.assert_close(delta(ours[path], "new"), delta(theirs[path], "new"), atol=1e-6, rtol=1e-3)
    models[1].set_adapter("new")
    models[1].save_pretrained(tmp_path, selected_adapters=["new"])
    for library in LIBRARIES:
        loaded = library.PeftModel.from_pretrained(llama(), tmp_path / "new")
        expected = models[1](input_ids=tokens).logits
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("combination_type", ["svd", "cat", "linear", "ties", "dare_ties_svd", "magnitude_prune_svd"])
@pytest.mark.parametrize("kind", ["conv1d", "embedding", "conv2d", "conv2d_1x1"])
def test_other_layers(combination_type, kind, trained):
    make = {
        "conv1d": lambda: Conv1D(12, 10), "embedding": lambda: nn.Embedding(20, 12),
        "conv2d": lambda: nn.Conv2d(6, 8, 3), "conv2d_1x1": lambda: nn.Conv2d(6, 8, 1),
    }[kind]  # fmt: skip
    results = []
    for library in LIBRARIES:
        torch.manual_seed(0)
        base = nn.Sequential(make())
        options = {"combination_type": combination_type, "density": 0.5, "target_modules": ["0"]}
        model = combined(
            library, base, trained, [0.7, -0.4], ranks=(4, 4), fan_in_fan_out=kind == "conv1d", **options
        )  # fmt: skip
        results.append(delta(model.base_model.model[0], "new"))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-3)


def test_rank_patterns(llama, trained):
    """Fewer ranks than the config says are filled up with zeros, so that the file loads."""
    torch.manual_seed(1)
    model = peft_fast.get_peft_model(
        llama(), peft_fast.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    )
    model.add_adapter("a1", model.peft_config["default"].__class__(**vars_of(model.peft_config["default"])))
    trained(model).add_weighted_adapter(["default", "a1"], [1.0, -1.0], "new", combination_type="linear")
    for path, layer in layers(peft_fast, model).items():
        assert layer.lora_A["new"].weight.shape[0] == 4
        rank = layer.r["default"]
        A = layer.lora_A["default"].weight - layer.lora_A["a1"].weight
        B = layer.lora_B["default"].weight + layer.lora_B["a1"].weight
        scale = layer.scaling["default"]
        assert rank == (2 if "down_proj" in path else 4)
        torch.testing.assert_close(delta(layer, "new"), (scale * B @ A).detach(), atol=1e-6, rtol=1e-4)


def vars_of(config) -> dict:
    return {"r": config.r, "target_modules": config.target_modules, "rank_pattern": config.rank_pattern}


def test_rank_stabilised_adapters_keep_their_size(llama, trained):
    """peft keeps use_rslora and makes alpha the rank: the result is sqrt(r) times too large."""
    models = [
        combined(library, llama(), trained, [1.0, 0.5], ranks=(4, 4), use_rslora=True, combination_type="cat")
        for library in LIBRARIES
    ]
    for library, model, factor in zip(LIBRARIES, models, (8**0.5, 1.0)):
        for layer in layers(library, model).values():
            expected = factor * (delta(layer, "default") + 0.5 * delta(layer, "a1"))
            torch.testing.assert_close(delta(layer, "new"), expected, atol=1e-6, rtol=1e-4)


def test_of_pissa_adapters_the_base_stays(llama, trained):
    """peft decomposes the base weight once more for the new adapter."""
    model = peft_fast.get_peft_model(
        llama(), peft_fast.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.add_weighted_adapter(["default"], [0.5], "new")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    layer = next(iter(layers(peft_fast, model).values()))
    torch.testing.assert_close(delta(layer, "new"), 0.5 * delta(layer, "default"))


def test_whole_modules_come_along(llama, trained, tokens):
    model = model_with(peft_fast, llama(), trained, ranks=(4,), modules_to_save=["lm_head"])
    model.add_adapter("a1", peft_fast.LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_weighted_adapter(["default", "a1"], [1.0, 0.0], "new", combination_type="cat")
    expected = model(input_ids=tokens).logits
    model.set_adapter("new")
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-6, rtol=1e-4)


def test_limits_of_the_adapters_are_kept_apart(llama, trained):
    """Adapters of other layers by their config, not by their names."""
    model = peft_fast.get_peft_model(llama(), peft_fast.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]))
    model.add_adapter("a1", peft_fast.LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]))
    trained(model).add_weighted_adapter(["default", "a1"], [1.0, 1.0], "new")
    here = sorted(path for path, layer in model.base_model.layers() if "new" in layer.lora_A)
    assert here == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_only_one_product_is_made_at_a_time(llama, trained, monkeypatch):
    """And none for "svd" and "cat"."""
    made, alive = [], []
    original = combination.Combination.merge

    def merge(self, tensors, *more):
        def watched():
            for tensor in tensors:
                made.append(tuple(tensor.shape))
                yield tensor

        alive.append(len(made))
        return original(self, watched(), *more)

    monkeypatch.setattr(combination.Combination, "merge", merge)
    for kind in ("svd", "cat"):
        combined(peft_fast, llama(), trained, [1.0, 1.0], ranks=(4, 4), combination_type=kind)
    assert made == []
    combined(peft_fast, llama(), trained, [1.0, 1.0], ranks=(4, 4), combination_type="magnitude_prune_svd", density=0.5)
    assert alive == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": []}, "must name one adapter at least"),
        ({"adapters": ["default", "zzz"]}, "'zzz' does not exist"),
        ({"weights": [1.0]}, "a weight for each adapter, got 2 and 1"),
        ({"weights": [1.0, float("nan")]}, "weights must be finite numbers, got nan"),
        ({"combination_type": "mean"}, "must be one of svd, cat, linear, .*, got 'mean'"),
        ({"combination_type": "ties"}, "'ties' needs density, the share that is kept, got None"),
        ({"combination_type": "dare_linear_svd", "density": -0.1}, "needs density, .* got -0.1"),
        ({"combination_type": "linear"}, r"needs adapters of the same rank, got \{'default': 4, 'a1': 2\}"),
        ({"svd_rank": 2.5}, "svd_rank must be a positive integer, got 2.5"),
        ({"svd_clamp": 1.5}, "svd_clamp must be a quantile from 0 to 1, got 1.5"),
        ({"majority_sign_method": "mean"}, "must be 'total' or 'frequency', got 'mean'"),
    ],
)
def test_bad_arguments_leave_the_model(arguments, message, llama, trained, untouched):
    model = model_with(peft_fast, llama(), trained, ranks=(4, 2))
    arguments = {"adapters": ["default", "a1"], "weights": [1.0, 1.0], **arguments}
    with untouched(model), pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapter_name="new", **arguments)
    assert "new" not in model.peft_config


def test_what_cannot_be_combined(llama, trained, untouched):
    for options in ({"use_dora": True}, {"lora_bias": True}, {"trainable_token_indices": [1]}):
        model = peft_fast.get_peft_model(llama(), peft_fast.LoraConfig(target_modules=["q_proj"], **options))
        name = next(iter(options))
        with untouched(model), pytest.raises(ValueError, match=f"does not combine {name}, and adapter 'default'"):
            model.add_weighted_adapter(["default"], [1.0], "new")
    model = model_with(peft_fast, llama(), trained, ranks=(4, 4), modules_to_save=["lm_head"])
    with untouched(model), pytest.raises(ValueError, match="each have lm_head in modules_to_save"):
        model.add_weighted_adapter(["default", "a1"], [1.0, 1.0], "new")
    model = model_with(peft_fast, llama(), trained, ranks=(4, 4), targets={1: ".*v_proj"})
    with untouched(model), pytest.raises(ValueError, match="must be lists for all of them, or expressions"):
        model.add_weighted_adapter(["default", "a1"], [1.0, 1.0], "new")
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    model = peft_fast.get_peft_model(grouped, peft_fast.LoraConfig(target_modules=["0"], r=4))
    model.add_adapter("a1", peft_fast.LoraConfig(target_modules=["0"], r=4))
    with untouched(model), pytest.raises(ValueError, match="a convolution of 2 groups"):
        model.add_weighted_adapter(["default", "a1"], [1.0, 1.0], "new", combination_type="cat")


def test_a_failure_in_the_middle_leaves_the_model(llama, trained, untouched, monkeypatch):
    model, fill = model_with(peft_fast, llama(), trained, ranks=(4, 4)), combination._fill
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        fill(*arguments)

    monkeypatch.setattr(combination, "_fill", failing)
    with untouched(model), pytest.raises(MemoryError):
        model.add_weighted_adapter(["default", "a1"], [1.0, 1.0], "new")
    assert list(model.peft_config) == ["default", "a1"]


def test_an_adapter_that_is_there_stays(llama, trained, untouched):
    model = model_with(peft_fast, llama(), trained, ranks=(4, 4))
    with untouched(model), pytest.warns(UserWarning, match="'a1' exists already and stays as it is"):
        model.add_weighted_adapter(["default"], [1.0], "a1")


class TestTheFunctions:
    @pytest.fixture
    def tensors(self):
        generator = torch.Generator().manual_seed(8)
        return [torch.randn(6, 5, generator=generator) for _ in range(3)]

    @pytest.mark.parametrize("method", ["total", "frequency"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_they_are_pefts(self, tensors, method, dtype):
        theirs, weights = peft.utils.merge_utils, torch.tensor([0.5, -1.0, 2.0])
        tensors = [tensor.to(dtype) for tensor in tensors]
        for name, more in (
            ("task_arithmetic", ()), ("magnitude_prune", (0.4,)), ("ties", (0.4, method)), ("dare_linear", (0.4,)),
            ("dare_ties", (0.4, method)),
        ):  # fmt: skip
            results = []
            for module in (theirs, merge_utils):
                torch.manual_seed(2)
                results.append(getattr(module, name)(tensors, weights, *more))
            torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5, msg=name)
        stacked = torch.stack(tensors)
        masks = [module.calculate_majority_sign_mask(stacked, method) for module in (theirs, merge_utils)]
        assert torch.equal(*masks)
        assert torch.equal(*(module.disjoint_merge(stacked, masks[0]) for module in (theirs, merge_utils)))
        assert torch.equal(*(m.reshape_weight_task_tensors(stacked, weights) for m in (theirs, merge_utils)))

    @pytest.mark.parametrize("density", [0, 0.3, 0.99])
    def test_pruning(self, tensors, density):
        theirs = peft.utils.merge_utils
        assert torch.equal(*(m.magnitude_based_pruning(tensors[0], density) for m in (theirs, merge_utils)))
        for method, rescale in (("magnitude", False), ("random", False), ("random", density > 0)):
            results = []
            for module in (theirs, merge_utils):
                torch.manual_seed(2)
                results.append(module.prune(tensors[0], density, method, rescale))
            assert torch.equal(*results)
        assert torch.equal(merge_utils.prune(tensors[0], 0, "random", rescale=True), torch.zeros(6, 5))

    def test_a_view_is_pruned_without_a_copy_of_it(self, tensors):
        assert torch.equal(
            merge_utils.magnitude_based_pruning(tensors[0].t(), 0.5),
            merge_utils.magnitude_based_pruning(tensors[0], 0.5).t(),
        )

    def test_bad_arguments(self, tensors):
        for module in (peft.utils.merge_utils, merge_utils):
            with pytest.warns(UserWarning, match="prun"):
                assert module.prune(tensors[0], 1.0, "magnitude") is tensors[0]
            with pytest.raises(ValueError, match="ensity"):
                module.prune(tensors[0], -1, "magnitude")
            with pytest.raises(ValueError, match="method"):
                module.prune(tensors[0], 0.5, "some")
            with pytest.raises((ValueError, RuntimeError), match="method"):
                module.calculate_majority_sign_mask(torch.stack(tensors), "mean")
        with pytest.raises(ValueError, match="one tensor at least"):
            merge_utils.task_arithmetic([], torch.zeros(0))
