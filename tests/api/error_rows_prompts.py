"""Rows of error_table.py: learned prompts."""

from typing import Any

import torch
import transformers
from error_tools import Row
from prompt_models import base, config_of, inputs_of, prompted
from safetensors.torch import save_file

CAUSAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


def _distilbert() -> Any:
    config = transformers.DistilBertConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    return transformers.DistilBertForSequenceClassification(config)


def _checkpointed() -> Any:
    model = base("gpt2", "CAUSAL_LM")
    model.gradient_checkpointing_enable()
    return model


def _make(library: Any, method: str, kind: str = "gpt2", task: str = "CAUSAL_LM", **options: Any) -> Any:
    return library.get_peft_model(base(kind, task), config_of(library, method, task, **options))


def _saved(library: Any, tools: Any, method: str) -> Any:
    prompted(library, method, "gpt2", "CAUSAL_LM").save_pretrained(tools.folder)
    return tools.folder


def _load(library: Any, folder: Any, **options: Any) -> Any:
    return library.PeftModel.from_pretrained(base("gpt2", "CAUSAL_LM"), folder, **options)


def _reload(library: Any, method: str) -> Any:
    model = prompted(library, method, "gpt2", "CAUSAL_LM")
    return library.set_peft_model_state_dict(model, library.get_peft_model_state_dict(model))


def _disabled(library: Any) -> None:
    with prompted(library, "prefix", "bert", "SEQ_CLS").disable_adapter():
        pass


def _two_tasks(library: Any) -> Any:
    return prompted(library, "tasks", "gpt2", "CAUSAL_LM")(**inputs_of("CAUSAL_LM"))


def _with(library: Any, method: str, task: str = "CAUSAL_LM", kind: str = "gpt2", **more: Any) -> Any:
    return prompted(library, method, kind, task)(**inputs_of(task), **more)


