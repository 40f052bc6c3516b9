"""isinstance(model, peft.PeftModel) is true of ours, without peft being imported by us."""

import copy
import io
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import peft_fast

from .runs import adapted, base

TASKS = {
    "CAUSAL_LM": "PeftModelForCausalLM",
    "SEQ_CLS": "PeftModelForSequenceClassification",
    None: "PeftModel",
}


@pytest.mark.parametrize("task", TASKS)
def test_a_model_is_seen_as_pefts_class_of_the_same_name(task):
    from transformers import LlamaForSequenceClassification

    model = base()
    if task == "SEQ_CLS":
        model = LlamaForSequenceClassification(model.config)
    made = adapted("peft_fast", model, task_type=task)
    assert made.__class__ is getattr(peft, TASKS[task])
    assert type(made) is getattr(peft_fast, TASKS[task])
    assert isinstance(made, peft.PeftModel)
    assert isinstance(made, peft_fast.PeftModel)
    assert not isinstance(made, peft.PeftMixedModel)
    assert repr(made).startswith(TASKS[task])


def test_a_layer_is_one_of_pefts_base_class():
    """By which TRL refuses an adapter on the head, whose weights it multiplies by itself."""
    made = adapted("peft_fast", base(), target_modules=["lm_head", "q_proj"])
    assert isinstance(made, peft.PeftModel)
    assert isinstance(made.get_output_embeddings(), BaseTunerLayer)
    assert not isinstance(made.get_output_embeddings(), peft.tuners.lora.LoraLayer)
    assert not isinstance(made.get_base_model(), BaseTunerLayer)


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "pickle-0", "torch.save"])
def test_copies_are_of_the_same_type_and_compute_the_same(way):
    made = adapted("peft_fast", base())
    if way in ("copy", "deepcopy"):
        other = getattr(copy, way)(made)
    elif way.startswith("pickle"):
        other = pickle.loads(pickle.dumps(made, 0 if way.endswith("0") else pickle.HIGHEST_PROTOCOL))
    else:
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(made)
    assert isinstance(other, peft.PeftModel)
    ids = torch.randint(4, 20, (2, 6))
    assert torch.equal(other(input_ids=ids).logits, made(input_ids=ids).logits)


def test_a_subclass_of_the_users_is_seen_as_its_base():
    class Mine(peft_fast.PeftModelForCausalLM):
        pass

    made = Mine(base(), peft_fast.LoraConfig(target_modules=["q_proj"]))
    assert made.__class__ is peft.PeftModelForCausalLM
    assert type(made) is Mine


@pytest.mark.slow
def test_it_compiles_in_one_graph():
    made = adapted("peft_fast", base())
    ids = torch.randint(4, 20, (2, 6))
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-5)


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
import peft, peft_fast
from transformers import LlamaConfig, LlamaForCausalLM
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
model = LlamaForCausalLM(LlamaConfig(**sizes))
made = peft_fast.get_peft_model(model, peft_fast.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
ids = torch.randint(4, 20, (2, 6))
y = made(input_ids=ids).logits
fully_shard(made)
assert isinstance(made, FSDPModule) and isinstance(made, peft.PeftModel)
assert issubclass(type(made), peft_fast.PeftModelForCausalLM) and not issubclass(type(made), peft.PeftModel)
assert torch.allclose(made(input_ids=ids).logits, y, atol=1e-5)
print("sharded")
"""
UNSEEN = """
import sys, peft_fast
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
made = peft_fast.get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), peft_fast.LoraConfig(target_modules=["q_proj"]))
assert made.__class__ is type(made) is peft_fast.PeftModel
assert "peft" not in sys.modules
import peft
assert isinstance(made, peft.PeftModel)
print("seen")
"""


@pytest.mark.slow
def test_torchs_fully_shard_derives_from_our_class(tmp_path):
    """It assigns to `__class__` a class that it makes of what `__class__` says."""
    assert run(SHARDED, str(tmp_path / "store")) == "sharded"


@pytest.mark.slow
def test_without_peft_a_model_is_what_it_is_and_is_recognised_from_its_import_on():
    assert run(UNSEEN) == "seen"


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()[-1]


def test_generating_pipelines_and_checkpointing_of_activations():
    from transformers import pipeline
    from transformers.utils import logging

    from .runs import tokenizer

    made = adapted("peft_fast", base()).eval()
    with torch.no_grad():
        expected = made.get_base_model().generate(torch.tensor([[1, 5, 6]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(made.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=4, do_sample=False), expected)
    said = io.StringIO()
    handler = logging.logging.StreamHandler(said)
    logging.get_logger("transformers").addHandler(handler)
    try:
        out = pipeline("text-generation", model=made, tokenizer=tokenizer())("the", max_new_tokens=3, do_sample=False)
    finally:
        logging.get_logger("transformers").removeHandler(handler)
    assert out[0]["generated_text"].startswith("the")
    assert "not supported" not in said.getvalue()
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        made = adapted("peft_fast", base()).train()
        getattr(made, name)()
        made.enable_input_require_grads()
        made(input_ids=torch.tensor([[1, 5, 6]]), labels=torch.tensor([[1, 5, 6]])).loss.backward()
        assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
        assert made.is_gradient_checkpointing
