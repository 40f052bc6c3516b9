"""AdapterStore: what files hold beside an adapter, names by token, what it keeps, and other stores of its model."""

import shutil
import threading

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_fast import AdapterStore
from peft_fast.tuners.mixed_batch import SHAPES, TokenAdapters

from .test_store import KEY, alone, llama, write


@pytest.fixture
def ids() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randint(1, 64, (4, 6))


@torch.no_grad()
def test_an_adapter_of_the_head(tmp_path, ids):
    """peft writes the head's and the embedding's own weights beside it."""
    folder = write(tmp_path / "a", 1, target_modules=["lm_head", "q_proj"])
    assert any("base_layer" in key for key in load_file(f"{folder}/adapter_model.safetensors"))
    store = AdapterStore(llama())
    store.load("a", folder)
    got = store(ids, adapter_names=["a", "__base__", "a", "__base__"]).logits
    torch.testing.assert_close(got[::2], alone(folder, ids[::2]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1::2], llama()(ids[1::2]).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_adapter_whose_start_changed_the_base_is_served_once_converted(tmp_path, ids):
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "start")
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    store = AdapterStore(llama())
    store.load("a", tmp_path / "plain")
    torch.testing.assert_close(store(ids, adapter_names=["a"] * 4).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_adapters_of_tokens_by_number(tmp_path, ids):
    store = AdapterStore(llama())
    for seed, name in enumerate("ab"):
        store.load(name, write(tmp_path / name, seed))
    numbers = torch.tensor([[0, 0, 1, 1, -1, -1]]).repeat(4, 1)
    names = [["a", "a", "b", "b", "__base__", "__base__"]] * 4
    want = store(ids, adapter_names=names).logits
    torch.testing.assert_close(store(ids, adapter_names=TokenAdapters(["a", "b"], numbers)).logits, want)
    want = store(ids, adapter_names=["b"] * 4).logits
    got = store(ids, adapter_names=TokenAdapters(["a", "b"], torch.ones_like(numbers))).logits
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_what_is_kept_does_not_grow_with_lengths_nor_with_names(tmp_path, ids):
    store = AdapterStore(llama())
    folder = write(tmp_path / "a")
    for length in range(1, 3 * SHAPES):
        store.load(f"a{length}", folder)
        store(ids[:1].repeat(2, 4)[:, :length], adapter_names=[f"a{length}", "__base__"])
        store.unload(f"a{length}")
        store(ids[:1].repeat(2, 4)[:, :length], adapter_names=["__base__", "__base__"])
    (batch,) = store._batches.values()
    assert len(batch._segments) == SHAPES
    assert not store._in_use


def test_a_folder_by_a_relative_path_is_read_again_from_anywhere(tmp_path, ids, monkeypatch):
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2)
    monkeypatch.chdir(tmp_path)
    store = AdapterStore(llama(), max_adapters=1)
    store.load("a", "a")
    store.load("b", "b")
    monkeypatch.chdir("/")
    store(ids, adapter_names=["a"] * 4)
    assert store.names == ["a"]


@torch.no_grad()
def test_a_layer_is_of_one_store(tmp_path, ids):
    """Once the first has given the model back, what the second had put there would be gone."""
    model, folder = llama(), write(tmp_path / "a", 1)
    first, second = AdapterStore(model), AdapterStore(model)
    first.load("a", folder)
    with pytest.raises(ValueError, match="has adapters of another store or of a PeftModel"):
        second.load("a", folder)
    assert "a" not in second
    first.close()
    second.load("a", folder)
    torch.testing.assert_close(second(ids, adapter_names=["a"] * 4).logits, alone(folder, ids), rtol=1e-5, atol=1e-5)


def test_a_weight_that_the_stores_dtype_cannot_hold(tmp_path):
    folder = write(tmp_path / "a", 1)
    shutil.copytree(folder, tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    tensors[KEY][0, 0] = 1e6
    save_file(tensors, tmp_path / "b" / "adapter_model.safetensors")
    store = AdapterStore(llama(), dtype=torch.float16)
    store.load("a", folder)
    with pytest.raises(ValueError, match="not for torch.float16.*inf or NaN"):
        store.load("b", tmp_path / "b")
    AdapterStore(llama(), dtype=torch.bfloat16).load("b", tmp_path / "b")


@torch.no_grad()
def test_exchange_evict_and_unload_while_threads_generate(tmp_path, ids):
    """Each answer is of the adapter that was asked for, or it is an error that says why there is none."""
    folders = {name: write(tmp_path / name, seed) for seed, name in enumerate("abc")}
    want = {name: alone(folder, ids) for name, folder in folders.items()}
    store = AdapterStore(llama(), max_adapters=2)
    wrong: list[str] = []
    for name, folder in folders.items():
        store.load(name, folder)

    def serve(mine: str, others: str) -> None:
        for other in others:
            got = store(ids, adapter_names=[mine, other] * 2).logits
            for row in range(4):
                name = (mine, other)[row % 2]
                if not torch.allclose(got[row], want[name][row], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=pair) for pair in (("a", "bc" * 5), ("c", "ab" * 5))]
    for thread in threads:
        thread.start()
    failures = []
    for _ in range(10):
        try:
            store.load("b", folders["b"])
        except ValueError as error:
            failures.append(str(error))
    for thread in threads:
        thread.join()
    assert not wrong
    assert all("no room for adapter 'b'" in failure for failure in failures)
    assert len(store) <= 2
    assert not store._in_use
