"""What a training step takes of memory, calculated: the step is run on shapes alone.

Tensors without data (torch's FakeTensorMode) go through the very code that trains, ours, peft's or anybody's, forward
and backward, and every storage that comes and goes is counted. So nothing is allocated, no formula has to follow the
code, and attention that keeps its scores, checkpoints, tied weights and what else a model has are in it. What an
allocator adds (blocks of 512 bytes on a GPU, fragments) is not, nor are workspaces inside of other people's kernels.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .ops import library
from .tuners.base_weight import quantized_weight

MIB = 2**20
# Bytes of optimiser state per trained parameter. adafactor keeps a row and a column per matrix: next to nothing.
STATE_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0, "sgd": 0}
UNMASKED = "peft_fast_unmasked_sdpa"
Step = Callable[[Any, Tensor], Tensor]  # (model, ids [batch, tokens]) -> the loss


class Kept(NamedTuple):
    """A storage, by the first tensor that was seen of it."""

    part: str  # of the model, that made it
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class StepMemory:
    """What one forward and backward takes beside the model and the optimiser."""

    kept: tuple[Kept, ...]  # what is there for the backward when the forward is through
    peak: int  # the most bytes at one time, those of `kept` and the gradients of what is trained among them

    def of(self, part: str) -> int:
        """Bytes kept by a part of the model: "embedding" (what comes before the first layer), "layer 0", "layer 1",
        ..., "head" (output embedding, logits, loss)."""
        return sum(each.nbytes for each in self.kept if each.part == part)

    @property
    def total(self) -> int:
        return sum(each.nbytes for each in self.kept)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what they are for; as text, a table."""

    base_weights: int
    adapter: int
    gradients: int
    optimizer_states: int
    activations: int  # kept for the backward by the layers
    logits: int  # kept for the backward by the head and the loss
    working_space: int  # what the peak has beyond all of these

    @property
    def needed(self) -> int:
        return sum(vars(self).values())

    def rows(self) -> list[tuple[str, int]]:
        return [
            ("base weights", self.base_weights),
            ("adapter", self.adapter),
            ("gradients", self.gradients),
            ("optimiser states", self.optimizer_states),
            ("activations kept", self.activations),
            ("logits and loss", self.logits),
            ("working space", self.working_space),
            ("needed, about", self.needed),
        ]

    def __str__(self) -> str:
        return "\n".join(f"  {name:<18}{size / MIB:>12,.0f} MiB" for name, size in self.rows())


def estimate_memory(
    model: Any,
    batch_size: int,
    sequence_length: int,
    *,
    optimizer: str = "adamw",
    autocast: torch.dtype | None = None,
    step: Step | None = None,
) -> MemoryEstimate:
    """The memory that training `model` takes, calculated without taking it: nothing runs but shapes.

    model       with its adapters, on a CPU or of FakeTensors; in the mode and with the checkpoints it will train with
    optimizer   one of STATE_BYTES: bytes of state per trained parameter
    autocast    the dtype of the autocast region that the forward runs in; None: there is none
    step        (model, ids [batch_size, sequence_length]) -> loss; default: the loss of a causal language model

    Raises ValueError for another optimizer, for sizes below 1, for a model on a GPU, whose kernels need data, and for a
    step that asks for values: experts one by one, where torch's grouped product does not take LoRA's rank.
    """
    if optimizer not in STATE_BYTES:
        raise ValueError(f"optimizer must be one of {', '.join(STATE_BYTES)}, got {optimizer!r}")
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    adapter, everything = nbytes(trained), nbytes(weights_of(model))
    found = step_memory(model, batch_size, sequence_length, autocast=autocast, step=step)
    return MemoryEstimate(
        base_weights=everything - adapter,
        adapter=adapter,
        gradients=adapter,
        optimizer_states=sum(weight.numel() for weight in trained) * STATE_BYTES[optimizer],
        activations=found.total - found.of("head"),
        logits=found.of("head"),
        working_space=max(0, found.peak - found.total - adapter),
    )


