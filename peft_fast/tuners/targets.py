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

LORA_TARGETS: dict[str, list[str] | str] = {
    model_type: names.split() for names, types in _BY_TARGETS.items() for model_type in types.split()
}
LORA_TARGETS["gemma4"] = r".*language_model\..*\.(q_proj|v_proj)"  # the towers for images and sound stay as they are
