"""Tests of finding feed-forward blocks and of swapping their projections."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.lora import LoRALinear

from glass_mlx.errors import GlassError
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.model.blocks import Block
from glass_mlx.model.discovery import check, find_blocks
from glass_mlx.model.glass_model import GlassModel

SIZE = 64


class Mlp(nn.Module):
    """A feed-forward block; what others do to its hidden vectors is in ``act``."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(16, SIZE)
        self.down_proj = nn.Linear(SIZE, 16)

    def act(self, h: mx.array) -> mx.array:
        return nn.relu(h)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act(self.up_proj(x)))


class Normalised(Mlp):
    def act(self, h):
        return mx.fast.rms_norm(nn.relu(h), None, 1e-5)


class Positional(Mlp):
    def act(self, h):
        return h * mx.arange(h.shape[-1])


class Failing(Mlp):
    def act(self, h):
        raise ValueError("needs a mask\nand more")


class HalfBlind(Mlp):
    """Does not run on fewer neurons than it was made for."""

    def act(self, h):
        return h.reshape(*h.shape[:-1], SIZE // 4, 4).reshape(*h.shape[:-1], SIZE)


class Unused(Mlp):
    def __call__(self, x):
        return x


class Twice(Mlp):
    def __call__(self, x):
        return super().__call__(super().__call__(x))


def block(module: nn.Module) -> Block:
    return Block("mlp", module, ("up_proj",), "down_proj", SIZE)


@pytest.mark.parametrize(
    ("family", "blocks"),
    {
        "llama": {f"model.layers.{i}.mlp": ("gate_proj+up_proj/down_proj", 128, "") for i in (0, 1)},
        "phi3": {f"model.layers.{i}.mlp": ("gate_up_proj/down_proj", 128, "halves") for i in (0, 1)},
        "phi3small": {f"model.layers.{i}.mlp": ("up_proj/down_proj", 128, "interleaved") for i in (0, 1)},
        "gpt2": {f"model.h.{i}.mlp": ("c_fc/c_proj", 256, "") for i in (0, 1)},
        "qwen": {f"transformer.h.{i}.mlp": ("w1+w2/c_proj", 64, "") for i in (0, 1)},
        # a dense first layer, then routed experts and a shared one
        "deepseek": {
            "model.layers.0.mlp": ("gate_proj+up_proj/down_proj", 128, ""),
            "model.layers.1.mlp.switch_mlp": ("gate_proj+up_proj/down_proj", 4 * 64, ""),
            "model.layers.1.mlp.shared_experts": ("gate_proj+up_proj/down_proj", 128, ""),
        },
    }.items(),
)
def test_find_blocks(family, blocks):
    found, dense = find_blocks(tiny_model(family))
    assert {b.path: ("+".join(b.inputs) + "/" + b.output, b.size, b.fused) for b in found} == blocks
    assert list(blocks) == [b.path for b in found]
    assert not dense


def test_other_towers_and_lone_experts_are_left_alone():
    model, shared = nn.Module(), Mlp()
    model.vision_tower, model.audio_encoder = {"mlp": Mlp()}, [Mlp()]
    model.experts, model.first, model.again, model.layers = [Mlp()], shared, shared, [{"mlp": Mlp()}]
    found, dense = find_blocks(model)
    assert {b.path for b in found} == {"first", "layers.0.mlp"}
    assert dense == {"experts.0": "one expert by itself, which few tokens are sent to"}


@pytest.mark.parametrize("quantise", [False, True])
def test_sizes_do_not_depend_on_packing(quantise):
    model = tiny_model("phi3")
    if quantise:
        nn.quantize(model, group_size=32, bits=4)
    found, _ = find_blocks(model)
    assert [(b.size, b.fused) for b in found] == [(128, "halves")] * 2


@pytest.mark.parametrize(
    ("layout", "rows"), [("", [1, 4]), ("halves", [1, 4, SIZE + 1, SIZE + 4]), ("interleaved", [2, 3, 8, 9])]
)
def test_rows_of_fused_projections(layout, rows):
    b = block(Mlp())
    b.fused = layout
    assert b.rows(mx.array([1, 4])).tolist() == rows


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Mlp, ""),
        (Normalised, "not independent"),
        (Positional, "order of its neurons"),
        (Failing, "cannot be run on its own (ValueError: needs a mask)"),
        (HalfBlind, "cannot be run on half of its neurons (ValueError: "),
        (Unused, "does not see the neurons once"),
        (Twice, "does not see the neurons once"),
    ],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_check(kind, reason, dtype):
    module = kind()
    module.set_dtype(dtype)
    own = dict(module)
    layout, found = check(block(module))
    assert layout == "" and (reason in found if reason else found == "")
    assert dict(module) == own


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_an_error_of_the_backend_is_no_reason_to_stay_dense(error, monkeypatch):
    def unsupported(*args, **kwargs):
        raise error("[ScatterAxis::eval_gpu] Does not support int64")

    model = tiny_model("llama")
    own = dict(model.layers[0].mlp)
    monkeypatch.setattr(mx, "put_along_axis", unsupported)
    with pytest.raises(error, match="Does not support int64") as caught:
        GlassModel(model)
    assert "model.layers.0.mlp" in caught.value.__notes__[0]
    assert dict(model.layers[0].mlp) == own


def test_an_adapter_is_named():
    model = tiny_model("llama")
    mlp = model.layers[0].mlp
    mlp.up_proj = LoRALinear.from_base(mlp.up_proj)
    found, dense = find_blocks(model)
    assert [b.path for b in found] == ["model.layers.1.mlp"]
    assert "adapter" in dense["model.layers.0.mlp"] and "fuse" in dense["model.layers.0.mlp"]


def test_no_block_is_an_error_that_says_why():
    model = tiny_model("llama")
    for layer in model.layers:
        layer.mlp.down_proj = LoRALinear.from_base(layer.mlp.down_proj)
    with pytest.raises(GlassError, match="llama.*model.layers.0.mlp and 1 more.*adapter"):
        GlassModel(model)


@pytest.mark.parametrize(("family", "reason"), [("mamba", "SSM"), ("dbrx", "one expert by itself")])
def test_nothing_to_prune_is_an_error(family, reason):
    with pytest.raises(GlassError, match=f"{family} has no FFN block.*{reason}"):
        GlassModel(tiny_model(family))


def test_sparse_layers_of_gemma3n_stay_dense(caplog):
    model = GlassModel(tiny_model("gemma3n"))
    assert [b.path for b in model.blocks] == ["model.language_model.layers.1.mlp"]
    assert list(model.left_dense) == ["model.language_model.layers.0.mlp"]
    assert "left dense: model.language_model.layers.0.mlp" in caplog.text
