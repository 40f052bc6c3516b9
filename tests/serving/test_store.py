"""AdapterStore: adapters as HF PEFT writes them, served beside each other; its memory, its errors, and changes while it
runs."""

import copy
import threading

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fast
from peft_fast import AdapterStore
from peft_fast.serving.adapter import StoredAdapter
from peft_fast.serving.layer import ServedLinear


def llama(hidden: int = 32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write(folder, seed: int = 0, base: nn.Module | None = None, library=peft, **options) -> str:
    """An adapter that changes the outputs, as `library` writes it."""
    torch.manual_seed(seed)
    config = library.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options})
    library.get_peft_model(base or llama(), config).save_pretrained(folder)
    return str(folder)


def alone(source: str, ids: torch.Tensor) -> torch.Tensor:
    return peft.PeftModel.from_pretrained(llama(), source)(ids).logits


@pytest.fixture
def ids() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randint(1, 64, (4, 6))


PATTERN = {"rank_pattern": {"up_proj": 6}}


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    return {
        "a": write(tmp_path / "a", 1, r=8, lora_alpha=3),
        "b": write(
            tmp_path / "b", 2, target_modules=["q_proj", "up_proj"], use_rslora=True, rank_pattern={"q_proj": 6}
        ),
        "c": write(tmp_path / "c", 3, alpha_pattern={"down_proj": 5}, library=peft_fast),
    }


