"""What is adapted when target_modules is not given: by `model_type` of the model's config, as in peft."""

_BY_TARGETS = {
    "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    "q v": "t5 mt5",
    "q v q_proj v_proj": "blip-2",
    "query value": "bert roberta xlm-roberta electra layoutlm",
    "query_proj value_proj": "deberta-v2",
    "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    "c_attn": "gpt2 gpt_bigcode",
    "c_proj c_attn": "btlm",
    "in_proj": "deberta",
    "qkv_proj": "codegen",
    "Wqkv": "mpt",
    "q_proj v_proj fc1 fc2": "phi",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
}

Targets = dict[str, list[str] | str]


def _by_type(by_targets: dict[str, str]) -> Targets:
    return {model_type: names.split() for names, types in by_targets.items() for model_type in types.split()}


LORA_TARGETS = _by_type(_BY_TARGETS)
LORA_TARGETS["gemma4"] = r".*language_model\..*\.(q_proj|v_proj)"  # the towers for images and sound stay as they are

VERA_TARGETS: Targets = LORA_TARGETS | {"phi": ["q_proj", "v_proj"]}
SHIRA_TARGETS: Targets = VERA_TARGETS.copy()
FOURIERFT_TARGETS: Targets = LORA_TARGETS | {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}

ADALORA_TARGETS = _by_type(
    {
        "q k v o wi wo": "t5",
        "q k v o wi_0 wi_1 wo": "mt5",
        "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
        "c_attn": "gpt2 gpt_bigcode",
        "query_key_value": "bloom gpt_neox",
        "q_proj v_proj": "gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3",
        "query value": "bert",
        "query key value dense": "roberta",
        "query_proj key_proj value_proj dense": "deberta-v2",
        "in_proj": "deberta",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
    }
)
ADALORA_TARGETS["gemma4"] = LORA_TARGETS["gemma4"]

# {the layers: model types}: after a bar those whose input is scaled, and not their output.
_IA3 = {
    "k v | wo": "t5",
    "k v wi_1 |": "mt5",
    "c_attn | mlp.c_proj": "gpt2 gpt_bigcode",
    "query_key_value | mlp.dense_4h_to_h": "bloom",
    "query_key_value | dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
    "key value | output.dense": "roberta bert",
    "key_proj value_proj | output.dense": "deberta-v2",
    "in_proj | output.dense": "deberta",
    "q_proj k_proj | fc2": "opt",
    "q_proj v_proj | fc2": "bart phi",
    "q_proj v_proj | fc_out": "gptj",
    "q_proj v_proj | c_proj": "gpt_neo",
    "k_proj v_proj | down_proj": "llama mistral",
    "k_proj v_proj | w2": "mixtral",
    "q_proj v_proj | down_proj": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
}
IA3_TARGETS = _by_type({names.replace("|", ""): types for names, types in _IA3.items()})
IA3_FEEDFORWARD: dict[str, list[str]] = {
    model_type: names.partition("|")[2].split() for names, types in _IA3.items() for model_type in types.split()
}

LN_TARGETS = _by_type(
    {
        "input_layernorm post_attention_layernorm norm": "llama mistral gemma",
        "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
        "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
        "layer_norm final_layer_norm": "t5 mt5",
        "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
        "ln_1 ln_2 ln_f": "gpt2",
        "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
        "ln_1 ln_f": "gptj",
        "input_layernorm final_layernorm": "phi",
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm": (
            "gemma2 gemma3_text"
        ),
        "post_attention_layernorm": "qwen2 qwen3",
    }
)
