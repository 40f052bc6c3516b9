"""MultitaskPromptEmbedding."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.adapter_file import read_tensors
from peft_fast.tuners.prompt_tuning.model import PromptEmbedding

from .config import FROM_FILE


class MultitaskPromptEmbedding(PromptEmbedding):
    """Indices [batch, tokens], task_ids [batch] -> embeddings [batch, tokens, token_dim].

    `embedding` is what the tasks share; task t has it times prefix_task_cols[t] @ prefix_task_rows[t].
    """

    tied_to_tasks = True

    def __init__(self, config: Any, word_embeddings: Any) -> None:
        super().__init__(config, word_embeddings)
        self.num_tasks, self.num_ranks, self.token_dim = config.num_tasks, config.num_ranks, config.token_dim
        self.num_virtual_tokens = config.num_virtual_tokens
        columns = (self.num_tasks, self.embedding.num_embeddings, self.num_ranks)
        self.prefix_task_cols = nn.Parameter(torch.normal(mean=0, std=0.02, size=columns))
        rows = (self.num_tasks, self.num_ranks, self.token_dim)
        self.prefix_task_rows = nn.Parameter(torch.normal(mean=0, std=0.02, size=rows))
        if config.prompt_tuning_init in FROM_FILE and not config.inference_mode:
            self._start_from_file(config)

    def forward(self, indices: Tensor, task_ids: Tensor | None = None) -> Tensor:
        if task_ids is None:
            raise ValueError("task_ids [batch] must say which task each sample is of, got None")
        matrices = torch.matmul(self.prefix_task_cols[task_ids], self.prefix_task_rows[task_ids])
        return self.embedding(indices) * matrices

    def prompt(self, batch_size: int, task_ids: Tensor | None) -> Tensor:
        if task_ids is not None:
            if task_ids.shape != (batch_size,):
                raise ValueError(f"task_ids must be [{batch_size}], one for each sample, got {tuple(task_ids.shape)}")
            if not 0 <= int(task_ids.min()) <= int(task_ids.max()) < self.num_tasks:
                raise ValueError(f"task_ids must be from 0 to {self.num_tasks - 1}, got {task_ids.tolist()}")
            task_ids = task_ids.to(self.embedding.weight.device)
        return self(self.indices().expand(batch_size, -1), task_ids)

    def _embedding_to_save(self) -> Tensor:
        return self.embedding.weight.detach()

    def tensors_to_save(self) -> dict[str, Tensor]:
        matrices = {"prefix_task_cols": self.prefix_task_cols, "prefix_task_rows": self.prefix_task_rows}
        return {**super().tensors_to_save(), **{key: value.detach() for key, value in matrices.items()}}

    def keys_to_load(self) -> dict[str, str]:
        return {key: key for key in ("prefix_task_cols", "prefix_task_rows")} | super().keys_to_load()

    @classmethod
    def check_file(cls, config: Any, tensors: Mapping[str, Any]) -> None:
        super().check_file(config, tensors)
        size = (config.num_tasks, tensors["prompt_embeddings"].shape[0], config.num_ranks)
        found = tensors.get("prefix_task_cols")
        if not isinstance(found, Tensor) or found.shape != size:
            raise ValueError(
                f"the file must have prefix_task_cols {size}, as num_tasks and num_ranks in its config say, got "
                f"{tuple(found.shape) if isinstance(found, Tensor) else found!r}"
            )

    def _start_from_file(self, config: Any) -> None:
        path = Path(config.prompt_tuning_init_state_dict_path)
        tensors = read_tensors(path)
        shared = config.prompt_tuning_init == "ONLY_SOURCE_SHARED"
        needed = self.keys_to_load() if not shared else super().keys_to_load()
        if missing := [key for key in needed if key not in tensors]:
            raise ValueError(f"{path} is not of prompts for several tasks: it lacks {missing}, and has {list(tensors)}")
        for key, name in needed.items():
            value = tensors[key]
            if key != "prompt_embeddings" and config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
                value = value.mean(0, keepdim=True)
            elif key != "prompt_embeddings":
                task = config.prompt_tuning_init_task
                if not 0 <= task < len(value):
                    raise ValueError(f"prompt_tuning_init_task must be from 0 to {len(value) - 1}, got {task!r}")
                value = value[task : task + 1]
            own = self.get_parameter(name)
            if own.shape != value.shape:
                raise ValueError(f"{path}: {key} is {tuple(value.shape)}, {tuple(own.shape)} is needed")
            own.data.copy_(value)
