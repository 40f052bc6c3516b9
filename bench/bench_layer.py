"""A whole Llama-3-8B decoder layer, forward and backward: attention, norms, RoPE and MLP around the adapted layers; at
the full width on a GPU, at an eighth of it on a CPU. And what it costs the host: the time until a step is launched,
layer by layer as Python runs it and replayed from a CUDA graph.

With Liger where it is installed and there is a GPU: its norms stand in for transformers', in both libraries.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import peft_fast
from bench.compare.models import config_of
from bench.harness import Case
from peft_fast.testing import relative_error

TOKENS = {"cpu": (256,), "cuda": (512, 4096)}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config_for(device: torch.device, eighth: int = 8) -> Any:
    config = config_of("llama-3-8b")
    if device.type != "cuda":
        config.hidden_size //= eighth
        config.intermediate_size //= eighth
        config.num_attention_heads //= 8
        config.num_key_value_heads //= 8
        config.head_dim = config.hidden_size // config.num_attention_heads
    config._attn_implementation = "sdpa"
    return config


class OneLayer(nn.Module):
    """A model of one decoder layer, which makes its positions once."""

    def __init__(self, config: Any, tokens: int, bits: int, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        with device:  # 218 million numbers are drawn in a second on a GPU, not in five
            self.layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
        if bits == 4:
            for path, linear in list(self.layer.named_modules()):
                if isinstance(linear, nn.Linear):
                    self.layer.set_submodule(path, _four_bits(linear))
            self.is_loaded_in_4bit = True
        self.layer.to(device)
        positions = torch.arange(tokens, device=device)[None]
        x = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, device=device)
        self.positions = LlamaRotaryEmbedding(config).to(device)(x, positions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x, position_embeddings=self.positions)
        return y if isinstance(y, torch.Tensor) else y[0]


def _four_bits(linear: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    return layer


def adapted(
    library: Any, config: Any, tokens: int, bits: int, device: torch.device, liger: bool = False, again: tuple = ()
) -> Any:
    model = OneLayer(config, tokens, bits, device).requires_grad_(False)
    if liger:
        _with_liger(model)
    torch.manual_seed(0)
    adapters = library.LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, init_lora_weights=False)
    model = library.get_peft_model(model, adapters, autocast_adapter_dtype=False).train()
    if again:
        peft_fast.set_recompute(model, norms="norms" in again, mlps="mlps" in again)
    return model


def _with_liger(model: OneLayer) -> None:
    from liger_kernel.transformers.rms_norm import LigerRMSNorm  # type: ignore[import-not-found]

    for name in ("input_layernorm", "post_attention_layernorm"):
        norm: Any = getattr(model.layer, name)
        other = LigerRMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon).to(norm.weight)
        other.weight = norm.weight
        setattr(model.layer, name, other)


def step_of(model: Any, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

    def run() -> list[torch.Tensor]:
        y = model(x)
        return [y, *torch.autograd.grad(y, wanted, dy)]

    return run


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The same from a CUDA graph: captured after a warm-up on a stream of its own, as torch asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def graphs(runs: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Of those that can be captured: one library that cannot takes no row from the others."""
    made = {}
    for name, run in runs.items():
        try:
            made[f"{name}, CUDA graph"] = graphed(run)
        except RuntimeError as error:
            print(f"no CUDA graph of {name}: {error}", file=sys.stderr)
    return made


def _steps(config: Any, tokens: int, bits: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    x = torch.randn(1, tokens, config.hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn_like(x)
    made = functools.partial(adapted, config=config, tokens=tokens, bits=bits, device=device)
    models = {
        "peft": made(peft),
        "peft_fast": made(peft_fast),
        "peft_fast, norms recomputed": made(peft_fast, again=("norms",)),
        "peft_fast, norms and MLPs recomputed": made(peft_fast, again=("norms", "mlps")),
    }
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        models |= {f"{lib.__name__} + liger": made(lib, liger=True) for lib in (peft, peft_fast)}
    return {name: step_of(model, x, dy) for name, model in models.items()}


def _gate(runs: dict[str, Callable[[], Any]]) -> None:
    (_, theirs), *ours = ((name, run()) for name, run in runs.items() if "liger" not in name)
    for name, found in ours:
        for value, expected in zip(found, theirs):
            assert relative_error(value, expected) < 16 * torch.finfo(torch.bfloat16).eps, name


def cases(device: torch.device) -> Iterator[Case]:
    for bits in (4, 16):
        for tokens in TOKENS[device.type]:
            config = config_for(device)
            runs = _steps(config, tokens, bits, device)
            name = (
                f"llama-3-8b{'' if device.type == 'cuda' else ' / 8'} M={tokens} r=16 {'nf4' if bits == 4 else 'dense'}"
            )
            yield Case("layer", name, torch.bfloat16, "forward+backward", runs, functools.partial(_gate, runs))
    yield host_case(device)


def host_case(device: torch.device) -> Case:
    """On a CPU of a layer so small that next to all of its time is the host's."""
    tokens = 512 if device.type == "cuda" else 4
    config = config_for(device, 64)
    runs = _steps(config, tokens, 4, device)
    timed: dict[str, Callable[[], object]] = dict(runs)
    if device.type == "cuda":
        timed |= graphs(timed)
    name = f"llama-3-8b{'' if device.type == 'cuda' else ' / 64'} M={tokens} r=16 nf4"
    gate = functools.partial(_gate, runs)
    return Case("layer_host", name, torch.bfloat16, "forward+backward", timed, gate, host=True)
