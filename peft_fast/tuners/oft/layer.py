"""OFT around linear layers, convolutions and embeddings: y = base(x R), R orthogonal and block-diagonal.

The input is rotated, which takes a product of [tokens, in] with blocks and leaves the base weight alone, so that any
format of it will do. Convolutions, unless they are of single pixels, rotate their weight instead, W R^T with one row
for all inputs of a patch, as merging does. peft 0.21.2 takes the input apart into patches, rotates these and adds up
what overlaps: that is the same where patches do not overlap (kernels of 1, inputs as large as the kernel), and
elsewhere counts pixels several times, so that its outputs are not the merged model's, nor the base model's at first.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners.method import Unscaled, convolved, refuse_groups


class OFTRotationModule(nn.Module):
    """weight [blocks, b * (b - 1) / 2]: the upper triangles of skew-symmetric matrices Q. One block where it is shared
    by all `count` of them."""

    def __init__(self, count: int, size: int, config: Any) -> None:
        super().__init__()
        self.count, self.size = count, size
        self.coft, self.eps = config.coft, config.eps
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        blocks = 1 if config.block_share else count
        self.weight = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2))
        if not config.init_weights:
            nn.init.normal_(self.weight, std=0.1)

    def skew(self, weight: Tensor) -> Tensor:
        """[blocks, b, b]"""
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=weight.device)
        upper = weight.new_zeros(len(weight), self.size, self.size)
        upper[:, rows, columns] = weight
        return upper - upper.transpose(1, 2)

    @torch.no_grad()
    def constrained(self) -> Tensor:
        """The weights with every Q in a ball of radius eps / sqrt(blocks)."""
        radius = self.eps / math.sqrt(len(self.weight))
        norms = math.sqrt(2) * self.weight.norm(dim=1, keepdim=True)  # of Q, which has every number twice
        return torch.where(norms <= radius, self.weight, radius * self.weight / norms)

    def blocks(self, weight: Tensor | None = None) -> Tensor:
        """The rotations [count, b, b] that `weight` means, by default the module's own; a shared one without copies."""
        weight = self.weight if weight is None else weight
        Q = self.skew(weight)
        rotations = cayley(Q) if self.terms is None else cayley_neumann(Q, self.terms)
        return rotations.to(weight.dtype).expand(self.count, -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., count * b] -> the same shape, rotated. Constrained weights are written back before."""
        self.constrain()
        return rotate(x.to(self.weight.dtype), self.blocks()).to(x.dtype)

    def constrain(self) -> None:
        if self.coft:
            self.weight.data.copy_(self.constrained())

    @torch.no_grad()
    def exact(self) -> Tensor:
        """The blocks for merging: in fp32 at least, of the constrained weights. Nothing is written."""
        weight = self.constrained() if self.coft else self.weight
        return self.blocks(weight.to(torch.promote_types(weight.dtype, torch.float32)))


def cayley(Q: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1, orthogonal as Q is skew-symmetric: [blocks, b, b]. In fp32 at least, as torch solves."""
    Q = Q.to(torch.promote_types(Q.dtype, torch.float32))
    eye = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype)
    return torch.linalg.solve(eye + Q, (eye - Q).expand_as(Q), left=False)


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """I + 2 (Q + ... + Q^(terms - 2)) + Q^(terms - 1), as peft has it: 3 terms give what 4 do, and 2 are I + 2 Q."""
    total = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype).expand_as(Q)
    if terms == 1:
        return total
    total = total + 2 * Q
    if terms == 2:
        return total
    power = torch.bmm(Q, Q)
    total = total + 2 * power
    for _ in range(3, terms - 1):
        power = torch.bmm(power, Q)
        total = total + 2 * power
    return total + torch.bmm(power, Q)


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """x [..., count * b] times the block-diagonal matrix of `blocks` [count, b, b]."""
    count, size, _ = blocks.shape
    return torch.einsum("...rk,rkc->...rc", x.reshape(*x.shape[:-1], count, size), blocks).reshape(x.shape)


