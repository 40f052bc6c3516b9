"""Mixed models, beside peft's: all methods that can share layers, in every order of two."""

import itertools

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft_fast

LIBRARIES = (peft_fast, peft)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
TARGETS = {
    "lora": ["q_proj", "v_proj", "gate_proj", "up_proj"],
    "loha": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "oft": ["q_proj", "k_proj", "up_proj", "down_proj"],
}
STEPS = {"init_r": 4, "target_r": 2, "total_step": 10}
KINDS = {
    "lora": lambda l, **o: l.LoraConfig(**{"r": 4, "target_modules": TARGETS["lora"], **o}),
    "loha": lambda l, **o: l.LoHaConfig(**{"r": 3, "target_modules": TARGETS["loha"], **o}),
    "lokr": lambda l, **o: l.LoKrConfig(**{"r": 2, "target_modules": TARGETS["loha"], **o}),
    "adalora": lambda l, **o: l.AdaLoraConfig(**{**STEPS, "target_modules": TARGETS["lora"], **o}),
    "oft": lambda l, **o: l.OFTConfig(**{"oft_block_size": 8, "target_modules": TARGETS["oft"], **o}),
    "shira": lambda l, **o: l.ShiraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj", "down_proj"], **o}),
}
FIRST = ("lora", "loha")
ORDERS = [*itertools.product(KINDS), *itertools.product(KINDS, repeat=2), *itertools.product(FIRST, repeat=3)]
ORDERS += [("lora", "oft", "loha"), ("oft", "lora", "oft")]
SOME = [*itertools.permutations(FIRST), ("lora", "loha", "lora"), ("shira", "lora"), ("adalora", "lokr")]
SOME += [("lora", "oft"), ("oft", "loha"), ("oft", "lora")]
LOADED = [*itertools.permutations(FIRST), ("loha", "lora", "loha"), ("shira", "adalora", "lokr"), ("loha", "oft")]


def shaken(model):
    """Random adapters, the same ones in both libraries."""
    for name, parameter in model.named_parameters():
        if any(prefix in name for prefix in ("lora_", "hada_", "lokr_", "oft_", "shira_")):
            generator = torch.Generator().manual_seed(sum(map(ord, name.replace(".base_layer", ""))))
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def mixed(library, base, order):
    """Adapters "a", "b", ... of these kinds. peft's SHiRA has to be the innermost: it draws nothing, so that it may be
    put in first."""
    named = list(zip("abcd", order))
    if library is peft:
        named.sort(key=lambda one: one[1] != "shira")
    torch.manual_seed(2)
    (name, kind), *others = named
    model = library.get_peft_model(base, KINDS[kind](library), name, mixed=True)
    for name, kind in others:
        model.add_adapter(name, KINDS[kind](library))
    model.set_adapter("a")
    return shaken(model).eval()


def is_nested(order):
    """Whether SHiRA is around another method, which in peft it cannot be."""
    return "shira" in order and order[0] != "shira"


def innermost(names):
    return sorted(name.replace(".base_layer", "") for name in names)


