"""Rows of error_table.py: activated LoRA."""

import torch
from error_tools import Row


def activated(library, tools, **options):
    return tools.model(library, alora_invocation_tokens=[5, 6], **options)


def ids():
    return torch.tensor([[1, 5, 6, 7]])


def by_embeddings(library, tools):
    model = activated(library, tools)
    return model(inputs_embeds=model.get_input_embeddings()(ids()))


ACTIVATED = [
    Row(
        "activated LoRA for another task",
        lambda l, t: l.LoraConfig(alora_invocation_tokens=[5], task_type="SEQ_CLS"),
        UserWarning,
        "only supported for CAUSAL_LM",
        ("looked for by models for CAUSAL_LM", "'SEQ_CLS'", "give alora_offsets"),
    ),
    Row(
        "merging activated LoRA",
        lambda l, t: activated(l, t).merge_adapter(),
        NotImplementedError,
        "does not support merging",
        ("cannot be merged", "Keep it unmerged"),
    ),
    Row(
        "activated LoRA on an embedding",
        lambda l, t: activated(l, t, target_modules=["embed_tokens"]),
        ValueError,
        "unsupported variant combination",
        ("for linear layers", "LoRA around a Embedding"),
    ),
    Row(
        "activated LoRA with DoRA",
        lambda l, t: activated(l, t, use_dora=True),
        ValueError,
        "unsupported variant combination",
        ("not supported with use_dora",),
    ),
    Row(
        "activated LoRA without ids",
        by_embeddings,
        UserWarning,
        "only inputs_embeds are provided",
        ("looked for in input_ids", "Give alora_offsets"),
    ),
    Row(
        "beams with activated LoRA",
        lambda l, t: activated(l, t).eval().generate(input_ids=ids(), num_beams=2, max_new_tokens=2),
        ValueError,
        "Beam search not yet supported",
        silent=True,
        why="ours has it",
    ),
    Row(
        "alora_offsets for an adapter that is always there",
        lambda l, t: t.model(l)(input_ids=ids(), alora_offsets=[2]),
        None,
        "",
        ("for adapters with alora_invocation_tokens", "none such is active"),
        ValueError,
        why="peft ignores them",
    ),
]
