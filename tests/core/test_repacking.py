"""Tests of the repacking kernel: its body, compiled as C, and what is done where it cannot be used."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from glass_mlx.core import repacking
from glass_mlx.core.slicing import take_codes

BITS = (2, 3, 4, 5, 6, 8)
HEADER = "#include <stdint.h>\ntypedef uint32_t uint; typedef uint64_t ulong;\n"
# What Metal gives the body: its types, its place in the grid and its arrays, as globals; and the grid as two loops.
AROUND = """
#undef BITS
#define BITS %(bits)d
void run_%(bits)d(
    const uint *weight, const int *weight_shape, const int *columns, const int *columns_shape, uint *packed) {
  for (uint y = 0; y < (uint)weight_shape[0]; y++) for (uint x = 0; x < (uint)columns_shape[0] / 32; x++) {
    struct { uint x, y; } thread_position_in_grid = { x, y };
    %(body)s
  }
}
"""


def codes(rng, rows: int, size: int, bits: int) -> np.ndarray:
    return rng.integers(0, 2**32, (rows, size * bits // 32), dtype=np.uint32)


def some(rng, size: int, k: int) -> np.ndarray:
    return np.sort(rng.permutation(size)[:k]).astype(np.int32)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The kernel's body as a C function for a number of bits."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("kernel")

    source, library = folder / "kernel.c", folder / "kernel.so"
    source.write_text(HEADER + "".join(AROUND % {"bits": bits, "body": repacking.SOURCE} for bits in BITS))
    options = ["-O1", "-Wall", "-Werror", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([compiler, *options, "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    functions = ctypes.CDLL(str(library))
    return lambda bits: getattr(functions, f"run_{bits}")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("size", "k"), [(64, 32), (256, 96), (256, 256)])
def test_the_body(compiled, bits, size, k):
    """It gives what the plain operations give, for any columns, the last code of a row among them."""
    rng = np.random.default_rng(bits)
    weight, columns = codes(rng, 5, size, bits), some(rng, size, k)
    columns[-1] = size - 1
    packed = np.full((5, k * bits // 32), 0xDEAD, np.uint32)
    shapes = [np.array(a.shape, np.int32) for a in (weight, columns)]
    given = (weight, shapes[0], columns, shapes[1], packed)
    compiled(bits)(*(a.ctypes.data_as(ctypes.c_void_p) for a in given))
    assert np.array_equal(packed, np.array(take_codes(mx.array(weight), mx.array(columns), bits)))


@pytest.fixture
def metal(monkeypatch):
    """A Metal whose kernel is the given function of (weight, columns, bits)."""
    for known in ("_failed", "_checked"):
        monkeypatch.setattr(repacking, known, set())
    monkeypatch.setattr(repacking, "_has_metal", lambda: True)
    return lambda run: monkeypatch.setattr(repacking, "_run", run)


def given(bits: int = 4) -> tuple:
    rng = np.random.default_rng(0)
    return mx.array(codes(rng, 4, 64, bits)), mx.array(some(rng, 64, 32)), bits


def test_a_kernel_that_is_right_is_used(metal, caplog):
    """And held against the plain operations once."""
    calls = []
    metal(lambda *arguments: take_codes(*arguments))

    def plain(*arguments):
        calls.append(arguments)
        return take_codes(*arguments)

    for _ in range(3):
        found = repacking.take_on_metal(*given(), plain)
        assert mx.array_equal(found, take_codes(*given()))
    assert len(calls) == 1 and not caplog.records


@pytest.mark.parametrize("error", [RuntimeError("no such function\nline 2"), ValueError(), KeyError("x")])
def test_a_kernel_that_fails_is_not_used(metal, caplog, error):
    def run(*_):
        raise error

    metal(run)
    assert all(repacking.take_on_metal(*given(), take_codes) is None for _ in range(3))
    assert len(caplog.records) == 1 and "\n" not in caplog.text.strip()


def test_a_kernel_that_is_wrong_is_not_used(metal, caplog):
    """Other numbers of bits are another matter."""
    metal(lambda weight, columns, bits: take_codes(weight, columns, bits) + (bits == 4))
    assert repacking.take_on_metal(*given(4), take_codes) is None
    assert mx.array_equal(repacking.take_on_metal(*given(8), take_codes), take_codes(*given(8)))
    assert len(caplog.records) == 1


def test_without_metal(monkeypatch):
    monkeypatch.setattr(repacking, "_has_metal", lambda: False)
    monkeypatch.setattr(repacking, "_run", None)
    assert repacking.take_on_metal(*given(), take_codes) is None


def test_routed_experts_take_the_plain_operations(metal):
    weight, columns, bits = given()
    assert repacking.take_on_metal(weight[None], columns[None], bits, take_codes) is None
