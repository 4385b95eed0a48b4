"""Tests of the files of global ranks: their format, what is refused, which model they are of, and their index."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import examples
from global_statistics import same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models import llama
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import glass_mlx
from glass_mlx import GlassError, GlassModel, StatsError, wrap
from glass_mlx.core.importance import SIGNALS
from glass_mlx.ranks.format import GlobalStatistics, index_entry, merge, write_index
from glass_mlx.ranks.identity import describe, fingerprint, fingerprints
from glass_mlx.ranks.lookup import STATS_DIR
from glass_mlx.ranks.measure import measure_statistics
from glass_mlx.ranks.sources import given_sequences

SHARE = "response.unpredictable"

INDEX_SCHEMA = {
    "format_version": "1",
    "models": [
        {
            "file": r"[\w.-]+\.safetensors",
            "model": r"\S.*",
            "original": r"(\S+/\S+)?",
            "model_type": r"[\w-]+",
            "quantization": r".*",
            "fingerprint": r"(2-)?[0-9a-f]{32}",
        }
    ],
}


def fits(value, schema) -> bool:
    """Whether JSON has these very keys and strings that match these patterns."""
    if isinstance(schema, dict):
        return (
            isinstance(value, dict) and value.keys() == schema.keys() and all(fits(value[k], schema[k]) for k in schema)
        )
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(v, schema[0]) for v in value)
    return isinstance(value, str) and re.fullmatch(schema, value) is not None


def test_round_trip(ranks, written):
    assert same(GlobalStatistics.read(written), ranks)


@pytest.mark.parametrize("n, dtype", [(2**16 - 1, np.uint16), (2**16, np.uint32)])
def test_ranks_of_many_neurons(tmp_path, n, dtype):
    order, energy = mx.arange(n, 0, -1, dtype=mx.int64), mx.full((n,), 1 / n)
    metadata = {"format_version": "1", "sizes": json.dumps([n])}
    many = GlobalStatistics({s: [order] for s in SIGNALS}, {s: [energy] for s in SIGNALS}, metadata)
    many.write(tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["layers.0.impact.rank"].dtype == dtype
    assert same(GlobalStatistics.read(tmp_path / "x.safetensors"), many)


def test_file_format(written):
    """Design section 6."""
    tensors = load_file(written)
    responses = {name: tensors.pop(name) for name in list(tensors) if ".response." in name}
    shapes = {"input_mean": (64,), "hidden_mean": (96,), "directions": (64, 63), "coefficients": (63, 96)}
    shapes["unpredictable"] = (96,)
    assert {name: tensor.shape for name, tensor in responses.items()} == {
        f"layers.{i}.response.{name}": shape for i in range(2) for name, shape in shapes.items()
    }
    assert set(tensors) == {f"layers.{i}.{s}.{k}" for i in range(2) for s in SIGNALS for k in ("rank", "energy")}
    for name, tensor in tensors.items():
        assert tensor.shape == (96,)
        if name.endswith("rank"):
            assert tensor.dtype == np.uint16 and sorted(tensor) == list(range(1, 97))
            assert (np.diff(tensors[name.replace("rank", "energy")][np.argsort(tensor)]) <= 0).all()
        else:
            assert tensor.dtype == np.float32 and tensor.sum() == pytest.approx(1, abs=1e-5)


def test_metadata(tiny, rows, ranks):
    tokens = sum(map(len, rows))
    expected = {
        "format_version": "1",
        "model": "tiny",
        "original": "",
        "revision": "",
        "model_type": "llama",
        "quantization": "float32",
        "fingerprint": fingerprint(tiny[0]),
        "sizes": "[96, 96]",
        "blocks": '["model.layers.0.mlp", "model.layers.1.mlp"]',
        "method": "text",
        "sequences": str(len(rows)),
        "tokens": str(tokens),
        "glass_mlx": glass_mlx.__version__,
        "mlx": mx.__version__,
    }
    assert expected.items() <= ranks.metadata.items()
    assert {"mlx_lm", "stability", "stability_history", "digest"} <= ranks.metadata.keys()


def test_given_to_a_model(tiny, ranks, written):
    for given_ in (written, ranks):
        model = wrap(tiny[0].dense, stats=given_)
        assert mx.array_equal(model.global_ranks["impact"][1], ranks.ranks["impact"][1])
    assert tiny[0].global_ranks is None


@pytest.mark.parametrize("name", ["missing.safetensors", ".", "no/where"])
def test_missing_file(tmp_path, name):
    with pytest.raises(StatsError):
        GlobalStatistics.read(tmp_path / name)


def changed(written, path, tensors=(), metadata=()):
    """Write the file again with other tensors or metadata; None leaves one out."""
    with safe_open(written, framework="numpy") as f:
        old = f.metadata()
    kept = {k: v for k, v in {**load_file(written), **dict(tensors)}.items() if v is not None}
    save_file(kept, path, {k: v for k, v in {**old, **dict(metadata)}.items() if v is not None})
    return path


RANK, ENERGY = "layers.1.impact.rank", "layers.0.activation.energy"
ORDER = np.arange(1, 97, dtype=np.uint16)


@pytest.mark.parametrize(
    "name, tensor, reason",
    [
        (RANK, None, "missing"),
        (RANK, ORDER[:-1], "shape"),
        (RANK, ORDER[None], "shape"),
        (RANK, ORDER.astype(np.int32), "dtype"),
        (RANK, ORDER - 1, "not a ranking"),
        (RANK, np.maximum(ORDER, 2), "not a ranking"),
        (ENERGY, None, "missing"),
        (ENERGY, np.full(96, np.nan, np.float32), "not energies"),
        (ENERGY, np.full(96, np.inf, np.float32), "not energies"),
        (ENERGY, np.full(96, -1, np.float32), "not energies"),
        (ENERGY, np.full(96, 1 / 96), "dtype"),
    ],
)
def test_damaged_tensor(written, tmp_path, name, tensor, reason):
    path = changed(written, tmp_path / "x.safetensors", {name: tensor})
    with pytest.raises(StatsError, match=f"x.safetensors is not a usable ranks file: .*{reason}"):
        GlobalStatistics.read(path)


@pytest.mark.parametrize(
    "metadata, reason",
    [
        ({"format_version": "2"}, "format version 2, expected 1"),
        ({"format_version": None}, "format version None"),
        ({"sizes": None}, "sizes"),
        ({"sizes": "[96"}, ""),
        ({"sizes": "96"}, "sizes"),
        ({"sizes": "[96, true]"}, "sizes"),
        ({"sizes": "[96, 0]"}, "sizes"),
        ({"sizes": f"[96, {2**40}]"}, "sizes"),
        ({"sizes": "[" * 100_000}, ""),
        ({"sizes": "[96, 96, 96]"}, "layers.2"),
        ({"sizes": "[96, 97]"}, "shape"),
        ({"sizes": '["96", null]'}, "sizes"),
        ({"format_version": "\x1b[2J\n"}, "format version  "),
    ],
)
def test_damaged_metadata(written, tmp_path, metadata, reason):
    path = changed(written, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(StatsError, match=f"not a usable ranks file: .*{reason}") as caught:
        GlobalStatistics.read(path)
    assert str(caught.value).isprintable()


def test_control_characters(tiny, written, tmp_path):
    """They could play tricks with a terminal."""
    metadata = {"model": "a\x1b[2Jb\nc", "a\tb": "", "fingerprint": OTHER}
    ranks = GlobalStatistics.read(changed(written, tmp_path / "x.safetensors", metadata=metadata))
    assert ranks.metadata["model"] == "a [2Jb c" and ranks.metadata["a b"] == ""
    with pytest.raises(StatsError, match=r"for a \[2Jb c, whose"):
        ranks.check(tiny[0])


def test_control_characters_in_json(written, tmp_path):
    metadata = {"domains": r'["a\u001b[2Jb"]', "domain_tokens": "[1]"}
    ranks = GlobalStatistics.read(changed(written, tmp_path / "x.safetensors", metadata=metadata))
    assert ranks.domain_names == ["a [2Jb"]


def test_a_long_reason_is_cut(written, tmp_path):
    with pytest.raises(StatsError) as caught:
        GlobalStatistics.read(changed(written, tmp_path / "x.safetensors", metadata={"format_version": "9" * 9999}))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def read_or_refuse(path, data):
    path.write_bytes(data)
    try:
        GlobalStatistics.read(path)
    except StatsError as e:
        assert "\n" not in str(e)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


FUZZ = settings(
    max_examples=examples(20, 60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(data=st.data())
def test_fuzzed_file(written, scratch, data):
    """Random bytes in, at the start of, or instead of a file: read, or refused."""
    good = written.read_bytes()
    at = data.draw(st.integers(0, 2500) | st.integers(0, len(good)))
    piece = data.draw(st.binary(max_size=40))
    kinds = [good[:at] + piece + good[at + len(piece) :], good[:at], piece]
    read_or_refuse(scratch, data.draw(st.sampled_from(kinds)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@FUZZ
@given(
    sizes=JSON | st.lists(st.integers(0, 3), max_size=2),
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from(["U16", "F32", "BF16", "BOOL"]),
)
def test_fuzzed_header(scratch, sizes, shape, dtype):
    """Valid safetensors files with strange contents."""
    count = int(np.prod(shape)) * {"F32": 4, "BOOL": 1}.get(dtype, 2)
    header = {"__metadata__": {"format_version": "1", "sizes": json.dumps(sizes)}}
    header["layers.0.impact.rank"] = {"dtype": dtype, "shape": shape, "data_offsets": [0, count]}
    text = json.dumps(header).encode()
    read_or_refuse(scratch, len(text).to_bytes(8, "little") + text + bytes(count))


def test_huge_tensor_is_not_allocated(scratch):
    """A header may claim what it likes: a file of some bytes has no room for it."""
    header = {"__metadata__": {"format_version": "1", "sizes": "[1000000]"}}
    header["layers.0.impact.rank"] = {"dtype": "U32", "shape": [2**40], "data_offsets": [0, 2**42]}
    text = json.dumps(header).encode()
    scratch.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(StatsError):
        GlobalStatistics.read(scratch)


# Which model they are of


def altered(ranks: GlobalStatistics, **metadata) -> GlobalStatistics:
    return replace(ranks, metadata=ranks.metadata | metadata)


OTHER = "0" * 32


def test_other_model_refused(tiny, demo, ranks):
    with pytest.raises(StatsError, match="for tiny with 2 FFN layers; this model has"):
        ranks.check(demo[0])
    with pytest.raises(StatsError, match="for tiny with 95 neurons in FFN layer 1; this model has 96"):
        altered(ranks, sizes="[96, 95]").check(tiny[0])
    narrow = [replace(response, input_mean=response.input_mean[:63]) for response in ranks.responses]
    with pytest.raises(StatsError, match="with 63 inputs of FFN layer 0; this model has 64"):
        replace(ranks, responses=narrow).check(tiny[0])
    for original in ("", "owner/tiny"):
        with pytest.raises(StatsError, match="for tiny, whose weights differ"):
            wrap(tiny[0].dense, stats=altered(ranks, fingerprint=OTHER, original=original))
    assert ranks.check(tiny[0]) is ranks


def test_fingerprint_follows_weights(tiny, model_copy):
    assert fingerprint(glass_mlx.load(model_copy, stats=False)[0]) == fingerprint(tiny[0])
    weights = mx.load(str(model_copy / "model.safetensors"))
    weights["model.layers.1.mlp.down_proj.weight"] += 1e-3
    mx.save_safetensors(str(model_copy / "model.safetensors"), weights, {"format": "mlx"})
    assert fingerprint(glass_mlx.load(model_copy, stats=False)[0]) != fingerprint(tiny[0])


@pytest.mark.parametrize("changed", ["up_proj.weight", "down_proj.weight", "gate_proj.scales", "gate_proj.biases"])
def test_fingerprint_covers_every_block(changed):
    """One value, anywhere in a block in the middle, and ranks of the model that it was are refused."""
    mx.random.seed(0)
    args = llama.ModelArgs("llama", 64, 3, 96, 4, 1e-5, 32, num_key_value_heads=2)
    dense = llama.Model(args)
    nn.quantize(dense, 32, 4, class_predicate=lambda path, _: path.endswith("gate_proj"))
    model = wrap(dense, stats=False)
    ranks = measure_statistics(model, given_sequences("text", [[1, 5, 9, 2]], 4), stable_at=None)
    name, key = changed.split(".")
    array = dense.model.layers[1].mlp[name][key]
    last = mx.array(array[-1, -1])
    array[-1, -1] = last + 1
    with pytest.raises(StatsError, match="weights differ"):
        ranks.check(wrap(dense, stats=False))
    array[-1, -1] = last
    assert ranks.check(wrap(dense, stats=False)) is ranks


def test_fingerprint_reads_a_bounded_part():
    """However large the arrays are."""
    projection = nn.Linear(1, 1, bias=False)
    projection.weight = mx.broadcast_to(mx.array(0.0), (1 << 20, 1 << 14))
    block = SimpleNamespace(size=1 << 20, module={"up_proj": projection}, names=("up_proj",))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert fingerprint(SimpleNamespace(blocks=[block], part=None))
    assert mx.get_peak_memory() - before < 4 << 20


def test_older_fingerprints_are_recognised(tiny, ranks):
    now, before = fingerprints(tiny[0])
    assert now != before and ranks.metadata["fingerprint"] == now
    assert altered(ranks, fingerprint=before).check(tiny[0])


@pytest.fixture
def placed(tiny, tmp_path):
    """The random model as if it were in a directory, with a card or without."""

    def placed(directory: str, card: str | None = None):
        path = tmp_path / directory
        path.mkdir(parents=True)
        if card is not None:
            (path / "README.md").write_text(card, encoding="utf-8")
        return wrap(tiny[0].dense, stats=False, path=path)

    return placed


def cached(repo: str) -> str:
    """Where the Hub's cache has a repository."""
    return f"models--{repo.replace('/', '--')}/snapshots/abc123"


