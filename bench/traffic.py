"""Bytes that a launch moves between memory and the chip, told from its arguments.

The rule: what it reads, each byte once, plus what it writes, each byte once. A tensor that is given twice is read once;
a view counts the bytes that it addresses, so a broadcast one counts what is repeated once; what is changed in place is
read and written. Caches do not enter: that several programs of a launch read the same tile again is neither counted for
cuBLAS nor for Triton. A gather counts its whole table.

Of aten and bitsandbytes the schema says what is written. Of our Triton kernels KERNELS does, by the name of the
argument: some are handed pointers that they do not follow, where a gradient is not asked for or for the adapters that a
group does not have. tests/test_traffic.py runs them in the interpreter and compares with the addresses that they load
and store.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

from torch import Tensor


class Extent(NamedTuple):
    """Which bytes a tensor addresses: equal for views of the same ones, as for a matrix and its transpose."""

    storage: int
    offset: int  # in bytes
    dims: tuple[tuple[int, int], ...]  # (stride, size), the closest first, those that follow without a gap merged
    itemsize: int

    @property
    def nbytes(self) -> int:
        return prod(size for _, size in self.dims) * self.itemsize


def extent(tensor: Tensor) -> Extent:
    dims: list[tuple[int, int]] = []
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if not size:
            dims = [(1, 0)]
            break
        if size == 1 or not stride:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = dims[-1][0], dims[-1][1] * size
        else:
            dims.append((stride, size))
    offset = tensor.storage_offset() * tensor.element_size()
    return Extent(tensor.untyped_storage().data_ptr(), offset, tuple(dims), tensor.element_size())


def total(reads: Iterable[Extent], writes: Iterable[Extent]) -> int:
    return sum(e.nbytes for e in set(reads)) + sum(e.nbytes for e in set(writes))


# In-place ops that do not look at what was there.
OVERWRITE = {"copy_", "fill_", "zero_", "bernoulli_", "normal_", "uniform_", "random_"}


def of_op(func: Any, args: tuple, kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes of one call of an aten or bitsandbytes op that returned `out`."""
    reads: list[Extent] = []
    writes: list[Extent] = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
        found = [extent(t) for t in tensors(value)]
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written:
            writes += found
        if not written or not (argument.is_out or func._opname in OVERWRITE):
            reads += found
    if not any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
        writes += [extent(t) for t in tensors(out)]
    return total(reads, writes)


def tensors(value: Any) -> Iterator[Tensor]:
    """Those among an argument, or in a list of them."""
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, Tensor):
            yield item


WEIGHT = "data absmax code nested_absmax nested_code offset"

# Of each kernel: which arguments it reads and which it writes, without `_ptr` and without the number that the arguments
# of several adapters have. name?FLAG: only where that constant is set.
KERNELS = {
    "dequantize_int8_kernel": ("data absmax", "out"),
    "dequantize_kernel": (WEIGHT, "out"),
    "dequantize_merge_kernel": (WEIGHT + " a b", "out squares"),
    "glu_bwd_kernel": ("dh g u", "dh dg h?NEEDS_H"),
    "glu_fwd_kernel": ("g u", "h"),
    "lora_down_bwd_kernel": ("ds x?NEEDS_DA a?NEEDS_DX dx?NEEDS_DX key?DROPOUT", "dx?NEEDS_DX da?NEEDS_DA"),
    "lora_down_fwd_kernel": ("x a key?DROPOUT", "s"),
    "lora_down_multi_kernel": ("x order blocks stack table keys?DROPOUT", "s"),
    "lora_embedding_add_kernel": ("y ids a b", "y"),
    "lora_glu_bwd_kernel": ("dh g u s bg bu ds a key?DROPOUT", "dh dg da?NEEDS_DA"),
    "lora_gram_multi_kernel": ("u v order starts table keys?DROPOUT", "out"),
    "lora_up_add_fwd_kernel": ("y s b bias", "y"),
    "lora_up_bwd_kernel": ("dy s?NEEDS_DB b?NEEDS_DS", "ds?NEEDS_DS db?NEEDS_DB"),
    "lora_up_glu_kernel": ("g u s bg bu", "h g?UPDATE u?UPDATE"),
    "lora_up_multi_kernel": ("y s order blocks stack table keys?DROPOUT", "y"),
    "pieces_kernel": ("starts", "pieces"),
    "quant_gemv_kernel": (WEIGHT + " x s b bias", "y"),
    "quant_matmul_dx_kernel": (WEIGHT + " dy ds a key?DROPOUT", "dx"),
    "quant_matmul_kernel": (WEIGHT + " x s b bias", "y"),
    "scale_columns_bwd_kernel": ("dy z?NEEDS_DFACTOR factor", "dz?NEEDS_DZ partial?NEEDS_DFACTOR"),
    "scale_columns_fwd_kernel": ("z factor bias", "y"),
    "segment_sum_kernel": ("ids order ds", "da"),
    "sum_both_kernel": ("rows_partial partial start", "rows out"),
    "sum_partials_kernel": ("partial start", "out"),
}
# Of these too much or too little is counted: all of x, though rows of no adapter are not read, and not what lies behind
# the addresses of a table, the adapters themselves. Counts of launches do not mind.
BY_TABLE = {"lora_down_multi_kernel", "lora_gram_multi_kernel", "lora_up_multi_kernel"}


def of_kernel(name: str, given: Mapping[str, Extent], constants: Mapping[str, Any]) -> int:
    """Bytes of one launch of our kernel `name`: `given`, its tensors by argument, None left out."""
    if name not in KERNELS:
        raise KeyError(f"bench/traffic.py does not say what {name} reads and writes: add it to KERNELS")
    return total(*(_of(names, given, constants) for names in KERNELS[name]))


def _of(names: str, given: Mapping[str, Extent], constants: Mapping[str, Any]) -> list[Extent]:
    followed = {name for name, _, flag in (item.partition("?") for item in names.split()) if constants.get(flag, True)}
    return [e for argument, e in given.items() if argument.removesuffix("_ptr").rstrip("0123456789") in followed]
