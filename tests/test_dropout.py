"""The dropout generator: a pure function with the statistics of a fair coin."""

import pytest
import torch

from peft_fast.kernels import dropout


def key(seed: int) -> torch.Tensor:
    return torch.tensor([seed, ~seed], dtype=torch.int32)


def hash32(i: int, key0: int, key1: int) -> int:
    """The formula in Python's unbounded integers, masked: independent of how torch wraps and shifts."""
    x = (i * 0x9E3779B1 + key0) % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x ^= key1
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


@pytest.mark.parametrize("first_row", [0, 5, 2**31 + 1, 2**40])
def test_mask_is_the_published_formula(first_row):
    M, K, p, k = 3, 7, 0.3, torch.tensor([-123456789, 2147483647], dtype=torch.int32)
    key0, key1 = (int(v) % 2**32 for v in k)
    mask = dropout.mask(k, M, K, p, first_row)
    for m in range(M):
        base = (first_row + m) * 4  # ceil(7 / 2) pairs a row
        row_key = (key0 + (base >> 32) * 0x85EBCA6B) % 2**32
        for n in range(K):
            bits = hash32((base + n // 2) % 2**32, row_key, key1)
            draw = bits >> 16 if n % 2 else bits & 0xFFFF
            assert bool(mask[m, n]) == (draw >= round(p * 65536))


def test_a_row_does_not_depend_on_where_the_call_starts():
    whole = dropout.mask(key(1), 10, 33, 0.5)
    assert torch.equal(whole[4:], dropout.mask(key(1), 6, 33, 0.5, first_row=4))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate_and_independence(p):
    """4 M elements and 12 keys, neighbouring ones too. Bounds are 5 sigma: 1 in a million runs of fair coins fails."""
    M = K = 2048
    n, rate = M * K, 1 - round(p * 65536) / 65536
    sigma = (rate * (1 - rate) / n) ** 0.5
    previous = None
    for seed in [0, 1, 2, 3, 42, 43, -1, -2, 2**31 - 1, -(2**31), 123456, 123457]:
        mask = dropout.mask(key(seed), M, K, p)
        z = mask.double() - rate
        assert abs(z.mean()) < 5 * sigma
        for lag in (1, 2, 3, 16, K, K + 1):  # along a row and across rows
            flat = z.flatten()
            correlation = (flat[:-lag] * flat[lag:]).mean() / (rate * (1 - rate))
            assert abs(correlation) < 5 / n**0.5, (seed, lag)
        for axis in (0, 1):  # counts of whole rows and columns: chi-square with 2048 degrees of freedom
            counts = (mask.double().sum(axis) - rate * M) ** 2 / (M * rate * (1 - rate))
            assert abs(counts.sum() - K) < 5 * (2 * K) ** 0.5
        if previous is not None:
            assert abs((z * previous).mean() / (rate * (1 - rate))) < 5 / n**0.5, seed
        previous = z


def test_correction_keeps_the_mean():
    for p in (0.0, 0.1, 0.3, 0.999):
        kept = 1 - round(p * 65536) / 65536
        assert dropout.correction(p) * kept == pytest.approx(1.0, abs=1e-12)
    assert dropout.correction(1.0) == 0.0  # not inf
    assert not dropout.mask(key(3), 4, 64, 1.0).any()
    assert dropout.mask(key(3), 4, 64, 0.0).all()


def test_keys_come_from_torchs_generator():
    torch.manual_seed(7)
    first = dropout.new_key("cpu")
    torch.manual_seed(7)
    assert torch.equal(first, dropout.new_key("cpu"))
    assert not torch.equal(first, dropout.new_key("cpu"))
    assert first.dtype == torch.int32
    assert first.shape == (2,)
