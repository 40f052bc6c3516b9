"""PeftConfig: what an adapter is, and the file adapter_config.json that says so.

The file is peft 0.21.2's, key by key: peft reads ours and we read peft's. Reading is strict, because a model whose
option was quietly dropped quietly differs: an unknown key is an error, unless a newer peft wrote the file, or one so
old that files did not say their version, when a warning names it. A key that is switched off (None, False, 0, empty)
changes nothing and passes.
"""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from packaging.version import InvalidVersion, Version
from transformers.utils import PushToHubMixin

from .files import locate, without_idle_arguments, write_together
from .option_help import with_help
from .peft_types import PeftType, TaskType

CONFIG_NAME = "adapter_config.json"
PEFT_VERSION = "0.21.2"  # the version of peft whose files we read and write


@with_help
@dataclass
class PeftConfig(PushToHubMixin):
    """What every adapter has. The methods' own configs (LoraConfig, ...) add their options.

    task_type: what the model is for, a TaskType or its name, or None. peft_type: the method, a PeftType.
    base_model_name_or_path: the base model's folder or name on the Hub. revision: the base model's.
    inference_mode: freezes the adapter; it is true in every saved file.
    auto_mapping: {"base_model_class": ..., "parent_library": ...}, where to find the base model's class again without a
      task. peft_version: of the files, by default the one whose files these are.
    Raises ValueError for a task type that does not exist, TypeError for an option that does not exist.
    """

    tied_to_weights: ClassVar[tuple[str, ...]] = ("peft_type",)  # options that say what the weights in a file mean

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __new__(cls, /, *args: Any, **options: Any):
        # The dataclass's own TypeError would not say which options there are.
        unknown = options.keys() - cls.option_names()
        if unknown:
            raise TypeError(_unknown_options(cls, unknown))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.task_type is not None:
            names = [task.value for task in TaskType]
            if self.task_type not in names:
                raise ValueError(f"task_type must be one of {names} or None, got {self.task_type!r}")
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise TypeError(f"{name} must be a string or None, got {getattr(self, name)!r}")
        if not isinstance(self.auto_mapping, (dict, type(None))):
            raise TypeError(f"auto_mapping must be a dict or None, got {self.auto_mapping!r}")
        self.peft_version = self.peft_version or PEFT_VERSION

    @classmethod
    def option_names(cls) -> set[str]:
        return {field.name for field in fields(cls)}

    def check(self) -> None:
        """Raise for options that contradict each other or that are not built. The methods' configs have such."""

    @classmethod
    def check_saved(cls, options: Mapping[str, Any]) -> None:
        """Raise ValueError, or warn, where a saved config's weights are of another version's method."""

    def check_weights_of(self, other: "PeftConfig", of_any_size: bool = False) -> None:
        """Raise ValueError where weights trained under `other` would mean something else under this config.

        `of_any_size`: options that say how large weights are may differ; those that differ in size are not loaded.
        """
        for name in self.tied_to_weights:
            if of_any_size and name in ("r", "rank_pattern"):
                continue
            ours, theirs = getattr(self, name), getattr(other, name, None)
            if ours != theirs:
                raise ValueError(
                    f"the file's weights were trained with {name}={theirs!r}, and the adapter here has {ours!r}, "
                    "so they would do something else in it. Load them under another name, or delete the adapter first"
                )

    def may_be_empty(self, key: str) -> bool:
        """Whether an adapter's tensor of this key in a file may have no element."""
        return False

    @property
    def is_prompt_learning(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, **changes: Any) -> str:
        """The text of adapter_config.json: keys sorted, sets as sorted lists. `changes` replace options."""
        values = {**self.to_dict(), **changes}
        values = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
        return json.dumps(values, indent=2, sort_keys=True)

    @property
    def is_adaption_prompt(self) -> bool:
        return False

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        auto_mapping_dict: dict[str, str] | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write adapter_config.json into `save_directory`, which is made if need be. Raises ValueError for a file.

        `max_shard_size` comes from push_to_hub and has no effect.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise ValueError(f"save_directory must be a directory, got the file {directory}")
        directory.mkdir(parents=True, exist_ok=True)
        text = self.to_json(**({"auto_mapping": auto_mapping_dict} if auto_mapping_dict else {}))
        write_together({directory / CONFIG_NAME: lambda path: path.write_text(text, encoding="utf-8")})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **hub_arguments: Any
    ) -> "PeftConfig":
        """The config in a directory or a Hub repository, of the class that its peft_type names.

        `hub_arguments` (revision, token, cache_dir, ...) go to hf_hub_download. Raises ValueError where there is no
        config, where it is no valid JSON object, or where it asks for what is not built; TypeError for unknown keys.
        Arguments of base models (trust_remote_code, device_map, ...) have no effect, with a warning.
        """
        hub_arguments = without_idle_arguments(hub_arguments)
        path = locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub_arguments)
        if path is None:
            folder = f", folder {subfolder!r}" if subfolder else ""
            raise ValueError(f"Can't find {CONFIG_NAME!r} at {str(pretrained_model_name_or_path)!r}{folder}")
        values = cls.from_json_file(path)
        if "peft_type" not in values:
            raise ValueError(f"{path} has no key 'peft_type': it is no adapter config")
        return cls.from_peft_type(**values)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """The keys and values of a config file. Raises ValueError where it holds no JSON object."""
        try:
            values = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number without end, nested without end
            raise ValueError(f"{path_json_file} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path_json_file} must hold a JSON object, got a {type(values).__name__}")
        if "runtime_config" in values:
            warnings.warn(f"{path_json_file}: runtime_config is of a run and no part of a file: left out", stacklevel=2)
            del values["runtime_config"]
        return values

    @classmethod
    def from_peft_type(cls, /, **options: Any) -> "PeftConfig":
        """A config of the class that `peft_type` names, or of this class without one."""
        from .tuners import config_class  # the table has the subclasses of this class

        config_type = config_class(options["peft_type"]) if options.get("peft_type") else cls
        config_type.check_saved(options)
        unknown = options.keys() - config_type.option_names()
        in_use = {key for key in unknown if options[key]}
        if in_use:
            version = options.get("peft_version")
            if version is not None and not _is_newer(version):
                raise TypeError(_unknown_options(config_type, in_use))
            writer = "a version of peft that it does not name" if version is None else f"peft {version}"
            warnings.warn(
                f"the config was written by {writer} with options that {config_type.__name__} "
                f"does not know; they are left out, and the adapter may behave differently: {sorted(in_use)}",
                stacklevel=2,
            )
        return config_type(**{key: value for key, value in options.items() if key not in unknown})


