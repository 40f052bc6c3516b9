"""BOFT around linear layers and convolutions: y = s * (W x R), R a product of n butterfly factors P D P^T.

D is block-diagonal and orthogonal, P a shuffle of half blocks. What is turned goes through the factors one after the
other, shuffle and blocks: no [in, in] matrix is made, and the shuffles are views and copies.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.tuners.method import Unscaled, convolved, refuse_groups
from peft_fast.tuners.oft.layer import cayley, rotate


class BOFTLayer(Unscaled):
    """boft_R: {adapter: A [n, blocks, b, b]}, of which A - A^T counts; boft_s: {adapter: a scale for each output}."""

    boft_R: nn.ParameterDict
    boft_s: nn.ParameterDict
    boft_block_size: dict[str, int]
    boft_block_num: dict[str, int]
    boft_dropout: dict[str, float]
    method = "boft"
    adapter_layer_names = ("boft_R", "boft_s")
    other_param_names = ("boft_block_size", "boft_block_num", "boft_dropout")

    def make_weights(self, adapter_name: str, config: Any, **options: Any) -> None:
        outputs, features = self.weight_shape()
        n = config.boft_n_butterfly_factor
        size, count = block_sizes(features, config.boft_block_size, config.boft_block_num, n)
        self.boft_block_size[adapter_name], self.boft_block_num[adapter_name] = size, count
        self.boft_dropout[adapter_name] = config.boft_dropout
        self.boft_R[adapter_name] = nn.Parameter(torch.zeros(n, count, size, size))
        self.boft_s[adapter_name] = nn.Parameter(torch.ones(self.scale_shape(outputs)))
        if not config.init_weights:
            nn.init.normal_(self.boft_R[adapter_name], std=0.1)
            nn.init.normal_(self.boft_s[adapter_name], mean=1.0, std=0.1)

    def scale_shape(self, outputs: int) -> tuple[int, int]:
        return outputs, 1

    def blocks(self, weights: Tensor) -> Tensor:
        """D of each factor, [n, blocks, b, b]: in fp32 at least."""
        return cayley(0.5 * (weights - weights.transpose(-1, -2)).flatten(0, 1)).unflatten(0, weights.shape[:2])

    def thinned(self, name: str, blocks: Tensor) -> Tensor:
        """In training a share of one factor's blocks turns nothing. Draws as peft does."""
        p = self.boft_dropout[name]
        if not (self.training and p):
            return blocks
        n, count, size, _ = blocks.shape
        factor = int(torch.randint(0, n, (1,)).item())
        off = (torch.arange(count) < int(p * count))[torch.randperm(count)]
        idle = torch.zeros(n, count, 1, 1, dtype=torch.bool)
        idle[factor] = off.view(count, 1, 1)
        eye = torch.eye(size, device=blocks.device, dtype=blocks.dtype)
        return torch.where(idle.to(blocks.device), eye, blocks)

    def in_training(self, names: list[str]) -> list[Tensor]:
        """The blocks of each adapter for a forward."""
        return [self.thinned(name, self.blocks(self.boft_R[name])) for name in names]

    @torch.no_grad()
    def exact(self, name: str) -> tuple[Tensor, Tensor]:
        """(blocks, scales [out, 1]) for merging: in fp32 at least."""
        weights = self.boft_R[name]
        scales = self.boft_s[name].reshape(-1, 1)
        return self.blocks(weights.to(torch.promote_types(weights.dtype, torch.float32))), scales

    def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(R [in, in], scales [out, 1]): merging makes s * W R^T of a weight W, and adds nothing."""
        blocks, scales = self.exact(adapter)
        features = self.weight_shape()[1]
        return butterfly(torch.eye(features, device=blocks.device, dtype=blocks.dtype), blocks), scales

    @torch.no_grad()
    def shifted_weight(self, weight: Tensor, adapter_names: Sequence[str], sign: int) -> Tensor:
        rows = weight.reshape(len(weight), -1)
        for name in adapter_names if sign > 0 else reversed(adapter_names):
            blocks, scales = (one.to(rows.dtype) for one in self.exact(name))
            if sign > 0:
                rows = scales * butterfly(rows, blocks, inverse=True)
            else:
                rows = butterfly(rows / scales, blocks)
        return rows.reshape(weight.shape)


def block_sizes(features: int, size: int, count: int, factors: int) -> tuple[int, int]:
    """(size of a block, number of blocks), one of which is given and the other 0. Raises ValueError where they do not
    fit: the last factor's shuffle has blocks of 2^(factors - 1) times the size."""
    given = size or count
    if features % given:
        name = "boft_block_size" if size else "boft_block_num"
        raise ValueError(
            f"{name} must divide the {features} features of the layer, got {given}: choose a divisor, or other "
            "target_modules"
        )
    size, count = (size, features // size) if size else (features // count, count)
    if factors > 1 and (size % 2 or factors > count.bit_length() or count % 2 ** (factors - 1)):
        raise ValueError(
            f"boft_n_butterfly_factor={factors} needs blocks of an even size, and a number of them that "
            f"2^{factors - 1} divides: got {count} blocks of {size}"
        )
    return size, count


def butterfly(x: Tensor, blocks: Tensor, inverse: bool = False) -> Tensor:
    """x [..., in] times R = B_n ... B_1, the product of the factors B_i = P_i D_i P_i^T, or its inverse."""
    n = len(blocks)
    for index in range(n) if inverse else reversed(range(n)):
        D = blocks[index].transpose(1, 2) if inverse else blocks[index]
        x = shuffled(rotate(shuffled(x, index, D, back=True), D), index, D)
    return x


def shuffled(x: Tensor, index: int, D: Tensor, back: bool = False) -> Tensor:
    """x P^T: in every 2^index blocks the even halves come first, and the odd ones after them. `back`: x P."""
    if index == 0:
        return x
    halves, steps = D.shape[-1] // 2, 2**index
    shape = (-1, 2, steps, halves) if back else (-1, steps, 2, halves)
    return x.unflatten(-1, shape).transpose(-2, -3).flatten(-4)


class Linear(BOFTLayer):
    """BOFT around torch.nn.Linear and k-bit linear layers: x [..., in]."""

    how = "the input goes through butterfly factors, the base layer is called with it, and its output is scaled"

    def adapted(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        turned = x
        for blocks in reversed(self.in_training(names)):
            turned = butterfly(turned, blocks.to(x.dtype))
        y, bias = self.base_layer(turned, *args, **kwargs), self.bias
        for name in names:
            scales = self.boft_s[name].squeeze(-1)
            y = y * scales if bias is None else (y - bias) * scales + bias
        return y.to(x.dtype)


class Conv2d(BOFTLayer):
    """BOFT around torch.nn.Conv2d without groups: x [batch, in, height, width]."""

    how = "the kernels go through butterfly factors and are scaled, and torch's own convolution takes them"

    def make_weights(self, adapter_name: str, config: Any, **options: Any) -> None:
        refuse_groups(self.get_base_layer(), "BOFT")
        super().make_weights(adapter_name, config)

    def scale_shape(self, outputs: int) -> tuple[int, int]:
        return 1, outputs

    def adapted(self, names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        of_adapters = self.in_training(names)

        def turned(rows: Tensor) -> Tensor:
            for name, blocks in zip(names, of_adapters):
                rows = self.boft_s[name].T * butterfly(rows.to(blocks.dtype), blocks, inverse=True)
            return rows

        return convolved(self.get_base_layer(), x, turned)