def card(base="owner/Tiny-1B", relation: str | None = None) -> str:
    more = f"base_model_relation: {relation}\n" if relation else ""
    return f"---\nlibrary_name: mlx\nbase_model: {json.dumps(base)}\n{more}---\n# A model\n"


def test_description(placed, tiny_dir, monkeypatch):
    directory = describe(placed("some/Tiny-1B"))
    assert (directory["model"], directory["revision"], directory["original"]) == ("Tiny-1B", "", "")
    hub = describe(placed(cached("owner/Tiny-1B")))
    assert (hub["model"], hub["revision"], hub["original"]) == ("owner/Tiny-1B", "abc123", "owner/Tiny-1B")
    assert describe(placed("models--not--it"))["model"] == "models--not--it"
    monkeypatch.chdir(tiny_dir)
    assert describe(glass_mlx.load(".", stats=False)[0])["model"] == "tiny"


@pytest.mark.parametrize(
    "name, card",
    [
        *(
            (f"mlx-community/Tiny-1B{end}", card())
            for end in ("", "-4bit", "-8-bit", "-bf16", "-4bit-DWQ", "-MLX-6bit")
        ),
        *((f"me/tiny-1b{end}", card()) for end in ("-mxfp4", "-q4_k_m", "_4bit-gs32", "-3.5bit", "-hf", ".fp16")),
        ("me/Tiny-1B-4bit", card(["owner/Tiny-1B"])),
        ("me/small", card(relation="quantized")),
        ("owner/Tiny-1B", None),
        ("owner/Tiny-1B", card("owner/Untuned", "finetune")),
    ],
)
def test_conversions_are_the_same_model(placed, ranks, name, card):
    theirs = altered(ranks, fingerprint=OTHER, model="owner/Tiny-1B", original="owner/Tiny-1B")
    assert theirs.check(placed(cached(name), card)) is theirs