@pytest.mark.parametrize("order", [order for order in ORDERS if order != ("oft", "shira")], ids="-".join)
def test_every_set_of_active_adapters(order, llama, tokens):
    """Without SHiRA around a rotation, which peft has inside of it, where it is turned too."""
    models = [mixed(library, llama(), order) for library in LIBRARIES]
    names = [[name for name, _ in model.named_parameters()] for model in models]
    assert innermost(names[0]) == innermost(names[1])
    assert is_nested(order) or names[0] == names[1]
    expected = llama()(tokens).logits
    for n in range(1, len(order) + 1):
        for active in itertools.combinations("abcd"[: len(order)], n):
            outputs = []
            for model in models:
                model.set_adapter(list(active))
                assert model.active_adapters == list(active)
                outputs.append(model(tokens).logits)
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(outputs[0], expected, atol=1e-3)
            trained = [innermost(name for name, p in model.named_parameters() if p.requires_grad) for model in models]
            assert trained[0] == trained[1]
            with models[0].disable_adapter():
                torch.testing.assert_close(models[0](tokens).logits, expected)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_merging_and_unloading(order, llama, tokens):
    base = llama()
    modules, classes = dict(base.named_modules()), [type(module) for module in base.modules()]
    model = mixed(peft_fast, base, order)
    names = list("abcd"[: len(order)])
    model.set_adapter(names)
    expected = model(tokens).logits
    assert dict(model.unload().named_modules()) == modules
    assert [type(module) for module in base.modules()] == classes
    torch.testing.assert_close(base(tokens).logits, llama()(tokens).logits)
    model = mixed(peft_fast, base, order)
    model.set_adapter(names)
    merged = model.merge_and_unload()
    assert dict(merged.named_modules()) == modules
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    if "oft" not in order or len(order) == 1:  # rotations peft merges in another order than it computes them in
        theirs = mixed(peft, llama(), order)
        theirs.set_adapter(names)
        torch.testing.assert_close(theirs.merge_and_unload()(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    one = mixed(peft_fast, llama(), order)
    one.set_adapter("a")
    expected = one(tokens).logits
    torch.testing.assert_close(one.merge_and_unload(adapter_names=["a"])(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", SOME, ids="-".join)
def test_gradients(order, llama, tokens):
    results = []
    for library in LIBRARIES:
        model = mixed(library, llama(), order).train()
        model.set_adapter(list("abcd"[: len(order)]))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[1].items():
        assert (results[0][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("order", LOADED, ids="-".join)
def test_loading(order, llama, tokens, tmp_path):
    for name, kind in zip("abcd", order):
        shaken(peft.get_peft_model(llama(), KINDS[kind](peft))).save_pretrained(tmp_path / name)
    outputs = []
    for library in LIBRARIES:
        model = library.PeftMixedModel.from_pretrained(llama(), tmp_path / "a", "a")
        for name in "abcd"[1 : len(order)]:
            result = model.load_adapter(tmp_path / name, name)
            assert not result.missing_keys
        assert model.active_adapters == ["a"]
        first = model.eval()(tokens).logits
        model.set_adapter(list("abcd"[: len(order)]), inference_mode=True)
        assert not any(p.requires_grad for p in model.parameters())
        outputs.append((first, model(tokens).logits, model.generate(tokens, max_new_tokens=3, do_sample=False)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    assert type(model).__name__ == "PeftMixedModel"
    model = peft_fast.PeftMixedModel.from_pretrained(llama(), tmp_path / "a", "a", low_cpu_mem_usage=True)
    model.load_adapter(tmp_path / "b", "b", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())
    torch.testing.assert_close(model.eval()(tokens).logits, outputs[0][0], rtol=1e-4, atol=1e-5)


def test_deleting(llama, tokens):
    for names in ("b", ["a"], ["a", "c"]):
        models = [mixed(library, llama(), ("lora", "loha", "lora")) for library in LIBRARIES]
        for model in models:
            model.set_adapter(["a", "b", "c"])
            model.delete_adapter(names)
        torch.testing.assert_close(models[0](tokens).logits, models[1](tokens).logits, rtol=1e-4, atol=1e-5)
        assert list(models[0].peft_config) == list(models[1].peft_config)
        assert models[0].active_adapters == [name for name in "abc" if name not in names]
    models[0].delete_adapter(list(models[0].peft_config))
    torch.testing.assert_close(models[0](tokens).logits, llama()(tokens).logits)
    models[0].add_adapter("new", KINDS["loha"](peft_fast))
    assert models[0].active_adapters == ["new"]
    assert not torch.allclose(shaken(models[0])(tokens).logits, llama()(tokens).logits, atol=1e-3)


def test_status(llama):
    """peft's mixed models have none."""
    model = mixed(peft_fast, llama(), ("lora", "loha"))
    rows = {row.name: row for row in model.get_layer_status()}
    outer = rows["model.model.layers.0.self_attn.q_proj"]
    assert (outer.module_type, outer.available_adapters) == ("loha.Linear", ["b"])
    inner = rows["model.model.layers.0.self_attn.q_proj.base_layer"]
    assert (inner.module_type, inner.available_adapters) == ("lora.Linear", ["a"])
    assert model.get_model_status().peft_types == {"a": "LORA", "b": "LOHA"}
    text = str(peft_fast.explain(model))
    assert "hooks or a forward of its own" in text or "called" in text


def test_parameters_are_counted(llama, capsys):
    models = [mixed(library, llama(), ("lora", "loha")) for library in LIBRARIES]
    assert models[0].get_nb_trainable_parameters() == models[1].get_nb_trainable_parameters()
    for model in models:
        model.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


@pytest.mark.parametrize(
    "order", [("lora", "loha"), ("loha", "lora"), ("oft", "lora"), ("oft", "loha"), ("loha", "oft")], ids="-".join
)
def test_convolutions(order):
    """peft's LoRA fails around a convolution with LoHa, and its OFT counts pixels of overlapping patches twice."""
    x = torch.randn(2, 4, 6, 6)
    outputs = []
    for library in LIBRARIES if order[0] == "lora" else [peft_fast]:
        sizes = {"kernel_size": 1} if order[1] == "oft" else {"kernel_size": 3, "padding": 1}
        with torch.random.fork_rng():
            torch.manual_seed(3)
            base = nn.Sequential(nn.Conv2d(4, 8, **sizes), nn.ReLU(), nn.Conv2d(8, 4, 1))
        torch.manual_seed(2)
        options = [{"target_modules": ["0", "2"]} | ({"oft_block_size": 4} if kind == "oft" else {}) for kind in order]
        model = library.get_peft_model(base, KINDS[order[0]](library, **options[0]), "a", mixed=True)
        model.add_adapter("b", KINDS[order[1]](library, **options[1]))
        shaken(model).eval().set_adapter(["a", "b"])
        outputs += [model(x), model.merge_and_unload()(x)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [("lora", "oft"), ("oft", "lora"), ("loha", "oft", "lora")], ids="-".join)
def test_merging_one_after_the_other(order, llama, tokens, untouched):
    """A rotation turns what the adapters inside it put out."""
    model = mixed(peft_fast, llama(), order)
    names = list("abcd"[: len(order)])
    model.set_adapter(names)
    expected = model(tokens).logits
    model.base_model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    rotation = names[order.index("oft")]
    if rotation != "a":  # its layer is around another's
        with untouched(model), pytest.raises(ValueError, match="merge all active adapters at once"):
            model.base_model.merge_adapter([rotation])
    for name in names:
        model.base_model.merge_adapter([name])
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    model = mixed(peft_fast, llama(), order)
    model.set_adapter([rotation])
    expected = model(tokens).logits
    model.set_adapter(names)
    only = model.merge_and_unload(adapter_names=[rotation])
    torch.testing.assert_close(only(tokens).logits, expected, rtol=1e-4, atol=1e-5)


class TestRefusals:
    def test_rotations_around_patches(self, untouched):
        base = nn.Sequential(nn.Conv2d(4, 4, 3))
        model = peft_fast.get_peft_model(base, KINDS["lora"](peft_fast, target_modules=["0"]), "a", mixed=True)
        with untouched(model), pytest.raises(ValueError, match="Add OFT first"):
            model.add_adapter("b", KINDS["oft"](peft_fast, oft_block_size=4, target_modules=["0"]))

    def test_methods_that_cannot_be_mixed(self, llama, untouched):
        config = peft_fast.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = llama()
        with untouched(model), pytest.raises(ValueError, match=r"of the methods LORA, .*SHIRA.*, got .*PROMPT_TUNING"):
            peft_fast.get_peft_model(model, config, mixed=True)
        model = mixed(peft_fast, llama(), ("lora",))
        with untouched(model), pytest.raises(ValueError, match="of the methods LORA, "):
            model.add_adapter("b", config)
        plain = peft_fast.get_peft_model(llama(), KINDS["lora"](peft_fast))
        with untouched(plain), pytest.raises(ValueError, match="must be of one type"):
            plain.add_adapter("b", KINDS["loha"](peft_fast))

    def test_saving(self, llama, tmp_path):
        for library in LIBRARIES:
            model = mixed(library, llama(), ("lora", "loha"))
            with pytest.raises(NotImplementedError):
                model.save_pretrained(tmp_path)
            with pytest.raises(NotImplementedError):
                model.create_or_update_model_card(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_names(self, llama, untouched):
        model = mixed(peft_fast, llama(), ("lora", "loha"))
        with untouched(model):
            for call in (model.set_adapter, model.delete_adapter):
                with pytest.raises(ValueError, match="'no' does not exist"):
                    call(["a", "no"])
            with pytest.raises(ValueError, match="exists already"):
                model.add_adapter("a", KINDS["loha"](peft_fast))

    def test_dora_on_a_layer_of_another_method(self, llama, untouched):
        for order in (("lora", "loha"), ("loha", "lora")):
            configs = [KINDS[kind](peft_fast, **({"use_dora": True} if kind == "lora" else {})) for kind in order]
            model = peft_fast.get_peft_model(llama(), configs[0], "a", mixed=True)
            with untouched(model), pytest.raises(ValueError, match="DoRA cannot share"):
                model.add_adapter("b", configs[1])

    def test_merging_in_16_bits(self, llama):
        with pytest.raises(NotImplementedError, match=r"call merge_and_unload\(\)"):
            mixed(peft_fast, llama(), ("lora", "loha")).merge_to_16bit()

    def test_places_that_are_not_in_the_weight(self, llama, tmp_path, untouched):
        """SHiRA's file is looked at as it is without others."""
        shaken(peft_fast.get_peft_model(llama(), KINDS["shira"](peft_fast))).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        moved = {key: value + 1000 if "indices" in key else value for key, value in tensors.items()}
        save_file(moved, tmp_path / "adapter_model.safetensors")
        model = mixed(peft_fast, llama(), ("lora",))
        with untouched(model), pytest.raises(ValueError, match="must be rows and columns of a weight"):
            model.load_adapter(tmp_path, "b")

    def test_k_bit_layers(self, llama_4bit, untouched):
        model = llama_4bit()
        with untouched(model), pytest.raises(ValueError, match="cannot have k-bit layers"):
            peft_fast.get_peft_model(model, KINDS["lora"](peft_fast), mixed=True)
