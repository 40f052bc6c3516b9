"""torch's DistributedDataParallel around our models: two processes train as one. (The core is in tests/api.)"""

import pytest
import torch
from safetensors.torch import load_file

from .processes import two

CASES = {
    "training": ["accumulated", "checkpointed", "checkpointed-accumulated", "reentrant", "uneven", "running-out"],
    "adapters": ["dora", "modules-to-save", "embedding", "tied", "tied-adapters", "tokens", "accelerated"],
    "experts": ["experts", "experts-checkpointed", "experts-eager"],
    "k-bit": ["nf4", "bitsandbytes"],
}


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES.values(), ids=CASES.keys())
def test_every_kind_trains_as_in_one_process(tmp_path, cases):
    """Gradients that are accumulated, recomputed activations, last batches that are uneven, ...: compared there."""
    one, other = two("ddp", tmp_path, *cases)
    assert one == other
    for name in set(cases) - {"running-out"}:
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