@pytest.mark.parametrize(
    "name, card",
    [
        *(
            (f"me/Tiny-1B{end}", card())
            for end in ("-Instruct", "-Instruct-4bit", "-medical", "-4bit-medical", "5-4bit")
        ),
        *(("me/Tiny-1B-4bit", card(relation=relation)) for relation in ("finetune", "merge", "adapter")),
        ("me/Tiny-1B-4bit", card("owner/Tiny-1C")),
        ("me/Tiny-1B-4bit", card(["owner/Tiny-1B", "owner/Other"])),
        ("me/small-4bit", card()),
        ("me/Tiny-1B-4bit", None),
        ("me/Tiny-1B-4bit", "# no front matter\nbase_model: owner/Tiny-1B\n"),
        *(("me/Tiny-1B-4bit", text) for text in ("", "---\n", "---\n: [\n---\n", "---\n- 1\n---\n", "---\n\0\n---\n")),
        *(("me/Tiny-1B-4bit", card(base)) for base in ("", "/", "Tiny-1B", 3, {"a": 1}, None)),
    ],
)
def test_other_models_are_not(placed, ranks, name, card):
    theirs = altered(ranks, fingerprint=OTHER, model="owner/Tiny-1B", original="owner/Tiny-1B")
    with pytest.raises(StatsError, match="owner/Tiny-1B, whose weights differ"):
        theirs.check(placed(cached(name), card))


