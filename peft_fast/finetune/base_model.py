"""The base model, in 4, 8 or 16 bits, from a directory or from the hub."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

import peft_fast
from peft_fast.finetune import data
from peft_fast.finetune.options import ALL_LINEAR, Options, UserError


def process() -> Any:
    """accelerate's PartialState: this process among those that torchrun started (gloo on CPUs, nccl on GPUs)."""
    from accelerate import PartialState  # here: an extra of the main job, which the library does without

    return PartialState(cpu=not torch.cuda.is_available())


def load_tokenizer(name: str) -> Any:
    """The tokenizer of `name` with a padding token; a directory is never looked up on the hub."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name} has no tokenizer that transformers can load: {error}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {name} cannot report where in the text its tokens lie, which the loss mask needs; "
            "convert it to a tokenizer.json (a fast tokenizer)"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {name} has neither a padding nor an end-of-text token; add one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(options: Options) -> PreTrainedModel:
    """The model that `options.model` names, frozen, on this process's device, in `options.bits` bits a weight.

    bitsandbytes quantises while transformers loads, layer by layer, where it is installed; `quantize_linear_layers`
    makes the same bytes without it.
    """
    name, device = str(options.model), process().device or torch.device("cpu")
    local = Path(name).is_dir()
    config = AutoConfig.from_pretrained(name, local_files_only=local)
    stored_bits = _stored_bits(config, options)
    if stored_bits not in (None, options.bits):
        raise UserError(
            f"{name} is stored in {stored_bits} bits: use --bits {stored_bits}; --bits {options.bits} needs the "
            "original weights"
        )
    to_quantise = stored_bits is None and options.bits != 16
    use_bitsandbytes = (
        to_quantise
        and importlib.util.find_spec("bitsandbytes") is not None
        and not (device.type == "cpu" and _runs_what_bitsandbytes_gets_wrong(config, options))
    )
    # Left out, and not None, where there is nothing to say: None replaces what the model's own files say.
    quantization = {"quantization_config": bitsandbytes_config(options)} if use_bitsandbytes else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        name, local_files_only=local, dtype=options.dtype, device_map={"": device}, **quantization
    )
    if to_quantise and not use_bitsandbytes:
        model = peft_fast.quantize_linear_layers(model, bits=options.bits)
    # Training keeps no key-value cache, and transformers reads packed documents' borders only where there is none.
    model.config.use_cache = False
    return model.requires_grad_(False)


def bitsandbytes_config(options: Options) -> BitsAndBytesConfig:
    """NF4 with double quantisation, or LLM.int8."""
    if options.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=options.dtype,
    )


def _stored_bits(config: Any, options: Options) -> int | None:
    """The bits per weight of a model that is stored quantised by bitsandbytes; None for one that is not quantised.

    A format of other libraries counts as the bits asked for: which layers can be adapted is found out later.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if stored.get("load_in_8bit"):
        return 8
    if stored.get("load_in_4bit") or options.bits == 16:
        return 4
    return options.bits


def _runs_what_bitsandbytes_gets_wrong(config: Any, options: Options) -> bool:
    """Whether layers that get no adapter, and so run bitsandbytes' own forward, have rows of incomplete blocks.

    Its CPU code (up to 0.50) takes the wrong scales there, which is a fifth of an output's size. Adapted layers run
    ours, which are right.
    """
    if options.bits != 4 or options.target_modules == ALL_LINEAR:
        return False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return any(isinstance(module, torch.nn.Linear) and module.in_features % 64 for module in model.modules())


def add_adapter(model: PreTrainedModel, options: Options) -> Any:
    """`model` with a fresh LoRA adapter as the options describe; its weights are drawn from torch's generator.

    `prepare_model_for_kbit_training` is left out on purpose: beyond freezing it only widens norms, embedding and head
    to fp32, which under autocast costs memory (2 GB for a vocabulary of 128k) and changes no gradient of the adapter.
    """
    targets = options.target_modules
    config = peft_fast.LoraConfig(
        task_type=peft_fast.TaskType.CAUSAL_LM,
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    try:
        adapted = peft_fast.get_peft_model(model, config)
        if options.recompute:
            peft_fast.set_recompute(adapted, norms="norms" in options.recompute, mlps="mlps" in options.recompute)
    except ValueError as error:  # no layer of these names or kinds, no norm or MLP that can be computed again
        raise UserError(str(error)) from error
    return adapted


def apply_liger(model: PreTrainedModel, options: Options) -> str | None:
    """Liger's norm, RoPE, MLP and cross entropy on a GPU, where it is installed; what was done, or None on a CPU.

    Called before the adapter is added: Trainer's `use_liger_kernel` unwraps an adapted model only where peft is
    installed too. Its fused cross entropy multiplies by the head's weight itself, so it would skip an adapter there.
    """
    if model.device.type != "cuda":
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel: not installed (pip install liger-kernel saves time and memory outside the linear layers)"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # pyright: ignore[reportMissingImports]
    from transformers.integrations.liger import apply_liger_kernel

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel: it has nothing for {model.config.model_type} models"
    if "lm_head" in options.target_modules:
        return "liger-kernel: off, because lm_head is adapted and its fused cross entropy would bypass that"
    apply_liger_kernel(model, None)
    return "liger-kernel: on for norms, RoPE, MLP and cross entropy"


def refuse_leaky_packing(model: Any, collate: Callable[[list[data.Row]], dict[str, torch.Tensor]]) -> None:
    """Raise UserError if the model lets a packed document see the one before it in the row.

    Tried out rather than looked up, since any model may come: the second document's logits must not change when the
    first document does. Shapes and operations are the same both times, so equal means equal.
    """
    model.eval()
    logits = []
    for first_token in (1, 2):
        documents = [{"input_ids": [token] * 16, "labels": [token] * 16} for token in (first_token, 3)]
        batch = {key: values.to(model.device) for key, values in collate(data.pack(documents, 32)).items()}
        with torch.no_grad(), torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            logits.append(model(**batch).logits.flatten(0, 1)[16:])
    if not torch.equal(*logits):
        raise UserError(
            f"{type(model.get_base_model()).__name__} lets packed documents see each other: it ignores position_ids "
            "that restart; leave out --packing"
        )