@torch.no_grad()
def test_each_sample_gets_its_own_adapters_output(folders, ids):
    store = AdapterStore(llama())
    for name, folder in folders.items():
        store.load(name, folder)
    names = ["b", "__base__", "c", "a"]
    got = store(ids, adapter_names=names).logits
    for sample, name in enumerate(names):
        own = ids[sample : sample + 1]
        expected = llama()(own).logits if name == "__base__" else alone(folders[name], own)
        torch.testing.assert_close(got[sample : sample + 1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(store.model(ids).logits, llama()(ids).logits)  # without names: the base model
    for settings in ({}, {"num_beams": 3}):
        common = dict(max_new_tokens=5, **settings)
        tokens = store.generate(ids, adapter_names=names, **common)
        model = peft.PeftModel.from_pretrained(llama(), folders["b"])
        assert tokens[:1].tolist() == model.generate(ids[:1], **common).tolist()


@torch.no_grad()
def test_kbit_base(folders, ids):
    base = llama()
    peft_fast.quantize_linear_layers(base)
    expected = peft_fast.PeftModel.from_pretrained(copy.deepcopy(base), folders["a"])(ids).logits
    store = AdapterStore(base)
    store.load("a", folders["a"])
    torch.testing.assert_close(store(ids, adapter_names=["a"] * 4).logits, expected, rtol=1e-4, atol=1e-4)


def test_memory_is_that_of_the_files(folders):
    store = AdapterStore(llama(), dtype=torch.bfloat16)
    total = 0
    for name, folder in folders.items():
        store.load(name, folder)
        total += 2 * sum(tensor.numel() for tensor in load_file(f"{folder}/adapter_model.safetensors").values())
        assert store.nbytes == total
    store.load("a", folders["b"])
    assert store.nbytes < total
    assert len(store) == 3


@torch.no_grad()
def test_the_one_not_used_for_longest_makes_room_and_comes_back(folders, ids):
    store = AdapterStore(llama(), max_adapters=2)
    store.load("a", folders["a"])
    store.load("b", folders["b"])
    store(ids, adapter_names=["a"] * 4)
    store.load("c", folders["c"])
    assert store.names == ["a", "c"]
    assert "b" in store
    got = store(ids, adapter_names=["b", "c", "b", "b"]).logits
    assert store.names == ["b", "c"]
    torch.testing.assert_close(got[:1], alone(folders["b"], ids[:1]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no room for adapter 'a'.*2 adapters.*in use"):
        store(ids, adapter_names=["a", "b", "c", "a"])
    assert sorted(store.names) == ["b", "c"]
    store(ids, adapter_names=["a"] * 4)  # nothing is in use any more
    assert "a" in store.names


def test_bytes_are_bounded(folders):
    size = AdapterStore(llama())
    size.load("a", folders["a"])
    store = AdapterStore(llama(), max_bytes=size.nbytes + 10)
    for name, folder in folders.items():
        store.load(name, folder)
        assert store.nbytes <= store.max_bytes
    assert store.names == ["c"] or store.nbytes + size.nbytes > store.max_bytes
    with pytest.raises(ValueError, match="'a' is too large: .* MiB in all"):
        AdapterStore(llama(), max_bytes=size.nbytes - 1).load("a", folders["a"])
    with pytest.raises(ValueError, match="'a' is too large: rank 8, the store takes up to 6"):
        AdapterStore(llama(), max_rank=6).load("a", folders["a"])


@torch.no_grad()
def test_exchange_and_unload(folders, ids):
    store = AdapterStore(llama())
    store.load("a", folders["a"])
    store(ids, adapter_names=["a"] * 4)
    store.load("a", folders["c"])
    torch.testing.assert_close(store(ids, adapter_names=["a"] * 4).logits, alone(folders["c"], ids))
    store.unload("a")
    with pytest.raises(ValueError, match="no adapter 'a'"):
        store(ids, adapter_names=["a"] * 4)
    with pytest.raises(ValueError, match="no adapter 'a'"):
        store.unload("a")


@torch.no_grad()
def test_a_running_batch_keeps_what_it_began_with(folders, ids):
    store = AdapterStore(llama())
    store.load("a", folders["a"])
    with store.batch(["a"] * 4):
        store.load("a", folders["c"])
        torch.testing.assert_close(store.model(ids).logits, alone(folders["a"], ids), rtol=1e-5, atol=1e-5)
        store.unload("a")
        torch.testing.assert_close(store.model(ids).logits, alone(folders["a"], ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_loading_from_another_thread_while_it_generates(folders, ids):
    """Every answer is one adapter's or the other's, never of both."""
    store, stop = AdapterStore(llama()), threading.Event()
    store.load("a", folders["a"])

    def exchange() -> None:
        while not stop.is_set():
            for name in "bca":
                store.load("a", folders[name])

    answers = [alone(folder, ids) for folder in folders.values()]
    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(20):
            got = store(ids, adapter_names=["a"] * 4).logits
            assert any(torch.allclose(got, answer, atol=1e-5) for answer in answers)
    finally:
        stop.set()
        thread.join()


def test_close_gives_the_model_back(folders, ids):
    model = llama()
    modules = dict(model.named_modules())
    store = AdapterStore(model)
    store.load("a", folders["a"])
    assert any(isinstance(module, ServedLinear) for module in model.modules())
    assert store.close() is model
    assert dict(model.named_modules()) == modules


def damaged(folder: str, change) -> str:
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    change(tensors)
    save_file(tensors, f"{folder}/adapter_model.safetensors")
    return folder


HEAD = "base_model.model.lm_head.weight"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: write(path, base=llama(64)), "of another base model"),
        (
            lambda path: write(path, base=nn.Sequential(nn.Linear(8, 8)), target_modules=["0"]),
            "has no 0",
        ),
        (lambda path: write(path, use_dora=True), "plain LoRA on linear layers"),
        (lambda path: write(path, target_modules=["embed_tokens"]), "plain LoRA on linear layers"),
        (
            lambda path: damaged(
                write(path, modules_to_save=["lm_head"], target_modules=["q_proj"]), lambda t: t[HEAD].add_(1)
            ),
            "plain LoRA on linear layers",
        ),
        (
            lambda path: damaged(
                write(path, target_modules=["lm_head"]), lambda t: t[HEAD.replace(".w", ".base_layer.w")].add_(1)
            ),
            "is of another base model: it has 'base_model.model.lm_head.base_layer.weight'",
        ),
        (lambda path: write(path, init_lora_weights="pissa"), "'pissa' has changed.*as plain LoRA"),
        (lambda path: write(path, init_lora_weights="olora"), "'olora' has changed.*as plain LoRA"),
        (lambda path: damaged(write(path), lambda t: t[KEY].fill_(float("nan"))), "inf or NaN"),
        (lambda path: damaged(write(path), lambda t: t.pop(KEY)), "only one of lora_A and lora_B"),
        (lambda path: damaged(write(path), lambda t: t.update({KEY: t[KEY][:2].clone()})), "its config is not its own"),
        (lambda path: damaged(write(path), lambda t: t.clear()), "no weights"),
        (lambda path: str(path / "nothing"), "neither a directory nor"),
    ],
)
def test_refuses_and_stays_as_it_was(make, message, folders, tmp_path):
    store = AdapterStore(llama(), max_adapters=1)
    store.load("a", folders["a"])
    before = [name for name, _ in store.model.named_modules()]
    with pytest.raises(ValueError, match=message):
        store.load("new", make(tmp_path / "new"))
    assert store.names == ["a"]
    assert "new" not in store
    assert [name for name, _ in store.model.named_modules()] == before


def test_refuses_models_and_arguments(folders, ids):
    with pytest.raises(ValueError, match="must have no adapters"):
        AdapterStore(peft_fast.get_peft_model(llama(), peft_fast.LoraConfig(target_modules=["q_proj"])))
    for limit in (0, "2GB", True, -1.5):
        with pytest.raises(ValueError, match="max_bytes must be positive"):
            AdapterStore(llama(), max_bytes=limit)
    store = AdapterStore(llama())
    with pytest.raises(ValueError, match="__base__"):
        store.load("__base__", folders["a"])
    for name in ("", 5, None):
        with pytest.raises(ValueError, match="name must be a string"):
            store.load(name, folders["a"])
    store.load("a", folders["a"])
    with pytest.raises(TypeError, match="must be a list"):
        store(ids, adapter_names="aaaa")
    with pytest.raises(ValueError, match="one name a sample"):
        store(ids, adapter_names=["a"])
    assert repr(store).startswith("AdapterStore(1 adapters, 0.0 MiB")


def test_memory_can_be_asked_for_while_another_thread_loads(folders, monkeypatch):
    """Python's sum over a dictionary that another thread changes raises: here one loads between two adapters."""
    store = AdapterStore(llama())
    store.load("a", folders["a"])
    store.load("b", folders["b"])
    own, begun = StoredAdapter.nbytes.fget, []

    def nbytes(adapter):
        if not begun:
            begun.append(True)
            loading = threading.Thread(target=store.load, args=("c", folders["b"]))
            loading.start()
            loading.join()
        return own(adapter)

    one = store.nbytes
    monkeypatch.setattr(StoredAdapter, "nbytes", property(nbytes))
    assert store.nbytes == one
    assert store.names == ["a", "b", "c"]
    assert store.nbytes > one
