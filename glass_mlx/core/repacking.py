"""Columns of packed weights in one pass, on Metal: each code is read once and written once.

The plain operations of ``slicing.take_codes`` gather octets, write them, and read them again to pack them: 103 MB for a
4-bit down projection of Mistral-7B instead of 44. The kernel has not been run on a Mac. So its first result for each
number of bits is held against the plain operations; a difference, or any error, means these from then on, with a
warning. Its arithmetic is tested on any machine: compiled as C, its body does the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import mlx.core as mx

logger = logging.getLogger("glass_mlx")

# One thread for each row and 32 columns, which are BITS words. ``buffer`` holds what does not fill a word yet.
SOURCE = """
    uint unit = thread_position_in_grid.x;
    uint row = thread_position_in_grid.y;
    uint words = weight_shape[1];
    ulong buffer = 0;
    uint filled = 0;
    ulong out = (ulong)row * (columns_shape[0] / 32) * BITS + (ulong)unit * BITS;
    for (uint i = 0; i < 32; i++) {
        uint bit = (uint)columns[32 * unit + i] * BITS;
        uint shift = bit % 32;
        ulong place = (ulong)row * words + bit / 32;
        ulong code = weight[place];
        if (shift + BITS > 32) {
            code |= (ulong)weight[place + 1] << 32;
        }
        buffer |= ((code >> shift) & ((1u << BITS) - 1)) << filled;
        filled += BITS;
        if (filled >= 32) {
            packed[out++] = (uint)buffer;
            buffer >>= 32;
            filled -= 32;
        }
    }
"""

_failed: set[int] = set()  # numbers of bits for which the plain operations are used
_checked: set[int] = set()


def take_on_metal(
    weight: mx.array, columns: mx.array, bits: int, plain: Callable[[mx.array, mx.array, int], mx.array]
) -> mx.array | None:
    """As ``slicing.take_codes``, by the kernel; None where there is no Metal, or the kernel has failed.

    Args:
        weight (mx.array): [D, F * bits / 32] uint32.
        columns (mx.array): [k] integer indices, k a multiple of 32.
        bits (int): of a code.
        plain: what does the same without the kernel.
    """
    if not _has_metal() or bits in _failed or weight.ndim != 2:
        return None
    try:
        packed = _run(weight, columns, bits)
        if bits not in _checked:
            if not mx.array_equal(packed, plain(weight, columns, bits)).item():
                raise RuntimeError("its result is another")
            _checked.add(bits)
    except Exception as e:  # whatever a driver may raise
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        logger.warning("the kernel that repacks %d-bit weights is not used here: %s", bits, reason)
        _failed.add(bits)
        return None
    return packed


def _has_metal() -> bool:
    return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu


@cache
def _kernel() -> Callable[..., list[mx.array]]:
    return mx.fast.metal_kernel(
        name="glass_repack", input_names=["weight", "columns"], output_names=["packed"], source=SOURCE
    )


def _run(weight: mx.array, columns: mx.array, bits: int) -> mx.array:
    units, rows = columns.shape[0] // 32, weight.shape[0]
    [packed] = _kernel()(
        inputs=[weight, columns.astype(mx.int32)],
        template=[("BITS", bits)],
        grid=(units, rows, 1),
        threadgroup=(min(units, 32), min(rows, 8), 1),
        output_shapes=[(rows, units * bits)],
        output_dtypes=[mx.uint32],
    )
    return packed