def test_quantised_copy(tiny_dir, placed, ranks):
    """One really quantised, which its card in a local directory tells of."""
    dense = glass_mlx.load(tiny_dir, stats=False)[0].dense
    nn.quantize(dense, group_size=32, bits=4)
    model = wrap(dense, stats=False, path=placed("Tiny-1B-4bit", card()).path)
    assert describe(model)["quantization"] == "affine 4-bit, groups of 32"
    with pytest.raises(StatsError, match="weights differ"):
        ranks.check(model)
    theirs = altered(ranks, original="owner/Tiny-1B")
    assert theirs.check(model) is theirs


# Writing


def disk_full(path, data):
    with open(path, "wb") as f:
        f.write(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_full(ranks, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "x.safetensors"
    ranks.write(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", disk_full)
        with pytest.raises(GlassError, match="Cannot write .*No space left"):
            ranks.write(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]
    ranks.write(path)


@pytest.mark.parametrize("path", ["file/x.safetensors", "file/deeper/x.safetensors", "directory"])
def test_unwritable_path(ranks, tmp_path, path):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    with pytest.raises(GlassError, match="Cannot write"):
        ranks.write(tmp_path / path)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "directory"}


# The index


def test_index(ranks, tmp_path):
    (tmp_path / "notes.txt").touch()
    assert write_index(tmp_path) == 0
    for file in ("b.safetensors", "a.safetensors"):
        altered(ranks, model=file[0]).write(tmp_path / file)
    assert write_index(tmp_path) == 2
    index = json.loads((tmp_path / "index.json").read_text())
    assert fits(index, INDEX_SCHEMA)
    assert [entry["model"] for entry in index["models"]] == ["a", "b"]
    assert index["models"][0] == index_entry("a.safetensors", altered(ranks, model="a").metadata)


def test_index_of_a_damaged_file(ranks, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x07" * 99)
    with pytest.raises(StatsError, match="x.safetensors"):
        write_index(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    "change",
    [{"file": "../x.safetensors"}, {"model": ""}, {"fingerprint": "x"}, {"original": "no slash"}, {"more": ""}],
)
def test_schema(ranks, change):
    entry = index_entry("x.safetensors", ranks.metadata)
    assert fits({"format_version": "1", "models": [entry]}, INDEX_SCHEMA)
    assert not fits({"format_version": "1", "models": [entry | change]}, INDEX_SCHEMA)
    assert not fits({"models": [entry]}, INDEX_SCHEMA)


def test_shipped_index():
    index = json.loads((STATS_DIR / "index.json").read_text())
    assert fits(index, INDEX_SCHEMA)
    assert {entry["file"] for entry in index["models"]} == {p.name for p in STATS_DIR.glob("*.safetensors")}
    for entry in index["models"]:
        assert entry == index_entry(entry["file"], GlobalStatistics.read(STATS_DIR / entry["file"]).metadata)
        tensors = load_file(STATS_DIR / entry["file"]).items()
        for name, tensor in ((name, tensor) for name, tensor in tensors if ".response." not in name):
            assert tensor.dtype in ((np.uint16, np.uint32) if name.endswith("rank") else (np.float32,))
            assert name.endswith("rank") or tensor.sum(axis=-1, dtype=float) == pytest.approx(1, abs=1e-5)


def test_shipped_ranks_of_the_demo(demo):
    assert GlobalStatistics.read(STATS_DIR / "demo.safetensors").check(demo[0]).metadata["model"] == "demo"
    assert demo[0].global_ranks is not None


def test_merge(tiny, tmp_path):
    """Every kind of text of every part, and the energies of all tokens together."""
    a, b = (measure_statistics(tiny[0], given_sequences(name, rows), stable_at=None) for name, rows in PARTS.items())
    merged, path = merge([a, b]), tmp_path / "merged.safetensors"
    merged.write(path)
    again = GlobalStatistics.read(path).check(tiny[0])
    assert again.domain_names == ["a", "b"] and again.domain_tokens == [7, 3] and again.sensitivity is not None
    whole = measure_statistics(tiny[0], given_sequences("c", [*PARTS["a"], *PARTS["b"]]), stable_at=None)
    for signal in SIGNALS:
        for got, expected in zip(again.energies[signal], whole.energies[signal], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
        for got, parts in zip(again.domains[signal], zip(a.energies[signal], b.energies[signal]), strict=True):
            assert mx.array_equal(got, mx.stack(parts))
    again.use_in(GlassModel(tiny[0].dense))
    assert merge([a]).domain_names == ["a"]
    a.metadata["fingerprint"] = "other"
    with pytest.raises(StatsError, match="different models"):
        merge([a, b])


PARTS = {"a": [[1, 5, 7, 9], [1, 3, 4]], "b": [[1, 100, 200]]}


def edited(written, tmp_path, change) -> GlobalStatistics:
    """The file with other tensors."""
    with safe_open(str(written), "numpy") as f:
        metadata = f.metadata()
    tensors = load_file(written)
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    return GlobalStatistics.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("directions", lambda a: a[:, :5], "wrong shapes"),
        ("coefficients", lambda a: a[:, 1:], "wrong shapes"),
        ("hidden_mean", lambda a: a[:-1], "wrong shapes"),
        ("directions", lambda a: a.reshape(-1), "wrong shapes"),
        ("coefficients", lambda a: a.astype(np.float32), "wrong dtype"),
        ("input_mean", lambda a: np.full_like(a, np.nan), "not finite"),
        ("directions", lambda a: np.full_like(a, np.inf), "not finite"),
    ],
)
def test_damaged_responses(written, tmp_path, name, change, reason):
    name = f"layers.1.response.{name}"
    with pytest.raises(StatsError, match=f"layers.1.response.directions .*{reason}"):
        edited(written, tmp_path, lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))}))


