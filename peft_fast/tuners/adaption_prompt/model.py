"""AdaptionPromptModel."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from peft_fast.tuners.base import BaseTuner
from peft_fast.tuners.matching import adaptable_paths

from .layer import AdaptedAttention, AdaptedAttentionGPT, AttentionWithPrompt

ATTENTIONS: dict[str, list[str] | str] = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}


class AdaptionPromptModel(BaseTuner):
    """`model` with adaption prompts in it: for Llama, Mistral and GPT-2, as in peft."""

    prefix = "adaption_"
    target_module_mapping = ATTENTIONS

    def put_in(
        self,
        adapter_name: str,
        config: Any,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """See BaseTuner. The prompts have the base model's dtype, as in peft, and not fp32 whatever it is."""
        if self._model_type() not in ATTENTIONS:
            raise ValueError(
                f"adaption prompts are for models of the types {', '.join(ATTENTIONS)}, got {self._model_type()!r}: "
                "use another method"
            )
        name = self._attention(config)
        super().put_in(adapter_name, config, False, low_cpu_mem_usage, state_dict)
        config.target_modules = name  # and not the paths that it stands for in this model
        del config.modules_to_save  # which is no option

    def _model_type(self) -> str:
        return str(getattr(getattr(self.model, "config", None), "model_type", None))

    def _attention(self, config: Any) -> str:
        """What the attention modules are called."""
        return config.target_modules or str(ATTENTIONS[self._model_type()])

    def _resolved_targets(self, config: Any) -> set[str] | str:
        """The last adapter_layers of the modules with that name."""
        name = self._attention(config)
        paths = [path for path in adaptable_paths(self.model) if path.endswith(f".{name}")]
        if len(paths) < config.adapter_layers:
            raise ValueError(
                f"adapter_layers is {config.adapter_layers}, and the model has {len(paths)} modules called {name!r}: "
                "give fewer layers, or their name in target_modules"
            )
        return set(paths[-config.adapter_layers :])

    def adapt(self, target: nn.Module, path: str, adapter_name: str, config: Any) -> nn.Module:
        if isinstance(target, AttentionWithPrompt):
            target.update_layer(adapter_name, config=config)
            return target
        cls = AdaptedAttentionGPT if self._model_type() == "gpt2" else AdaptedAttention
        if lacking := [name for name in cls.needed if not hasattr(target, name)]:
            raise ValueError(
                f"AdaptionPrompt cannot adapt {path}, a {type(target).__name__}, which has no {', '.join(lacking)}: "
                "name the attention modules in target_modules"
            )
        return cls(target, adapter_name, config=config)

    @classmethod
    def check_file(cls, config: Any, tensors: Mapping[str, Any]) -> None:
        config.check()
        prompts = [tuple(value.shape) for key, value in tensors.items() if key.endswith(".adaption_prompt")]
        wrong = [shape for shape in prompts if len(shape) != 3 or shape[1] != config.adapter_len]
        if wrong or not prompts:
            raise ValueError(
                f"the config says adapter_len={config.adapter_len}, and the file has {wrong[0] if wrong else 'no'} "
                "adaption_prompt: are adapter_config.json and the weights of one adapter?"
            )
