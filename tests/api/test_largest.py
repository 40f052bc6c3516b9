"""PiSSA of large matrices: the largest singular vectors alone, as exact as a full SVD in fp32 and leaner."""

import pytest
import torch
from torch import nn

import peft_fast
from bench.memory_peak import peak
from peft_fast.tuners.lora.initialisation.largest import SMALLEST, largest_singular

R = 12
N = SMALLEST


def matrix(kind):
    torch.manual_seed(0)
    if kind == "like a trained one":  # values that fall as 1 / sqrt(i)
        columns = torch.linalg.qr(torch.randn(N, 256)).Q, torch.linalg.qr(torch.randn(N + 60, 256)).Q
        values = torch.arange(1, 257).pow(-0.5)
        return (columns[0] * values) @ columns[1].t() + 0.001 * torch.randn(N, N + 60)
    W = 0.02 * torch.randn(N + 60, N)
    return W + torch.randn(N + 60, 3) @ torch.randn(3, N) if kind == "a few far above" else W


@pytest.mark.parametrize("kind", ["random", "like a trained one", "a few far above"])
def test_is_as_exact_as_lapack(kind):
    W = matrix(kind)
    state = torch.get_rng_state()
    found = largest_singular(W, R)
    assert found is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(found, largest_singular(W, R)))
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    exact = (U[:, :R] * S[:R]) @ Vh[:R]
    u, s, vh = (part.double() for part in found)
    ours = float((u * s @ vh - exact).norm() / exact.norm())
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    lapacks = float(((u[:, :R] * s[:R]) @ vh[:R] - exact).norm() / exact.norm())
    assert ours <= max(lapacks, 1e-7)
    torch.testing.assert_close(found[1].double(), S[:R], rtol=1e-6, atol=0)
    for vectors in (found[0].t(), found[2]):
        torch.testing.assert_close(vectors @ vectors.t(), torch.eye(R), atol=1e-5, rtol=0)


def test_where_it_is_not_for():
    assert largest_singular(torch.randn(N - 1, 2 * N), R) is None  # small
    assert largest_singular(torch.randn(N, N), N // 8) is None  # many vectors
    assert largest_singular(torch.randn(N, N, dtype=torch.float64), R) is None
    assert largest_singular(torch.eye(N), R) is not None  # any vectors will do
    Q = torch.linalg.qr(torch.randn(N, N)).Q
    assert largest_singular(Q * torch.linspace(1, 1.00005, N), R) is None  # too close together
    zero = largest_singular(torch.zeros(N, N), R)
    assert zero is not None
    assert not zero[1].any()


def test_pissa_takes_it_and_less_memory():
    base = nn.ModuleDict({"layer": nn.Linear(N, N, bias=False)})
    weight = base["layer"].weight.detach().clone()
    config = peft_fast.LoraConfig(r=R, target_modules=["layer"], init_lora_weights="pissa")
    models = []
    most = peak(lambda: models.append(peft_fast.get_peft_model(base, config)))
    assert most < 0.4 * peak(lambda: torch.linalg.svd(weight, full_matrices=False))
    layer = models[0].base_model.model["layer"]
    torch.testing.assert_close(layer.weight + layer.get_delta_weight("default"), weight, atol=1e-6, rtol=0)
    assert torch.linalg.matrix_norm(layer.weight, 2) < torch.linalg.matrix_norm(weight, 2)