def test_a_response_that_is_missing(written, tmp_path):
    with pytest.raises(StatsError, match="layers.1.response.hidden_mean is missing"):
        edited(written, tmp_path, lambda tensors: tensors.pop("layers.1.response.hidden_mean"))


def test_an_older_file_has_no_unpredictable_shares(written, tmp_path):
    read = edited(written, tmp_path, lambda tensors: [tensors.pop(f"layers.{i}.{SHARE}") for i in range(2)])
    assert [response.unpredictable for response in read.responses] == [None, None]
    read.write(tmp_path / "y.safetensors")
    assert same(GlobalStatistics.read(tmp_path / "y.safetensors"), read)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda a: a[1:], "wrong shape"),
        (lambda a: a.astype(np.float32), "wrong shape or dtype"),
        (lambda a: a * np.float16(np.nan), "not from 0 to 1"),
        (lambda a: a + np.float16(1.5), "not from 0 to 1"),
        (lambda a: a - np.float16(1.5), "not from 0 to 1"),
    ],
)
def test_damaged_shares(written, tmp_path, change, reason):
    name = f"layers.1.{SHARE}"
    with pytest.raises(StatsError, match=f"{name} .*{reason}"):
        edited(written, tmp_path, lambda tensors: tensors.update({name: np.ascontiguousarray(change(tensors[name]))}))
