"""`auto` launches nothing that the compile matrix says spills or does not fit: every launch that ops/table.py's picks
make on a card is looked up in bench/results/compile."""

import functools
import itertools

import pytest
import torch
import triton

from bench import compile as matrix
from bench.compile_picks import TOKENS, Pick, covers, picks
from bench.launches import record
from peft_fast.kernels import configs, dropout, lora_down

Rows = dict[tuple[str, str, str], dict[str, str]]  # (kernel, target, variant): row


@functools.cache
def rows() -> Rows:
    found = [row for row in matrix.stored() if row["triton"] == triton.__version__]
    if not found:
        pytest.skip(f"bench/results/compile has no rows of Triton {triton.__version__}: make compile")
    return {(row["kernel"], row["target"], row["variant"]): row for row in found}


@functools.cache
def of(capability: int) -> tuple[list[Pick], list[matrix.Job]]:
    return list(picks(capability)), matrix.jobs(False, (capability,))


def problems(capability: int, known: Rows) -> list[str]:
    """One line for each launch of a pick that has no row, or one with a fault."""
    made, jobs = of(capability)
    exact = {launch: variant for variant, launch, _ in jobs}
    found = []
    launched = {launch: pick for pick in made for launch in pick.launches}
    for launch, pick in launched.items():
        variant = exact.get(launch) or next((v for v, other, _ in jobs if covers(other, launch)), None)
        row = known.get((launch.name, f"sm_{capability}", str(variant)))
        if row is None:
            found.append(f"{launch.name}, {pick.variant}: no row of {variant} in bench/results/compile (make compile)")
        elif int(row["spill_bytes"]) or float(row["shared_kb"]) > matrix.SHARED_KB[capability] or row["fault"]:
            found.append(f"{launch.name}, {pick.variant}: {variant} spills or does not fit: {row}")
    return found


SLOW = [pytest.param(capability, marks=pytest.mark.slow) for capability in (80, 86, 89, 100, 120)]


@pytest.mark.parametrize("capability", [75, 90, *SLOW])
def test_auto_launches_what_fits(capability):
    assert problems(capability, rows()) == []


# Not seen yet: sm_120; on sm_100 the forward of two adapters of rank 32 takes 8 bytes of stack, as its row says.
@pytest.mark.parametrize("capability", [90, *SLOW[:3]])
def test_groups_launch_what_fits(capability):
    """q, k and v with adapters in fp32, as get_peft_model makes them, under a bf16 model."""
    _, jobs = of(capability)
    exact = {launch: variant for variant, launch, _ in jobs}
    for count, R, p in itertools.product((2, 3), (8, 16, 32), (0.0, 0.1)):
        x, ds = torch.zeros(256, 4096, dtype=torch.bfloat16), torch.zeros(256, count * R, dtype=torch.bfloat16)
        A, drop = [torch.zeros(R, 4096)] * count, ([p] * count, [dropout.new_key("cpu") if p else None] * count)
        with configs.target(capability), record() as launched:
            lora_down.lora_down_group(x, A, *drop)
            lora_down.lora_down_group_backward(ds, x, A, *drop, x)
        for launch in dict.fromkeys(one for one in launched if one.name.startswith("lora_down")):
            variant = exact.get(launch) or next(v for v, other, _ in jobs if covers(other, launch))
            row = rows()[launch.name, f"sm_{capability}", variant]
            assert row["fault"] == "", row


def test_what_spills_or_is_not_known_is_noticed():
    key = ("lora_up_bwd_kernel", "sm_90", "bf16 R16 aligned wide")
    row, others = rows()[key], {k: row for k, row in rows().items() if k != key}
    for changed, expected in (
        ({key: row | {"spill_bytes": "8"}}, "spills or does not fit"),
        ({key: row | {"shared_kb": "228.0"}}, "spills or does not fit"),
        ({key: row | {"fault": "uses fp64"}}, "spills or does not fit"),
        ({}, "no row of bf16 R16 aligned wide"),
    ):
        (line,) = problems(90, others | changed)
        assert line.startswith("lora_up_bwd_kernel, bf16 auto ")
        assert expected in line


def test_the_picks_are_the_tables():
    """One of each route on an H100, by the kernels that only this route has."""
    made, _ = of(90)

    def kernels(base: str, tokens: int, p: float, wanted: str) -> set[str]:
        asked = ("bf16", "bf16", base, (2048, 2048, 16), tokens, p, wanted)
        return {launch.name for pick in made if pick[:-1] == asked for launch in pick.launches}

    assert {pick.tokens for pick in made} == set(TOKENS)
    assert kernels("nf4", 1, 0.0, "inference") >= {"quant_gemv_kernel", "lora_down_fwd_kernel"}
    assert "quant_matmul_dx_kernel" in kernels("nf4", 9, 0.1, "training")
    assert "quant_matmul_dx_kernel" not in kernels("nf4", 9, 0.1, "first layer")
    assert kernels("int8", 512, 0.1, "training") >= {"dequantize_int8_kernel", "lora_up_add_fwd_kernel"}
    assert "dequantize_merge_kernel" in kernels("nf4", 512, 0.0, "inference")
    assert "dequantize_merge_kernel" not in kernels("nf4", 512, 0.0, "training")
    assert not any("quant" in name for name in kernels("dense", 64, 0.1, "training"))
