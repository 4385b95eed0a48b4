"""This machine, for reports: its device, its backend, and the versions of what matters."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx

from .._version import __version__


def machine() -> str:
    """This machine in one line."""
    chip = mx.device_info().get("device_name", platform.machine())
    return f"{platform.system()} {platform.machine()}, {chip}, {os.cpu_count()} cores"


def backend() -> str:
    """The backend that MLX computes on by default: ``"metal"``, ``"cuda"`` or ``"cpu"``."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def mlx_backend() -> str:
    """MLX's version and backend, for reports: ``mlx 0.32.4, Metal``, say."""
    names = {"cpu": "CPU", "metal": "Metal", "cuda": "CUDA"}
    return f"mlx {mx.__version__}, {names[backend()]}"


def device() -> dict[str, Any]:
    """MLX's default device: name, architecture, backend, and sizes in bytes, which are None if unknown."""
    try:
        info = dict(mx.device_info())
    except Exception:  # a backend that does not tell can still be checked
        info = {}
    memory = info.get("memory_size", info.get("total_memory"))
    if memory is None and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": info.get("device_name", platform.processor() or "unknown"),
        "architecture": info.get("architecture", platform.machine()),
        "backend": backend(),
        "memory_bytes": memory,
        "working_set_bytes": info.get("max_recommended_working_set_size"),
    }


def versions() -> dict[str, str]:
    """The versions of the packages that matter, of Python and of the operating system."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "unknown"

    packages = {name: installed(name) for name in ("mlx", "mlx-lm", "numpy")}
    system = f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else f"{platform.system()} {platform.release()}"
    return {
        "glass_mlx": __version__,
        **packages,
        "python": platform.python_version(),
        "os": f"{system} {platform.machine()}",
    }