PeftConfigMixin = PeftConfig  # of which peft makes two classes, one for the files and one for what is in them
MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}  # of a file


@with_help
@dataclass
class PromptLearningConfig(PeftConfig):
    """What the methods have that learn prompts: virtual tokens before the input, and the base model as it is.

    num_virtual_tokens: how many. token_dim, num_attention_heads, num_layers: the base model's sizes, and
      num_transformer_submodules: 2 for models with an encoder and a decoder; each is found out where it is None.
    modules_to_save: names of modules that are trained and saved whole.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        return True

    def check(self) -> None:
        """Raise ValueError or TypeError for sizes that cannot be, before memory is taken for them."""
        for name in ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"):
            value = getattr(self, name)
            if value is None and name != "num_virtual_tokens":
                continue  # the base model says it
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ValueError(
                "num_transformer_submodules must be 1, or 2 for an encoder and a decoder, or None, got "
                f"{self.num_transformer_submodules!r}"
            )
        names = self.modules_to_save
        if names is not None and not (isinstance(names, (list, tuple, set)) and all(isinstance(n, str) for n in names)):
            raise TypeError(f"modules_to_save must be a list of module names, got {names!r}")


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config that a dict with `peft_type` and the method's options describes.

    Unknown keys are dropped with a warning where their value is None: dicts of old documents have such (enable_lora).
    Raises ValueError for a dict without a peft_type, TypeError for other unknown keys.
    """
    from .tuners import config_class  # the table has the subclasses of PeftConfig

    if not isinstance(config_dict, Mapping):
        raise TypeError(f"config_dict must be a dict of options, got {_kind(config_dict)}")
    if not config_dict.get("peft_type"):
        raise ValueError(f"the dict must have a key 'peft_type', got the keys {sorted(map(str, config_dict))}")
    config_type = config_class(config_dict["peft_type"])
    options = {key: value for key, value in config_dict.items() if key != "peft_type"}
    unknown = [key for key in options if key not in config_type.option_names()]
    unset = [key for key in unknown if options[key] is None]
    if unset and unset == unknown:
        warnings.warn(f"{config_type.__name__} has no options {unset}: they are None and are left out", stacklevel=2)
    return config_type(**{key: value for key, value in options.items() if key not in unset})


def checked_config(config: Any) -> PeftConfig:
    if not isinstance(config, PeftConfig):
        raise TypeError(
            f"peft_config must be a PeftConfig of peft_fast, such as LoraConfig(), got {_kind(config)}: "
            "get_peft_config makes one of a dict"
        )
    return config


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__name__}"


def _unknown_options(config_type: type[PeftConfig], unknown: Iterable[str]) -> str:
    known = sorted(config_type.option_names())
    parts = []
    for name in sorted(unknown):
        close = get_close_matches(name, known, n=2)
        parts.append(f"{name!r}" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""))
    return f"unknown config key for {config_type.__name__}: {', '.join(parts)}. Its options are {', '.join(known)}"


def _is_newer(version: Any) -> bool:
    """Whether a file says that a newer peft than the one we follow wrote it ("0.21.3.dev0@hash" counts)."""
    try:
        return Version(str(version).split("@")[0]) > Version(PEFT_VERSION)
    except InvalidVersion:
        return False
