"""bench/merge_gate.py: what passes the gate and what does not."""

from bench.merge_gate import Run, Slope, _fails_from, verdict


def runs(split: float, merge: float) -> list[Run]:
    return [Run(2e-4, 0, arm, 250, 3.7, after) for arm, after in (("fp32", 2.3), ("split", split), ("merge", merge))]


def slope(value: float, weights: int = 1 << 20) -> Slope:
    return Slope("small", 2e-4, 0, 5, "q", weights, value, 0.01, 0.9)


def test_losses_are_compared_with_splits():
    assert verdict(runs(2.301, 2.3011), []) == []
    assert verdict(runs(2.301, 2.2989), []) == []  # as far on the other side
    (failure,) = verdict(runs(2.301, 2.3013), [])
    assert failure == "loss at lr 0.0002, seed 0: merge is 0.00130 from fp32, split 0.00100"


def test_every_layer_counts():
    assert verdict([], [slope(0.95), slope(1.05)]) == []
    assert len(verdict([], [slope(0.949), slope(1.0), slope(1.051)])) == 2


def test_the_size_from_which_slopes_pass():
    found = [slope(0.8, 100), slope(1.0, 200), slope(1.0, 400)]
    assert [_fails_from(found, weights) for weights in (100, 200, 400)] == [True, False, False]