def step_memory(
    model: Any, batch_size: int, sequence_length: int, *, autocast: torch.dtype | None = None, step: Step | None = None
) -> StepMemory:
    """One forward and backward of `model`; arguments and errors are estimate_memory's."""
    if any(weight.device.type not in ("cpu", "meta") for weight in model.parameters()):
        raise ValueError("the model is on a GPU, whose kernels need data: estimate it before it is moved there")
    step = step or _causal_loss
    mode = _mode_of(model)
    ledger = _Ledger()
    with _parts(model, ledger), _gradients_aside(model), _without_mask(model, sequence_length), mode:
        for tensor in weights_of(model):
            ledger.ignore(tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True))
        ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
        ledger.ignore(ids)
        with ledger:
            try:
                with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                    loss = step(model, ids)
                kept = tuple(each for each, _ in ledger.live.values())
                ledger.part = "backward"
                loss.backward()
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ValueError(
                    f"a step's memory is calculated on shapes, and {error.func} of this one needs values: of experts, "
                    "take a rank whose rows are a multiple of 16 bytes (8 in 16 bits), which one product takes for all"
                ) from error
    return StepMemory(kept, ledger.most)


def weights_of(model: Any) -> list[Tensor]:
    """Parameters, buffers and the scales of k-bit weights, which are neither."""
    quantized = (quantized_weight(module) for module in model.modules())
    scales = (tensor for weight in quantized if weight is not None for tensor in weight.tensors())
    return [*model.parameters(), *model.buffers(), *scales]


def nbytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages of these tensors; tied weights count once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


class _Ledger(TorchDispatchMode):
    """Within, every new storage is noted with the part of the model that made it, and its end too. Ops of peft_fast are
    looked into: what they allocate and free counts."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[Kept, weakref.ref]] = {}  # by storage
        self.ignored: dict[int, Any] = {}
        self.part = "embedding"
        self.now = self.most = 0

    def ignore(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.ignored[storage._cdata] = storage  # held: another one would get its address

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or key in self.ignored:
            return

        def ended(_: weakref.ref, key: int = key) -> None:
            self.now -= self.live.pop(key)[0].nbytes

        new = Kept(self.part, tuple(tensor.shape), tensor.dtype, storage.nbytes())
        self.live[key] = (new, weakref.ref(storage, ended))
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "peft_fast":
            with self:
                out = library.IMPLEMENTATIONS[func._opname](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out


def _causal_loss(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def _mode_of(model: Any) -> FakeTensorMode:
    """That of the model's own tensors, where they have no data either."""
    fake = next((weight for weight in model.parameters() if isinstance(weight.data, FakeTensor)), None)
    return FakeTensorMode(allow_non_fake_inputs=True) if fake is None else fake.data.fake_mode


@contextmanager
def _parts(model: Any, ledger: _Ledger) -> Iterator[None]:
    """Within, the ledger is told which part of the model runs."""

    def enter(part: str) -> Callable:
        def hook(*_: Any) -> None:
            if ledger.part != "backward":  # where a checkpoint runs a layer again
                ledger.part = part

        return hook

    hooks = [layer.register_forward_pre_hook(enter(f"layer {i}")) for i, layer in enumerate(decoder_layers(model))]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        hooks.append(head.register_forward_pre_hook(enter("head")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def decoder_layers(model: Any) -> list[nn.Module]:
    """The blocks of a transformer: the list of modules that is as long as its config says; none where none is."""
    count = getattr(_text_config(model), "num_hidden_layers", 0)
    found = (list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return next(found, [])


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def _without_mask(model: Any, tokens: int) -> Iterator[None]:
    """Within, models of transformers leave the causal mask to torch's attention, as they do when they train: they look
    into their position ids for packed sequences, and where these have no data they make a mask to be sure."""
    config = _text_config(model)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or (window is not None and window <= tokens):
        yield
        return
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(UNMASKED, sdpa_attention_forward)  # of this name no mask function is known
    config._attn_implementation = UNMASKED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


@contextmanager
def _gradients_aside(model: Any) -> Iterator[None]:
    """Within, no parameter has a gradient; afterwards each has its own again, and torch's generator is as it was."""
    before = [(weight, weight.grad) for weight in model.parameters()]
    for weight, _ in before:
        weight.grad = None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for weight, grad in before:
            weight.grad = grad
