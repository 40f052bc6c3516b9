"""Which jobs of a step go through the model together."""

from .data import Sample
from .running import Running

Batch = list[tuple[Running, list[Sample]]]
# Tokens of a forward on a CPU: 4 jobs of 512 took 0.91 of peft's time in turn and 1.09 in one (bench/bench_joint.py).
CPU_TOKENS = 512
# Tokens, padding included, for one that is none: jobs of 1 x 512 to 8 x 64 took 4.2 times as long together as in turn.
PADDED = 1.25


def groups_of(taken: Batch, max_tokens: int | None) -> list[Batch]:
    """Those that share a forward: of like length, and no more than `max_tokens` has room for."""
    groups: list[Batch] = []
    for one in sorted(taken, key=_longest, reverse=True):
        if groups and _has_room([*groups[-1], one], max_tokens):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _has_room(group: Batch, max_tokens: int | None) -> bool:
    """Whether these may share a forward; the first has the longest samples."""
    lengths = [len(sample.ids) for _, samples in group for sample in samples]
    padded = len(lengths) * max(lengths)
    return padded <= PADDED * sum(lengths) and (max_tokens is None or padded <= max_tokens)


def _longest(one: tuple[Running, list[Sample]]) -> int:
    return max(len(sample.ids) for sample in one[1])
