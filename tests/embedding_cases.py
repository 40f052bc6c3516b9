"""Embeddings with LoRA to try: random cases, and the comparison of outputs and all gradients with fp64."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_fast import ops
from peft_fast.testing import assert_as_accurate_as_torch

# (ids' shape, vocabulary, features, rank): no multiple of a tile, one id, none, ids that repeat a lot, large ranks
SHAPES = [((3, 11), 50, 40, 4), ((1,), 7, 33, 1), ((0, 5), 16, 32, 8), ((2, 150), 5, 71, 17), ((64,), 300, 64, 100)]


@dataclass
class EmbeddingCase:
    ids: Tensor
    weight: Tensor  # [V, N]
    A: Tensor  # [R, V]
    B: Tensor  # [N, R]
    padding_idx: int | None
    d_y: Tensor
    scale: float = 1.7

    def run(self, backend: str | None, needs: Sequence[str] = ("A", "B"), adds: bool = False) -> dict[str, Tensor]:
        """{"y": output, name: gradient for each name in needs}; `adds`: the lookup apart, with its own gradient."""
        leaves = {n: getattr(self, n).detach().requires_grad_(n in needs) for n in ("weight", "A", "B")}
        options = {"padding_idx": self.padding_idx, "backend": backend}
        if adds:
            y = F.embedding(self.ids, leaves["weight"], self.padding_idx)
            y = ops.lora_embedding_add(y, self.ids, leaves["A"], leaves["B"], self.scale, **options)
        else:
            y = ops.lora_embedding(self.ids, leaves["weight"], leaves["A"], leaves["B"], self.scale, **options)
        if not needs:
            return {"y": y}
        grads = torch.autograd.grad(y, [leaves[n] for n in needs], self.d_y)
        return {"y": y.detach(), **dict(zip(needs, grads))}

    def by_torch(self, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The same by torch's own operations, all inputs passed through `convert`; adapters rounded to W's dtype."""
        leaves = {n: convert(getattr(self, n)).detach().requires_grad_() for n in ("weight", "A", "B")}
        W, A, B = leaves["weight"], leaves["A"].to(leaves["weight"].dtype), leaves["B"].to(leaves["weight"].dtype)
        y = F.embedding(self.ids, W, self.padding_idx)
        y = y + self.scale * F.embedding(self.ids, A.t(), self.padding_idx) @ B.t()
        grads = torch.autograd.grad(y, list(leaves.values()), convert(self.d_y))
        return {"y": y.detach(), **dict(zip(leaves, grads))}


def make_case(
    shape: Sequence[int], V: int, N: int, R: int, dtype: torch.dtype, adapter: torch.dtype, device: str = "cpu"
) -> EmbeddingCase:
    return EmbeddingCase(
        ids=torch.randint(0, V, shape, device=device),
        weight=torch.randn(V, N, device=device).to(dtype),
        A=torch.randn(R, V, device=device).to(adapter),
        B=torch.randn(N, R, device=device).to(adapter),
        padding_idx=3,
        d_y=torch.randn(*shape, N, device=device).to(dtype),
    )


def check_against_fp64(case: EmbeddingCase, backend: str, adds: bool = False) -> None:
    """Outputs and gradients: the inputs' dtypes, and no worse than 1.5 times plain torch at this dtype."""
    got = case.run(backend, ("weight", "A", "B"), adds)
    by_torch, truth = case.by_torch(lambda t: t), case.by_torch(Tensor.double)
    for name, value in got.items():
        assert value.dtype == (case.weight if name == "y" else getattr(case, name)).dtype, name
        assert_as_accurate_as_torch(name, value, by_torch[name], truth[name], case.weight.dtype)
