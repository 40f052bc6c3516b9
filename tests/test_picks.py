"""`auto` launches nothing that the compile matrix says spills or does not fit: every launch that ops/table.py's picks
make on a card, for one layer, for layers that share x and for gated MLPs, is looked up in bench/results/compile."""

import functools

import pytest
import triton

from bench import compile as matrix
from bench.compile_picks import TOKENS, Pick, covers, picks, together
from bench.launches import Launch

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
    launched = {launch: pick.variant for pick in made for launch in pick.launches}
    return faults(launched, jobs, capability, known)


def faults(launched: dict[Launch, str], jobs: list[matrix.Job], capability: int, known: Rows) -> list[str]:
    """`launched`: which call makes each launch."""
    exact = {launch: variant for variant, launch, _ in jobs}
    found = []
    for launch, call in launched.items():
        variant = exact.get(launch) or next((v for v, other, _ in jobs if covers(other, launch)), None)
        row = known.get((launch.name, f"sm_{capability}", str(variant)))
        if row is None:
            found.append(f"{launch.name}, {call}: no row of {variant} in bench/results/compile (make compile)")
        elif int(row["spill_bytes"]) or float(row["shared_kb"]) > matrix.SHARED_KB[capability] or row["fault"]:
            found.append(f"{launch.name}, {call}: {variant} spills or does not fit: {row}")
    return found


SLOW = [pytest.param(capability, marks=pytest.mark.slow) for capability in (80, 86, 89, 100, 120)]


@pytest.mark.parametrize("capability", [75, 90, *SLOW])
def test_auto_launches_what_fits(capability):
    assert problems(capability, rows()) == []


@pytest.mark.parametrize("capability", [75, 90, *SLOW])
def test_groups_and_mlps_launch_what_fits(capability):
    launched = {launch: variant for variant, launch in together(capability)}
    assert faults(launched, of(capability)[1], capability, rows()) == []


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
