"""List the compute kernels inside an MLX Metal library.

An MLX wheel for macOS ships its GPU kernels already compiled in one file,
``mlx.metallib``.  A graph that needs a kernel name which is not in that file
fails on the GPU even though the CPU backend runs it.  This script reads the
names, on any system and without Metal, so that such a claim can be checked:

    metal_kernels.py mlx_metal-<version>-...whl --op block_sort --dtype bool
    metal_kernels.py mlx.metallib --pattern 'qmv_fast.*gs_64_b_4' --list

``--op`` and ``--pattern`` are regular expressions searched in the kernel
name.  ``--dtype`` is an MLX dtype name; both ways in which kernel names spell
it (``float16`` and ``float16_t``, ``float32`` and ``float``, ``bool`` and
``bool_``) are tried.  The exit status is 0 when a kernel matched and 1 when
none did.

Kernels which MLX compiles from source at run time are not in the file and
cannot be judged from it: gather and scatter (all variants), masked and slice
updates with a reduction, Hadamard, compiled element-wise graphs and custom
kernels.
"""

import argparse
import io
import re
import struct
import sys
import zipfile
from pathlib import Path

MAGIC = b"MTLB"
LIST_OFFSET_AT = 24  # u64 offset of the function list inside the header
SPELLINGS = {
    "bool": ("bool_", "bool"),
    "float16": ("float16", "float16_t", "half"),
    "bfloat16": ("bfloat16", "bfloat16_t"),
    "float32": ("float32", "float"),
    "float64": ("float64", "double"),
    "complex64": ("complex64", "complex64_t", "float2"),
}


def read_library(path):
    """Return the bytes of the metallib at `path`, which may be a wheel."""
    data = Path(path).read_bytes()
    if data[:4] == MAGIC:
        return data
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ValueError(f"{path} is neither a metallib nor a wheel")
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        inside = [n for n in wheel.namelist() if n.endswith(".metallib")]
        if len(inside) != 1:
            raise ValueError(f"{path} holds {len(inside)} metallib files")
        return wheel.read(inside[0])


def kernel_names(library):
    """Return the sorted function names in the bytes of a metallib.

    The function list is a u32 count, then per function a u32 byte length
    (itself included) and tagged fields: four letters, a u16 size, the value.
    """
    if library[:4] != MAGIC:
        raise ValueError("not a metallib")
    (at,) = struct.unpack_from("<Q", library, LIST_OFFSET_AT)
    (count,) = struct.unpack_from("<I", library, at)
    at += 4
    names = set()
    for _ in range(count):
        (length,) = struct.unpack_from("<I", library, at)
        field, end = at + 4, at + length
        while field + 6 <= end and library[field : field + 4] != b"ENDT":
            tag = library[field : field + 4]
            (size,) = struct.unpack_from("<H", library, field + 4)
            if tag == b"NAME":
                value = library[field + 6 : field + 6 + size]
                names.add(value.rstrip(b"\0").decode())
            field += 6 + size
        at = end
    if len(names) == 0 and count:
        raise ValueError("the function list holds no names")
    return sorted(names)


def matching(names, op=None, dtype=None, pattern=None):
    """Return the names that hold the op, the dtype and the pattern."""
    tests = [re.compile(text) for text in (op, pattern) if text]
    if dtype:
        spelt = "|".join(map(re.escape, SPELLINGS.get(dtype, (dtype,))))
        # "int8" must not match inside "uint8", nor "float16" in "bfloat16"
        tests.append(re.compile(f"(?<![bu])(?:{spelt})(?![0-9])"))
    return [name for name in names if all(t.search(name) for t in tests)]


def main(argv=None):
    """Print the matching kernel names and say whether there are any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("library", help="mlx.metallib, or a wheel holding it")
    parser.add_argument("--op", help="regular expression for the kernel's op")
    parser.add_argument("--dtype", help="MLX dtype name, such as bfloat16")
    parser.add_argument("--pattern", help="further regular expression")
    parser.add_argument("--list", action="store_true", help="print the names")
    args = parser.parse_args(argv)
    names = kernel_names(read_library(args.library))
    found = matching(names, args.op, args.dtype, args.pattern)
    if args.list:
        print(*found, sep="\n")
    wanted = " ".join(x for x in (args.op, args.dtype, args.pattern) if x)
    state = "present" if found else "ABSENT"
    print(f"{wanted or 'any'}: {state} ({len(found)} of {len(names)} kernels)")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
