"""Tiny models and prompts for them, the same ones for both libraries."""

import importlib

import torch
import transformers as tf

V, E, HEADS, F, N = 96, 32, 4, 48, 5
BERT = {
    "vocab_size": V, "hidden_size": E, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": F,
    "max_position_embeddings": 40,
}  # fmt: skip
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GROUPED = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": V, "n_embd": E, "n_layer": 2, "n_head": HEADS, "n_positions": 40, "pad_token_id": 0}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
T5 = {"vocab_size": V, "d_model": E, "d_kv": 8, "d_ff": F, "num_heads": HEADS, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
BART = {
    "vocab_size": V, "d_model": E, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": F, "decoder_ffn_dim": F, "max_position_embeddings": 40,
    "dropout": 0.0, "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "bert": lambda: tf.BertConfig(**BERT, **DROPOUT),
    "roberta": lambda: tf.RobertaConfig(**{**BERT, **DROPOUT, "pad_token_id": 1}),
    "gpt2": lambda: tf.GPT2Config(**GPT2, **NO_DROPOUT, bos_token_id=1, eos_token_id=2),
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=6, head_dim=16),
    "gemma2": lambda: tf.Gemma2Config(**GROUPED, head_dim=16, sliding_window=8),
    "t5": lambda: tf.T5Config(**T5, num_layers=3),
    "bart": lambda: tf.BartConfig(**BART),
}
AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
METHODS = {
    "prefix": ("PrefixTuningConfig", {}),
    "cartridge": ("CartridgeConfig", {"num_frozen_tokens": 2}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}),
    "prompt": ("PromptTuningConfig", {}),
    "vocabulary": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}),
    "tasks": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
}
CPT = {"cpt_token_ids": [7, 8, 9, 10, 11], "cpt_tokens_type_mask": [1, 2, 3, 4, 5], "opt_projection_epsilon": 0.2}


def base(kind, task, dtype=torch.float32, **options):
    """A model of random weights; the same arguments give the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = CONFIGS[kind]()
        for name, value in options.items():
            setattr(config, name, value)
        model = getattr(tf, AUTO[task]).from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero as transformers makes them: nothing would depend on them
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def config_of(library, method, task, **options):
    if method == "cpt":
        return library.CPTConfig(task_type=task, **{**CPT, **options})
    name, own = METHODS[method]
    cls = getattr(importlib.import_module(f"{library.__name__}.tuners"), name)
    return cls(task_type=task, num_virtual_tokens=N, **{**own, **options})


def prompted(library, method, kind, task, dtype=torch.float32, **options):
    """A PeftModel whose prompt is random but not small, from the same seed in both libraries."""
    torch.manual_seed(11)
    model = library.get_peft_model(base(kind, task, dtype), config_of(library, method, task, **options))
    return shaken(model)


def shaken(model, seed=1, name="default"):
    """Moves the prompt, so that it matters what is done with it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.prompt_encoder[name].named_parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs_of(task, method="", kind="", seed=3):
    """With padding at the end of the first sample."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if task == "SEQ_CLS":
        given["labels"] = torch.tensor([0, 1])
    elif task == "TOKEN_CLS":
        given["labels"] = ids % 2
    elif task == "QUESTION_ANS":
        given |= {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    elif task == "CAUSAL_LM":
        given["labels"] = ids.masked_fill(mask == 0, -100)
    elif task == "SEQ_2_SEQ_LM":
        given["labels"] = torch.randint(3, V, (2, 4), generator=generator)
    if method == "tasks":
        given["task_ids"] = torch.tensor([2, 0])
    return given
