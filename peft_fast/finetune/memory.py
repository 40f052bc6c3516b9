"""The memory that training needs, estimated, beside the memory there is; and advice for when it was not enough."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_fast.finetune.options import Options, UserError
from peft_fast.memory import MIB, STATE_BYTES, MemoryEstimate, estimate_memory, nbytes, weights_of

PROBE_TOKENS = 256  # on a GPU: length of the forward pass from which the activations are scaled up


@dataclass(frozen=True)
class Estimate(MemoryEstimate):
    """Bytes, per component of training, and the bytes there are for all of them together."""

    available: int

    @property
    def needed(self) -> int:
        return super().needed - self.available

    def rows(self) -> list[tuple[str, int]]:
        return [*super().rows(), ("there is", self.available)]

    def __str__(self) -> str:
        return f"memory (estimate)\n{super().__str__()}"


class OutOfMemory(UserError):
    """Memory ran out. The message is what to lower."""


@contextmanager
def advice_when_exhausted(options: Options, estimate: Estimate | None = None) -> Iterator[None]:
    """Turn running out of memory, on a GPU or a CPU, into OutOfMemory; every other error passes unchanged."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise OutOfMemory(f"out of memory: {first_line}\n{advice(options, estimate)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises OutOfMemoryError on a GPU, and a bare RuntimeError where the CPU's allocator fails."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def estimate(model: Any, options: Options, longest_row: int) -> Estimate:
    """Estimate for an adapted model on its device, trained on rows of at most `longest_row` tokens.

    On a CPU the step is run on shapes alone (peft_fast/memory.py). On a GPU, whose kernels need data, what the forward
    pass keeps for backward is measured on one short row and scaled by the number of tokens: right for attention that
    does not keep its scores (sdpa, flash), too low for eager.
    """
    if model.device.type == "cpu":
        autocast = None if options.dtype == torch.float32 else options.dtype
        with _as_trained(model, options):
            found = estimate_memory(
                model, options.batch_size, longest_row, optimizer=options.optimizer, autocast=autocast
            )
    else:
        found = _measured(model, options, longest_row)
    loaded = found.base_weights + found.adapter
    return Estimate(**vars(found), available=available_bytes(model.device) + loaded)


@contextmanager
def _as_trained(model: Any, options: Options) -> Iterator[None]:
    """Within, the model is in the mode and has the checkpoints that Trainer will give it."""
    training = model.training
    model.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of the methods' names
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            model.train(training)
            if options.gradient_checkpointing:
                model.gradient_checkpointing_disable()


def _measured(model: Any, options: Options, longest_row: int) -> MemoryEstimate:
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    adapter, base = nbytes(trainable), nbytes(weights_of(model)) - nbytes(trainable)
    tokens = options.batch_size * longest_row
    probe = min(longest_row, PROBE_TOKENS)
    config = model.config.get_text_config()
    activations = kept_for_backward(model, probe, options.dtype) * tokens // probe
    of_a_layer = activations // config.num_hidden_layers
    if options.gradient_checkpointing:  # one input per layer, and all of the layer that is being recomputed
        inputs = config.num_hidden_layers * tokens * config.hidden_size * options.dtype.itemsize
        activations = inputs + of_a_layer
    logits = tokens * config.vocab_size * 4  # in fp32, as the loss takes them
    widest = max(
        (module.in_features * module.out_features for module in model.modules() if _is_linear(module)), default=0
    )
    return MemoryEstimate(
        base_weights=base,
        adapter=adapter,
        gradients=adapter,
        optimizer_states=sum(weight.numel() for weight in trainable) * STATE_BYTES[options.optimizer],
        activations=activations,
        logits=logits,
        # In backward: the logits' gradient, a layer's gradients, and the largest weight dequantised.
        working_space=logits + of_a_layer + widest * options.dtype.itemsize,
    )


def kept_for_backward(model: Any, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of distinct storages, weights aside, that one row's forward pass with loss saves for backward."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in weights_of(model)}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = model.device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    model.train()
    generators = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=generators),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    ):
        loss = model(input_ids=ids, labels=ids).loss  # held to the end: a freed storage's address would be counted once
    del loss
    return sum(kept.values())


def _is_linear(module: torch.nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def available_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for limit_file, used_file in (
        ("memory.max", "memory.current"),  # cgroup 2, as containers see it
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # cgroup 1
    ):
        limit, used = Path("/sys/fs/cgroup", limit_file), Path("/sys/fs/cgroup", used_file)
        if limit.is_file() and used.is_file() and (value := limit.read_text().strip()) != "max":
            free = min(free, int(value) - int(used.read_text()))
    return free


def advice(options: Options, estimate: Estimate | None) -> str:
    """Options to lower, the largest saving first, with about how much each saves where there is an estimate."""
    base, states, activations = (
        (
            estimate.base_weights,
            estimate.optimizer_states,
            estimate.activations + estimate.logits + estimate.working_space,
        )
        if estimate
        else (0, 0, 0)
    )
    ways = []
    if options.bits > 4:
        ways.append((base * (7 if options.bits == 16 else 4) // 10, "--bits 4"))
    if options.batch_size > 1:
        half, twice = options.batch_size // 2, options.gradient_accumulation * 2
        saved = activations - activations * half // options.batch_size
        ways.append((saved, f"--batch-size {half} --gradient-accumulation {twice} (the same training)"))
    if not options.gradient_checkpointing:
        ways.append((activations * 7 // 10, "--gradient-checkpointing (about a third slower)"))
        if set(options.recompute) != {"norms", "mlps"}:
            ways.append((activations * 6 // 10, "--recompute norms mlps (about a fifth slower)"))
    if options.sequence_length > 256:
        ways.append((activations // 2, f"--sequence-length {options.sequence_length // 2}"))
    if torch.cuda.is_available() and options.optimizer == "adamw":
        ways.append((states * 3 // 4, "--optimizer paged_adamw_8bit"))
    if options.rank > 8:
        ways.append((states // 2, f"--rank {options.rank // 2}"))
    if estimate:
        ways = [way for way in ways if way[0] > estimate.needed / 100]
    ways.sort(key=lambda way: -way[0])
    ways.append((0, "a smaller --model"))
    lines = (f"  {way}" + (f": about {saved / MIB:,.0f} MiB less" if saved else "") for saved, way in ways)
    return "to need less, in this order:\n" + "\n".join(lines)