class OFTLayer(Unscaled):
    """oft_R: {adapter: OFTRotationModule}, of an embedding oft_embedding_R."""

    oft_R: nn.ModuleDict
    oft_embedding_R: nn.ModuleDict
    r: dict[str, int]
    oft_block_size: dict[str, int]
    method = "oft"
    adapter_layer_names = module_names = ("oft_R", "oft_embedding_R")
    other_param_names = ("r", "oft_block_size")
    how = "the input is rotated block by block, and the base layer is called with it"

    def rotations(self) -> nn.ModuleDict:
        return self.oft_R

    def rotation(self, name: str) -> OFTRotationModule:
        return self.rotations()[name]  # type: ignore[return-value]

    def rotated_features(self) -> int:
        return self.weight_shape()[1]

    def make_weights(self, adapter_name: str, config: Any, **options: Any) -> None:
        features = self.rotated_features()
        count, size = block_sizes(features, config.r, config.oft_block_size)
        self.r[adapter_name], self.oft_block_size[adapter_name] = count, size
        self.rotations()[adapter_name] = OFTRotationModule(count, size, config)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """R [in, in], which merging multiplies the weight by: no difference to be added."""
        return torch.block_diag(*self.rotation(adapter).exact())

    @torch.no_grad()
    def shifted_weight(self, weight: Tensor, adapter_names: Sequence[str], sign: int) -> Tensor:
        """The input meets the rotations in the order of the names; so the weight meets the last one's first, and those
        that it has met already are taken out before others come in."""
        merged = [] if self._unmerged is not None or sign < 0 else self.merged_adapters
        names = [*merged, *adapter_names]
        rows = weight.reshape(len(weight), -1)
        if sign < 0 or merged:
            for name in merged or names:
                rows = self._turned(rows, name, inverse=True)
        if sign > 0:
            for name in reversed(names):
                rows = self._turned(rows, name)
        return rows.reshape(weight.shape)

    def _turned(self, rows: Tensor, name: str, inverse: bool = False) -> Tensor:
        """rows [out, in] times R^T, or times its inverse: the series' R is orthogonal only nearly."""
        blocks = self.rotation(name).exact().to(rows.dtype).transpose(1, 2)
        return rotate(rows, torch.linalg.inv(blocks) if inverse else blocks)


def block_sizes(features: int, count: int, size: int) -> tuple[int, int]:
    """(number of blocks, size of a block) for so many features. One is given, the other 0."""
    given = count or size
    fitting = divisor_near(features, given)
    if fitting != given:
        name = "r" if count else "oft_block_size"
        warnings.warn(f"{name}={given} does not divide the {features} features: {fitting} is taken", stacklevel=2)
    return (fitting, features // fitting) if count else (features // fitting, fitting)


def divisor_near(features: int, wanted: int) -> int:
    """The divisor of `features` that is nearest to `wanted`, of two the smaller."""
    if wanted >= features:
        return features
    distances = range(features)
    near = (candidate for d in distances for candidate in (wanted - d, wanted + d))
    return next(one for one in near if one > 0 and features % one == 0)


class Linear(OFTLayer):
    """OFT around torch.nn.Linear and k-bit linear layers: x [..., in]."""

    def adapted(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rotated = x
        for name in names:
            rotation = self.rotation(name)
            rotated = rotation(self.cast(rotated, rotation.weight.dtype))
        return self.base_layer(rotated.to(x.dtype), *args, **kwargs).to(x.dtype)


class Conv2d(OFTLayer):
    """OFT around torch.nn.Conv2d without groups: x [batch, in, height, width]."""

    how = "the kernels, or of kernels of 1 the input, are rotated block by block; torch's own convolution takes them"

    def make_weights(self, adapter_name: str, config: Any, **options: Any) -> None:
        base: Any = self.get_base_layer()
        refuse_groups(base, "OFT")
        if self.base_layer is not base and not self.is_pointwise:
            raise ValueError(
                f"OFT cannot adapt a convolution with adapters of another method and a kernel of "
                f"{tuple(base.kernel_size)}: these see the input whole, and not patch by patch. Add OFT first"
            )
        super().make_weights(adapter_name, config)

    @property
    def is_pointwise(self) -> bool:
        base: Any = self.get_base_layer()
        return all(size == 1 for size in base.kernel_size)

    def adapted(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.is_pointwise:
            rotated = x.movedim(1, -1)
            for name in names:
                rotated = self.rotation(name)(self.cast(rotated, self.rotation(name).weight.dtype))
            return self.base_layer(rotated.movedim(-1, 1).to(x.dtype), *args, **kwargs).to(x.dtype)

        def turned(rows: Tensor) -> Tensor:
            for name in reversed(names):
                rotation = self.rotation(name)
                rotation.constrain()
                rows = rotate(rows.to(rotation.weight.dtype), rotation.blocks().transpose(1, 2))
            return rows

        return convolved(self.get_base_layer(), x, turned)


class Embedding(OFTLayer):
    """OFT around torch.nn.Embedding: the rows that are looked up are rotated."""

    how = "the rows that are looked up are rotated block by block"

    def rotations(self) -> nn.ModuleDict:
        return self.oft_embedding_R

    def adapted(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        looked_up = rotated = self.base_layer(x, *args, **kwargs)
        for name in names:
            rotation = self.rotation(name)
            rotated = rotation(self.cast(rotated, rotation.weight.dtype))
        return rotated.to(looked_up.dtype)

    @torch.no_grad()
    def shifted_weight(self, weight: Tensor, adapter_names: Sequence[str], sign: int) -> Tensor:
        """Rows are rotated in the order of the names."""
        for name in adapter_names if sign > 0 else reversed(adapter_names):
            blocks = self.rotation(name).exact().to(weight.dtype)
            weight = rotate(weight, blocks if sign > 0 else torch.linalg.inv(blocks))
        return weight
