"""What an editor or a type checker knows of the public functions."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

MODEL = "glass_mlx.model.glass_model.GlassModel"
TOKENIZER = "mlx_lm.tokenizer_utils.TokenizerWrapper"
RESPONSE = "glass_mlx.decoding.stream.GenerationResponse"
REVEALED = {
    "load()": f"tuple[{MODEL}, {TOKENIZER}]",
    "load('demo', density=0.3, stats=False)": f"tuple[{MODEL}, {TOKENIZER}]",
    "load('demo', return_config=True)": f"tuple[{MODEL}, {TOKENIZER}, dict[str, Any]]",
    "wrap(load()[0])": MODEL,
    "generate(*load(), 'x')": "str",
    "next(stream_generate(*load(), [{'role': 'user', 'content': 'x'}]))": RESPONSE,
    "GlassConfig().updated(density=1)": "glass_mlx.model.config.GlassConfig",
}
# What is not of this package is not looked into, but for the tokenizer's type.
SETTINGS = """
[mypy]
follow_imports = silent
[mypy-mlx.*,numpy.*,safetensors.*,transformers.*,huggingface_hub.*,jinja2.*,platformdirs.*]
follow_imports = skip
follow_imports_for_stubs = True
[mypy-mlx_lm.models.*,mlx_lm.generate,mlx_lm.utils,mlx_lm.sample_utils,mlx_lm.convert]
follow_imports = skip
follow_imports_for_stubs = True
"""


def test_revealed_types(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    lines = ["from glass_mlx import *", *(f"reveal_type({call})" for call in REVEALED), "load('demo', densty=0.3)"]
    (tmp_path / "calls.py").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", os.devnull, "calls.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert re.findall(r'Revealed type is "(.*)"', done.stdout) == list(REVEALED.values()), done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert errors and all('"load"' in line for line in errors) and "densty" in errors[0]
