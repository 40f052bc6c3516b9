"""set_recompute: what a model computes again in the backward instead of keeping it, short of whole layers."""

from torch import nn

from .mlp import LoraMLP, set_lora_mlp
from .norms import RecomputingNorm, recompute_norms, restore_norms


def set_recompute(model: nn.Module, *, norms: bool = False, mlps: bool = False) -> None:
    """What of `model`, a PeftModel, is computed again in the backward, so that a forward need not keep it.

    norms   outputs of RMSNorms, and what the norms keep themselves: of each its input is left, the residual stream in
            its own dtype. Costs two or three passes over the stream per norm. Outputs are the same bit for bit,
            gradients to rounding. For torch's and transformers' norms with frozen weights
    mlps    gate's and up's outputs: the same as set_lora_mlp(model, "recompute"), which costs their products again,
            about a fifth of a step

    Both take effect with every forward from now on; False undoes. Of a Llama-3-8B layer in bf16 124 KiB a token are
    left with neither, 92 with norms, 68 with MLPs, 36 with both (`python -m bench.memory`). Whole layers are
    transformers' model.gradient_checkpointing_enable(): 8 KiB, for about a third more time; within its layers nothing
    is gained by these two but a lower peak. `explain(model)` says what each module does.

    Raises ValueError where norms or MLPs are asked for and none can do it; nothing is changed then.
    """
    gated = [module for module in model.modules() if isinstance(module, LoraMLP)]
    if mlps and not gated:
        raise ValueError("mlps=True, but no gated MLP with LoRA can run as one op; explain(model) says why")
    before = any(isinstance(module, RecomputingNorm) for module in model.modules())
    if norms:
        found, refused = recompute_norms(model)
        if not found:
            reasons = "; ".join(dict.fromkeys(refused.values())) or "it has no RMSNorm"
            raise ValueError(f"norms=True, but none of the model's norms can be computed again: {reasons}")
    elif before:
        restore_norms(model)
    if mlps:
        set_lora_mlp(model, "recompute")
    elif any(module.lora_mlp_mode == "recompute" for module in gated):
        set_lora_mlp(model, "fused")