PROMPTS = [
    Row(
        "a prompt of a text without its tokenizer",
        lambda l, t: l.PromptTuningConfig(**CAUSAL, prompt_tuning_init="TEXT", prompt_tuning_init_text="x"),
        ValueError,
        "tokenizer_name_or_path can't be None",
        ("prompt_tuning_init='TEXT' needs tokenizer_name_or_path", "got None"),
    ),
    Row(
        "a prompt of a text without the text",
        lambda l, t: l.PromptTuningConfig(**CAUSAL, prompt_tuning_init="TEXT", tokenizer_name_or_path="x"),
        ValueError,
        "prompt_tuning_init_text can't be None",
        ("prompt_tuning_init='TEXT' needs prompt_tuning_init_text", "got None"),
    ),
    Row(
        "options of a tokenizer for a prompt of no text",
        lambda l, t: l.PromptTuningConfig(**CAUSAL, tokenizer_kwargs={"use_fast": True}),
        ValueError,
        "tokenizer_kwargs only valid",
        ("tokenizer_kwargs are for prompt_tuning_init='TEXT'", "leave them out"),
    ),
    Row(
        "a start of a prompt that does not exist",
        lambda l, t: _make(l, "prompt", prompt_tuning_init="WORDS"),
        None,
        says=("prompt_tuning_init must be one of ['TEXT', 'SAMPLE_VOCAB', 'RANDOM']", "got 'WORDS'"),
        ours=ValueError,
        why="peft starts from random numbers then",
    ),
    Row(
        "a prompt of no tokens",
        lambda l, t: l.get_peft_model(base("gpt2", "CAUSAL_LM"), l.PromptTuningConfig(task_type="CAUSAL_LM")),
        TypeError,
        "",
        ("num_virtual_tokens must be a positive integer", "got None"),
        ValueError,
        why="the value of an option is missing",
    ),
    Row(
        "an encoder of P-tuning that does not exist",
        lambda l, t: _make(l, "mlp", encoder_reparameterization_type="RNN"),
        ValueError,
        "not recognized",
        ("encoder_reparameterization_type must be one of ['MLP', 'LSTM']", "got 'RNN'"),
    ),
    Row(
        "P-tuning's number of layers for an MLP",
        lambda l, t: _make(l, "mlp", encoder_num_layers=5),
        (UserWarning, AttributeError),
        "",
        ("encoder_num_layers=5 has no effect on the MLP",),
        UserWarning,
        why="peft fails in its warning where the type is given as a string",
    ),
    Row(
        "prompts of tasks that start from a file, without one",
        lambda l, t: _make(l, "tasks", prompt_tuning_init="EXACT_SOURCE_TASK"),
        ValueError,
        "prompt_tuning_init_state_dict_path needs to be specified",
        ("prompt_tuning_init='EXACT_SOURCE_TASK' needs prompt_tuning_init_state_dict_path",),
    ),
    Row(
        "CPT for another task",
        lambda l, t: l.CPTConfig(task_type="SEQ_CLS"),
        ValueError,
        "only supports task_type = CAUSAL_LM",
        ("only supports task_type 'CAUSAL_LM'", "got"),
    ),
    Row(
        "CPT's lists of other lengths",
        lambda l, t: l.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1]),
        ValueError,
        "must have the same length",
        ("must have the same length, got [2, 1, 2]",),
    ),
    Row(
        "CPT's mask with a token that is not to be attended to",
        lambda l, t: _make(l, "cpt", cpt_mask=[1, 1, 0, 1, 1]),
        None,
        says=("cpt_mask must be ones", "leave tokens"),
        ours=ValueError,
        why="peft does not look at it",
    ),
    Row(
        "prompt learning without a task",
        lambda l, t: l.get_peft_model(base("gpt2", "CAUSAL_LM"), config_of(l, "prompt", None)),
        KeyError,
        "None",
        ("prompt learning needs task_type in its config", "got task_type=None"),
        ValueError,
        why="a KeyError says nothing but the key",
    ),
    Row(
        "a prefix under gradient checkpointing",
        lambda l, t: l.get_peft_model(_checkpointed(), config_of(l, "prefix", "CAUSAL_LM")),
        ValueError,
        "does not work with gradient checkpointing",
        ("PREFIX_TUNING does not work with gradient checkpointing", "call gradient_checkpointing_disable()"),
    ),
    Row(
        "a prefix for a model that takes no cache",
        lambda l, t: l.get_peft_model(
            _distilbert(), config_of(l, "prefix", "SEQ_CLS", token_dim=32, num_attention_heads=4, num_layers=2)
        )(**inputs_of("SEQ_CLS")),
        ValueError,
        "does not support past key values",
        ("does not support past_key_values", "learn another kind of prompt"),
    ),
    Row(
        "prompts put into a model's layers",
        lambda l, t: l.inject_adapter_in_model(config_of(l, "prompt", "CAUSAL_LM"), base("gpt2", "CAUSAL_LM")),
        ValueError,
        "does not support prompt learning",
        ("PROMPT_TUNING learns prompts", "needs a PeftModel"),
    ),
    Row(
        "LoRA beside a prompt",
        lambda l, t: prompted(l, "prompt", "gpt2", "CAUSAL_LM").add_adapter("b", l.LoraConfig(task_type="CAUSAL_LM")),
        ValueError,
        "Cannot combine adapters with different peft types",
        ("must be of one type: it has PROMPT_TUNING, got", "LORA"),
    ),
    Row(
        "the status of layers where prompts are learned",
        lambda l, t: prompted(l, "prompt", "gpt2", "CAUSAL_LM").get_layer_status(),
        TypeError,
        "not supported",
        ("are for adapters in layers", "see its peft_config"),
    ),
    Row(
        "merging a prompt",
        lambda l, t: prompted(l, "prompt", "gpt2", "CAUSAL_LM").merge_and_unload(),
        AttributeError,
        "'GPT2LMHeadModel' object has no attribute 'merge_and_unload'",
        ("'GPT2LMHeadModel' object has no attribute 'merge_and_unload'",),
    ),
    Row(
        "freezing a prompt by set_requires_grad",
        lambda l, t: prompted(l, "prompt", "gpt2", "CAUSAL_LM").set_requires_grad("default", False),
        TypeError,
        "not supported for prompt learning",
        silent=True,
        why="it freezes the prompt",
    ),
    Row(
        "switching off the prompt of a classifier",
        lambda l, t: _disabled(l),
        UnboundLocalError,
        "prepare_inputs_for_generation",
        silent=True,
        why="peft fails for models that do not generate",
    ),
    Row(
        "several tasks' prompts without task_ids",
        lambda l, t: _two_tasks(l),
        ValueError,
        "task_ids cannot be None",
        ("task_ids [batch] must say which task each sample is of", "got None"),
    ),
    Row(
        "task_ids for a prompt of one task",
        lambda l, t: _with(l, "prompt", task_ids=torch.tensor([0, 0])),
        None,
        says=("task_ids are for MULTITASK_PROMPT_TUNING", "leave them out"),
        ours=ValueError,
        why="peft does not look at them",
    ),
    Row(
        "position_ids after a prompt",
        lambda l, t: _with(l, "prompt", position_ids=torch.arange(7).expand(2, -1)),
        UserWarning,
        "Position ids are not supported",
        ("position_ids are left out",),
    ),
    Row(
        "token_type_ids after a decoder's prompt",
        lambda l, t: _with(l, "prompt", token_type_ids=torch.zeros(2, 7, dtype=torch.long)),
        UserWarning,
        "Token type ids are not supported",
        ("token_type_ids are left out",),
    ),
    Row(
        "labels of tokens after a prompt",
        lambda l, t: _with(l, "prompt", "TOKEN_CLS", "bert"),
        ValueError,
        "batch_size",
        silent=True,
        why="the prompt gets labels that do not count",
    ),
    Row(
        "a forward of nothing",
        lambda l, t: prompted(l, "prompt", "gpt2", "CAUSAL_LM")(),
        ValueError,
        "You have to provide either input_ids or inputs_embeds",
        ("a forward needs input_ids or inputs_embeds",),
    ),
    Row(
        "keys and values in place of a prefix",
        lambda l, t: _with(l, "prefix", past_key_values=transformers.DynamicCache()),
        None,
        says=("past_key_values cannot be given", "use generate"),
        ours=ValueError,
        why="peft puts the prefix in their place",
    ),
    Row(
        "generating from nothing, with an encoder",
        lambda l, t: prompted(l, "prompt", "t5", "SEQ_2_SEQ_LM").generate(),
        ValueError,
        "input_ids must be provided",
        ("input_ids must be given to generate",),
    ),
    Row(
        "encoder_outputs after a prompt",
        lambda l, t: prompted(l, "prompt", "t5", "SEQ_2_SEQ_LM").generate(
            input_ids=torch.tensor([[5, 6]]), encoder_outputs=(torch.zeros(1, 2, 32),), max_new_tokens=1
        ),
        UserWarning,
        "encoder_outputs` should not be passed",
        ("encoder_outputs are left out",),
    ),
    Row(
        "loading a prompt to train it",
        lambda l, t: _load(l, _saved(l, t, "prompt"), is_trainable=True),
        ValueError,
        "Cannot set a prompt learning adapter to trainable",
        ("a prompt cannot be trainable when it is loaded", "is_trainable=False"),
    ),
    Row(
        "loading what an encoder put out into the encoder, where sizes differ",
        lambda l, t: _reload(l, "projected"),
        RuntimeError,
        "size mismatch",
        ("has the prompt that an encoder put out, and not the encoder", "inference_mode=True"),
        ValueError,
        why="the file is not for it",
    ),
    Row(
        "loading what an encoder put out into the encoder, where sizes agree",
        lambda l, t: _reload(l, "lstm"),
        None,
        says=("has the prompt that an encoder put out, and not the encoder", "inference_mode=True"),
        ours=ValueError,
        why="peft's encoder then encodes it again: another prompt",
    ),
    Row(
        "a prompt's file without the prompt",
        lambda l, t: _load(l, _emptied(_saved(l, t, "prompt"))),
        KeyError,
        "prompt_embeddings",
        ("the file is no learned prompt: it must have a matrix prompt_embeddings",),
        ValueError,
        why="a KeyError says nothing but the key",
    ),
]


def _emptied(folder: Any) -> Any:
    save_file({"other": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder
