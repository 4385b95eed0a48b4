"""Tests of loading: names, errors in one line, options, adapters."""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import pytest
from huggingface_hub import errors as hub_errors
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from glass_mlx import GlassConfig, GlassError, GlassModel, StatsError, loading
from glass_mlx.evaluation.tiny_models import tiny_config, tiny_model
from glass_mlx.loading import ALIASES, DEMO_PATH, load, resolve_model, wrap
from glass_mlx.model.quality import QUALITIES, density_for
from glass_mlx.ranks.format import write_index
from glass_mlx.ranks.lookup import STATS_DIR


def _error(function, *args, **kwargs) -> str:
    """The one line of the GlassError that a call ends with."""
    with pytest.raises(GlassError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def _logits(model, tokens=(1, 40, 300, 7)) -> mx.array:
    return model(mx.array([tokens]))


@pytest.mark.parametrize("alias, repo", ALIASES.items())
def test_aliases(alias, repo):
    assert re.fullmatch(r"mlx-community/[\w.-]+", repo)
    assert "/" not in alias and alias == alias.lower()


def test_resolve_local(tiny_dir):
    assert resolve_model("demo") == DEMO_PATH
    assert resolve_model(tiny_dir) == resolve_model(str(tiny_dir)) == tiny_dir


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "./nowhere", "/no/where", "~/nowhere"])
def test_unknown_name(name):
    message = _error(resolve_model, name)
    assert repr(name) in message and "mistral-7b" in message


def test_no_model_directory(tmp_path):
    assert "config.json" in _error(resolve_model, tmp_path)
    (tmp_path / "file").touch()
    assert "is a file" in _error(resolve_model, tmp_path / "file")


def test_hub_offline():
    assert "mlx-community/Qwen3-4B-4bit is not in the local cache" in _error(resolve_model, "qwen3-4b")
    assert "'own er/na me' is not a Hub repository" in _error(resolve_model, "own er/na me")


def _hub_error(kind, status):
    response = SimpleNamespace(status_code=status, headers={}, request=None, reason_phrase="why")
    return kind("many\n\nlines", response=response)


