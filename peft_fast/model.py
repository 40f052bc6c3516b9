"""PeftModel: a base model with adapters, and the life of these adapters.

The work is done by the method's tuner (`base_model`, see tuners/base.py), which has the user's model as `.model`.
Methods that learn prompts change no layer: there `base_model` is the user's model itself, and a PromptTuner does the
work (see tuners/prompt_learning). This class adds names, files and the face that the rest of the ecosystem knows.
Attributes that it lacks are the model's.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import PushToHubMixin

from .adapter_file import load_peft_weights
from .arguments import check_trainable_file, note_offload
from .checkpoint import apply_load, get_peft_model_state_dict, plan_load
from .config import CONFIG_NAME, PeftConfig, checked_config
from .files import locate, without_idle_arguments
from .integrations.recognised import Recognised
from .integrations.vllm import check_and_leave_out_embeddings, for_vllm
from .kbit import make_inputs_require_grad
from .knows_adapters import KnowsAdapters
from .load_result import LoadResult
from .mixed_batches import MixedBatches
from .peft_types import PeftType
from .prompts import LearnsPrompts
from .saving import write_adapter, write_card
from .status import TunerLayerStatus, TunerModelStatus, count_parameters, get_layer_status, get_model_status
from .transaction import unchanged_on_error
from .tuners import method_class, tuner_class
from .tuners.base import BaseTuner
from .tuners.lora.conversion import as_plain_lora
from .tuners.names import list_of_names
from .tuners.prompt_learning import PromptTuner


class PeftModel(Recognised, LearnsPrompts, MixedBatches, KnowsAdapters, PushToHubMixin, nn.Module):
    """`model` with an adapter in it, as `peft_config` describes. `model` itself is changed: `unload` restores it.

    `autocast_adapter_dtype`: adapter weights that would be fp16 or bf16 are kept in fp32. `low_cpu_mem_usage`: adapter
    weights are made on the meta device, for a file to be loaded over them; not for training a new adapter.
    Raises ValueError or NotImplementedError for what cannot be done; `model` is then unchanged.
    """

    _hf_peft_config_loaded = True  # transformers' Trainer: a quantised model that can be trained, having adapters
    base_model: Any  # a BaseTuner; where prompts are learned, the user's model

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        peft_config = checked_config(peft_config)
        if peft_config.is_prompt_learning:
            self._learn_prompts(model, peft_config, adapter_name)
        else:
            self.base_model = self._tuner_class(peft_config)(
                model, peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype
            )
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}  # ours, never the base model's
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            make_inputs_require_grad(model)

    @classmethod
    def _tuner_class(cls, config: PeftConfig) -> type[BaseTuner]:
        return tuner_class(config.peft_type)

    @classmethod
    def _class_for(cls, config: PeftConfig) -> "type[PeftModel]":
        from .mapping import model_class  # the table has the subclasses of this class

        return model_class(config.task_type, default=cls)

    @property
    def _tuner(self) -> BaseTuner | PromptTuner:
        """What manages the adapters."""
        return PromptTuner(self) if self._is_prompt_learning else self.base_model

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Have the output of the model's input embeddings require gradients, unless its weights have few bits (which
        prepare_model_for_kbit_training is for)."""
        names = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        if not any(getattr(model, name, False) for name in names) and hasattr(model, "get_input_embeddings"):
            make_inputs_require_grad(model)

    def get_base_model(self) -> nn.Module:
        """The user's model, with our layers in it."""
        return self._tuner.model

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an untrained adapter; it is neither active nor trainable until `set_adapter`."""
        peft_config = checked_config(peft_config)
        self._check_type(peft_config)
        self._tuner.put_in(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage)

    def _check_type(self, peft_config: PeftConfig) -> None:
        if peft_config.peft_type != self.peft_type:
            raise ValueError(
                "the adapters of one model must be of one type: it has "
                f"{PeftType(self.peft_type).value}, got {peft_config.peft_type}"
            )

    def delete_adapter(self, adapter_name: str) -> None:
        self._tuner.delete_adapter(adapter_name)
        self._keep_mixed_training(deleted=adapter_name)
        self._label = None

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Activate one adapter and train it, unless `inference_mode`. For several: `model.base_model.set_adapter`."""
        if not isinstance(adapter_name, str):
            raise TypeError(f"one name is needed, got {adapter_name!r}; model.base_model.set_adapter takes several")
        self._tuner.set_adapter(adapter_name, inference_mode)
        if not inference_mode:
            self._keep_mixed_training()
        self._label = None

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self._tuner.set_requires_grad(adapter_names, requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is the base model."""
        with self._tuner.disabled_adapters():
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._mixed_batch(kwargs):
            return self.base_model(*args, **self._for_the_base(kwargs))

    def _call_base_model(self, given: dict[str, Any], task_ids: Any, kwargs: dict[str, Any]) -> Any:
        """What a task's forward does: pass on what was given, after the prompt where there is one."""
        with self._mixed_batch(kwargs, given.get("input_ids")):
            return self._call_with(given, task_ids, self._for_the_base(kwargs))

    def _call_with(self, given: dict[str, Any], task_ids: Any, kwargs: dict[str, Any]) -> Any:
        inputs = {**{name: value for name, value in given.items() if value is not None}, **kwargs}
        if self._has_prompt:
            return self._call_with_prompt(inputs, task_ids)
        if task_ids is not None and not self._is_prompt_learning:
            raise ValueError(
                f"task_ids are for MULTITASK_PROMPT_TUNING, got them for {PeftType(self.peft_type).value} adapters: "
                "leave them out"
            )
        return self.base_model(**inputs)

    def _for_the_base(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A forward's keywords less those that are for adapters."""
        return {name: value for name, value in kwargs.items() if name not in self.special_peft_forward_args}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.get_base_model()
        if "generation_config" in vars(self):  # assigned to us, and it is the base model that reads it
            model.generation_config = self.generation_config
        inputs = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        with self._mixed_batch(kwargs, inputs if isinstance(inputs, Tensor) else None, generating=True):
            return self._generator().generate(*args, **self._for_the_base(kwargs))

    def _generator(self) -> Any:
        """Whose `generate` is called."""
        return self.get_base_model()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters. A k-bit weight counts its elements, not its bytes."""
        return count_parameters(self)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        return get_model_status(self)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str | None = None,
        save_function: Any = None,
        push_to_hub: bool = False,
        vllm_compatible: bool = False,
    ) -> None:
        """Write adapters (all unless selected): "default" into the directory, others into folders of their names.

        Writes adapter_model.safetensors (.bin without `safe_serialization`) and adapter_config.json, and README.md for
        the directory, all of an adapter's or none: files that were there survive a failure and a kill. `state_dict`:
        tensors gathered from shards. Processes other than the main one write nothing; where FSDP2 (fully_shard) has
        sharded the model all have to call this, and the tensors are gathered here. `max_shard_size` (push_to_hub
        passes it) and `save_function` (examples with accelerate do) have no effect: adapters are one file, written in
        the way that cannot be torn.
        `path_initial_model_for_weight_conversion`: the folder that the adapter was saved to before training, for one
        that changed the base weights at its start (PiSSA, OLoRA, ...). What is written is then the difference to that,
        a plain adapter of twice the rank for the base weights as they were. Raises ValueError where there is none such.
        `vllm_compatible`: as vLLM can serve them (integrations/vllm.py), or ValueError for what it has no place for.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise ValueError(f"save_directory must be a directory, got the file {directory}")
        if push_to_hub:
            raise ValueError("save_pretrained writes to a directory and uploads nothing: call push_to_hub(repo_id)")
        chosen = list(self.peft_config) if selected_adapters is None else selected_adapters
        names = list(list_of_names("selected_adapters", chosen))
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"selected_adapters {unknown} do not exist: there are {sorted(self.peft_config)}")
        if vllm_compatible and path_initial_model_for_weight_conversion is not None:
            raise ValueError(
                "give one of vllm_compatible and path_initial_model_for_weight_conversion: convert the adapter, load "
                "the converted one on the base model as it was, and save that for vLLM"
            )
        if vllm_compatible:
            save_embedding_layers = check_and_leave_out_embeddings(self._tuner, names, save_embedding_layers)
        if state_dict is not None and not is_main_process:
            return  # what accelerate's get_state_dict gives these processes is empty
        ready = {}
        for name in names:  # all of them, before the first is written
            config: Any = self._tuner.config_for_file(name)
            tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)
            if path_initial_model_for_weight_conversion is not None and is_main_process:
                self._warn_of_requantised()
                config, tensors = as_plain_lora(config, tensors, path_initial_model_for_weight_conversion)
            ready[name] = for_vllm(self._tuner, name, tensors) if vllm_compatible else (config, tensors)
        for name, (config, tensors) in ready.items() if is_main_process else ():
            folder = directory if name == "default" else directory / name
            write_adapter(folder, self.get_base_model(), config, tensors, safe_serialization, name == "default")
        if "default" not in ready and is_main_process and self.peft_config:
            self.create_or_update_model_card(directory)

    def _warn_of_requantised(self) -> None:
        if any(layer.is_kbit for _, layer in self.base_model.layers()):
            warnings.warn(
                "the base weights have few bits, and were rounded to them again without the adapter's start: on the "
                "untouched ones the converted adapter gives somewhat other outputs",
                stacklevel=3,
            )

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write README.md, keeping the text of one that is there."""
        write_card(Path(output_dir), self.get_base_model(), self.active_peft_config)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """push_to_hub has just put the card that is on the Hub, or an empty one, over ours: bring it up to date."""
        self.create_or_update_model_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        torch_device: str | torch.device | None = None,
        ignore_mismatched_sizes: bool = False,
        **hub_arguments: Any,
    ) -> "PeftModel":
        """`model` with a trained adapter, of the class that the config's task type asks for.

        `model_id`: a directory or a Hub id. `config`: used in place of the file's. `torch_device`: where the file is
        read to; the weights end up where the base weights are. `hub_arguments`: revision, token, subfolder, ...
        `key_mapping`: see load_peft_weights; by default what the model says its older checkpoints need.
        `ephemeral_gpu_offload`: see LoraRuntimeConfig.
        The adapter is frozen, and the model in eval mode, unless `is_trainable`, which files of prompts cannot be.
        Raises ValueError for files that are damaged or another model's; `model` is then unchanged.
        """
        hub_arguments = without_idle_arguments(hub_arguments)
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **hub_arguments)
        elif not isinstance(config, PeftConfig):
            raise ValueError(f"config must be a PeftConfig, got {type(config).__name__}")
        check_trainable_file(config, is_trainable)
        note_offload(config, ephemeral_gpu_offload)
        if key_mapping is None and not config.is_prompt_learning:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        tensors = load_peft_weights(model_id, torch_device, key_mapping, **hub_arguments)
        method_class(config.peft_type).check_file(config, tensors)
        with unchanged_on_error(model, config):
            config.inference_mode = not is_trainable
            wrapper = cls._class_for(config)(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            result = wrapper._load_tensors(model_id, tensors, adapter_name, is_trainable, ignore_mismatched_sizes)
        if result.missing_keys:
            warnings.warn(f"the file lacks weights that fit, left as initialised: {result.missing_keys}", stacklevel=2)
        return wrapper

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        **hub_arguments: Any,
    ) -> LoadResult:
        """Load a trained adapter: a new one, not active yet, or the weights of one that is there already.

        The arguments are from_pretrained's, but that `key_mapping` has no default here, as in peft.
        `ignore_mismatched_sizes`: leave tensors that do not fit as they are, of another rank all of an adapter's
        factors, with a warning.
        Raises ValueError for files that are damaged, of another rank (unless `ignore_mismatched_sizes`) or scale, or
        that hold tensors the model has no place for. Nothing is changed then. Weights that the file lacks, or that do
        not fit, are in the result's `missing_keys`.
        """
        hub_arguments = without_idle_arguments(hub_arguments)
        new = adapter_name not in self.peft_config
        if new or locate(model_id, CONFIG_NAME, **hub_arguments):
            config = PeftConfig.from_pretrained(model_id, **hub_arguments)
        else:
            config = self.peft_config[adapter_name]
        if new:
            check_trainable_file(config, is_trainable)
        else:
            self.peft_config[adapter_name].check_weights_of(config, of_any_size=ignore_mismatched_sizes)
        tensors = load_peft_weights(model_id, torch_device, key_mapping, **hub_arguments)
        method_class(config.peft_type).check_file(config, tensors)
        with unchanged_on_error(self, self.peft_config.get(adapter_name)):
            if not new and not is_trainable and isinstance(self._tuner, PromptTuner):
                self._tuner.stop_encoding(adapter_name)
            if new:
                note_offload(config, ephemeral_gpu_offload)
                config.inference_mode = not is_trainable
                self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
                self.set_requires_grad(adapter_name, is_trainable)
            return self._load_tensors(model_id, tensors, adapter_name, is_trainable, ignore_mismatched_sizes)

    def _load_tensors(
        self,
        model_id: str | os.PathLike[str],
        tensors: dict[str, Tensor],
        adapter_name: str,
        is_trainable: bool,
        ignore_mismatched_sizes: bool,
    ) -> LoadResult:
        plan = plan_load(self, tensors, adapter_name, ignore_mismatched_sizes)
        if plan.result.unexpected_keys:
            raise ValueError(
                f"the adapter at {str(model_id)!r} has weights for layers that this model or its config does not "
                f"adapt: {plan.result.unexpected_keys[:3]} and others, {len(plan.result.unexpected_keys)} in all. "
                "Was it trained on another base model?"
            )
        apply_load(self, plan, adapter_name)
        if not is_trainable:
            self.eval()
        return plan.result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_model" not in self.__dict__.get("_modules", {}):  # being unpickled or copied
                raise
            return getattr(self.base_model, name)
