"""This machine, in words."""

from __future__ import annotations

import os
import platform

import mlx.core as mx


def machine() -> str:
    """This machine in words."""
    chip = mx.device_info().get("device_name", platform.machine())
    return f"{platform.system()} {platform.machine()}, {chip}, {os.cpu_count()} cores"


def backend() -> str:
    """MLX's version and the backend that it runs on."""
    if mx.default_device() == mx.Device(mx.cpu):
        name = "CPU"
    else:
        name = "Metal" if mx.metal.is_available() else "CUDA"
    return f"mlx {mx.__version__}, {name}"