@pytest.mark.parametrize(
    "error, told",
    [
        (_hub_error(hub_errors.GatedRepoError, 403), "owner/name is gated"),
        (_hub_error(hub_errors.RepositoryNotFoundError, 404), "no repository owner/name"),
        (_hub_error(hub_errors.RevisionNotFoundError, 404), "no revision 'abc'"),
        (_hub_error(hub_errors.HfHubHTTPError, 500), "500 why"),
        (hub_errors.LocalEntryNotFoundError("no entry\nat all"), "no entry"),
        (ConnectionError("no route"), "no route"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_hub_errors(monkeypatch, error, told):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(loading, "snapshot_download", fail)
    assert told in _error(load, "owner/name", revision="abc")


def test_hub_download(monkeypatch, tiny_dir):
    asked = []
    monkeypatch.setattr(loading, "snapshot_download", lambda repo, **options: asked.append((repo, options)) or tiny_dir)
    model, _ = load("qwen3-4b", revision="abc", stats=False)
    assert model.path == tiny_dir
    [(repo, options)] = asked
    assert repo == ALIASES["qwen3-4b"] and options["revision"] == "abc"


@pytest.mark.parametrize("model_type", ["clip_vision_model", "bert", "cache", "base", None, 3])
def test_unsupported_model_type(model_copy, model_type):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    assert str(model_copy) in _error(load, model_copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"\xff{]" * 400])
def test_damaged_file(model_copy, name, damage):
    file = model_copy / name
    file.write_bytes(damage(file.read_bytes()))
    assert str(model_copy) in _error(load, model_copy)


def test_missing_files(model_copy):
    for file in model_copy.glob("token*"):
        file.unlink()
    assert "tokenizer" in _error(load, model_copy)
    (model_copy / "model.safetensors").unlink()
    assert "no weights" in _error(load, model_copy)


def test_weights_of_another_shape(model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    assert "shape" in _error(load, model_copy)


@pytest.mark.parametrize(
    "option",
    [
        *({"density": d} for d in (0, -0.5, 1.5, "x", float("nan"), True)),
        *({"global_weight": w} for w in (-0.1, 1.1, "x", float("nan"))),
        *({"signal": s} for s in ("x", "")),
    ],
)
def test_bad_choice(demo, option):
    [name] = option
    assert name in _error(load, **option)
    assert name in _error(wrap, demo[0].dense, **option)


def test_load():
    model, tokenizer, config = load(return_config=True, density=0.25, global_weight=0.7, signal="activation")
    assert isinstance(model, GlassModel) and config["model_type"] == "llama"
    assert model.config == GlassConfig(0.25, 0.7, "activation")
    assert model.path == DEMO_PATH
    assert tokenizer.has_chat_template


def test_wrap(demo, caplog):
    dense, _ = mlx_lm.load(str(DEMO_PATH))
    before = _logits(dense)
    model = wrap(dense, density=0.3)
    assert model.dense is dense and model.config.density == 0.3
    assert not caplog.records
    for a, b in zip(model.global_ranks["impact"], demo[0].global_ranks["impact"], strict=True):
        assert mx.array_equal(a, b)
    assert mx.array_equal(_logits(dense), before)


@pytest.mark.parametrize(
    "options, warnings",
    [({}, 1), ({"stats": False}, 0), ({"global_weight": 0}, 0), ({"density": 1.0}, 0)],
)
def test_no_ranks_warning(tiny_dir, caplog, options, warnings):
    with caplog.at_level(logging.WARNING):
        model, _ = load(tiny_dir, **options)
    assert model.global_ranks is None
    assert len(caplog.records) == warnings
    for record in caplog.records:
        assert str(tiny_dir) in record.message and "\n" not in record.message


def test_build(tiny_dir, small_builds, caplog, capsys):
    """Ranks are measured once, and then found."""
    model, _ = load(tiny_dir, build=True)
    assert model.global_ranks is not None and "measuring them, once" in caplog.text
    caplog.clear()
    again, _ = load(tiny_dir, build=True)
    for a, b in zip(model.global_ranks["impact"], again.global_ranks["impact"], strict=True):
        assert mx.array_equal(a, b)
    assert not caplog.records
    assert load(tiny_dir, stats=False, build=True)[0].global_ranks is None


def test_stats_repo(tiny_dir, written, monkeypatch):
    """The Hub repository is asked for its index, then for the file in it."""
    write_index(written.parent)
    asked = []

    def download(repo, file, revision):
        asked.append((repo, file, revision))
        return written.parent / file

    monkeypatch.setattr("glass_mlx.hub.access.download", download)
    model, _ = load(tiny_dir, stats_repo="me/ranks@abc")
    assert model.global_ranks is not None
    assert asked == [("me/ranks", "index.json", "abc"), ("me/ranks", written.name, "abc")]


def test_stats_of_another_model(tiny_dir):
    file = STATS_DIR / "demo.safetensors"
    with pytest.raises(StatsError, match="FFN layers"):
        load(tiny_dir, stats=file)
    with pytest.raises(StatsError, match="no ranks file"):
        load(tiny_dir, stats="missing.safetensors")


@pytest.fixture
def adapter(tiny_dir, tmp_path):
    """A LoRA adapter of the random model that changes its outputs."""
    config = {"num_layers": 2, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0}}
    model, _ = mlx_lm.load(str(tiny_dir))
    model.freeze()
    linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
    mx.random.seed(3)
    weights = {name: 0.1 * mx.random.normal(p.shape) for name, p in tree_flatten(model.trainable_parameters())}
    path = tmp_path / "adapter"
    path.mkdir()
    mx.save_safetensors(str(path / "adapters.safetensors"), weights)
    (path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora"} | config))
    return path


def test_adapter(tiny_dir, tiny, adapter):
    model, _ = load(tiny_dir, adapter_path=str(adapter), stats=False)
    expected, _ = mlx_lm.load(str(tiny_dir), adapter_path=str(adapter))
    assert not any("lora" in name for name, _ in tree_flatten(model.parameters()))
    assert mx.allclose(_logits(model), _logits(expected), atol=1e-4)
    assert not mx.allclose(_logits(model), _logits(tiny[0]), atol=1e-2)


@pytest.mark.parametrize("config", ["{}", "{", '{"num_layers": 2, "lora_parameters": {}}'])
def test_bad_adapter(tiny_dir, adapter, config):
    (adapter / "adapter_config.json").write_text(config)
    _error(load, tiny_dir, adapter_path=str(adapter))
    assert "adapter" in _error(load, tiny_dir, adapter_path="/no/adapter")


def test_density_by_quality():
    model, _ = load("demo", quality="balanced")
    assert model.config.density == density_for("balanced", model.quality) < 1
    assert load("demo", quality="high")[0].config.density > model.config.density
    with pytest.raises(GlassError, match="is not known"):
        load("demo", stats=False, quality="fast")


def test_a_density_that_costs_much_is_said(caplog, monkeypatch):
    monkeypatch.setitem(QUALITIES, "fast", 0.01)
    load("demo", density=0.9)
    assert not caplog.text
    load("demo", density=0.3)
    assert "density 0.3 costs this model more" in caplog.text


def test_what_dense_experts_leave_is_said(model_copy, caplog):
    (model_copy / "config.json").write_text(json.dumps(tiny_config("mixtral")))
    weights = dict(tree_flatten(tiny_model("mixtral").parameters()))
    mx.save_safetensors(str(model_copy / "model.safetensors"), weights)
    load(model_copy, stats=False)
    (said,) = (record.getMessage() for record in caplog.records)
    assert re.match(r"routed experts stay dense; with --experts sparse a token would read [1-9]\d? % less", said)
    caplog.clear()
    load(model_copy, stats=False, experts="sparse")
    load(model_copy, stats=False, density=1.0)
    assert not caplog.records


def test_wrapped_already(tiny):
    """The same model, or what to do instead."""
    assert wrap(tiny[0]) is tiny[0]
    for choice in ({"density": 0.3}, {"config": GlassConfig()}, {"stats": False}, {"path": "x"}):
        assert "wrapped already" in _error(wrap, tiny[0], **choice)
    assert "wrapped already" in _error(GlassModel, tiny[0])


def test_no_model_to_wrap(tiny):
    assert "wrap takes a model" in _error(wrap, tiny[1])
    assert "the first of what mlx_lm.load returns" in _error(wrap, (tiny[0].dense, tiny[1]))
    assert "wrap takes loaded models" in _error(load, tiny[0].dense)


@pytest.mark.parametrize(
    "name, close",
    [
        *(("Qwen3-4", "qwen3-4b"), ("mistral7b", "mistral-7b"), ("demmo", "demo")),
        ("mlx-community/Qwen3-4B-4bitt", "mlx-community/Qwen3-4B-4bit"),
    ],
)
def test_near_misses(name, close):
    assert re.search(rf"[Dd]id you mean [^?]*{re.escape(close)}", _error(resolve_model, name))
    assert "you mean" not in _error(resolve_model, "qwen3-4b")  # known, but not here
