"""Tests of models that two processes share, against the same models in one.

What two processes do is run once, and looked at from all sides.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from launching import launch
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3_moe
from sharded_ranks import CHOICES, COUNT, NEXT, PROMPT, tokens

import glass_mlx
from glass_mlx.core.importance import dense_weight
from glass_mlx.model.blocks import by_token, hooked, run_with, watching_inputs
from glass_mlx.model.selection import BlockShape, Measured, NeuronSelector
from glass_mlx.ranks import measure
from glass_mlx.ranks.sources import given_sequences

SHARED = ("plain", "quantised", "moe")
QUANTISED = {"intermediate_size": 256, "mlp_bias": True, "attention_bias": True}
MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def livelier(model: nn.Module) -> nn.Module:
    """A model with random weights by which every block matters."""
    names = [name for name, _ in tree_flatten(model.parameters())]
    keys = dict(zip(names, mx.random.split(mx.random.key(1), len(names))))
    weights = []
    for name, array in tree_flatten(model.parameters()):
        gain = 0.3 if array.ndim == 1 else (1 if "embed" in name else 2) * array.shape[-1] ** -0.5
        values = gain * mx.random.normal(array.shape, key=keys[name])
        weights.append((name, mx.ones(array.shape) if "norm" in name else values))
    model.load_weights(weights)
    return model


def written(path: Path, like: Path, config: dict, model: nn.Module) -> None:
    """Write a model as mlx-lm does, in two files with an index."""
    shutil.copytree(like, path, ignore=shutil.ignore_patterns("*.safetensors"))
    (path / "config.json").write_text(json.dumps(config))
    weights = sorted(tree_flatten(model.parameters()))
    index = {}
    for i, part in enumerate((weights[::2], weights[1::2])):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        mx.save_safetensors(str(path / name), dict(part), metadata={"format": "mlx"})
        index |= {key: name for key, _ in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture(scope="module")
def directory(lively_dir, tmp_path_factory) -> Path:
    """Three models: a plain one; a quantised one with biases, where one down projection stays whole; one with routed
    experts."""
    path = tmp_path_factory.mktemp("sharded")
    shutil.copytree(lively_dir, path / "plain")
    config = json.loads((lively_dir / "config.json").read_text()) | QUANTISED
    dense = livelier(llama.Model(llama.ModelArgs.from_dict(config)))
    usual, large, in_units = (
        {"group_size": 32, "bits": 4},
        {"group_size": 64, "bits": 4},
        "model.layers.0.mlp.down_proj",
    )
    nn.quantize(dense, **large, class_predicate=lambda name, _: name == in_units)
    nn.quantize(dense, **usual, class_predicate=lambda _, module: hasattr(module, "to_quantized"))
    quantization = {**usual, in_units: large}
    written(path / "quantised", lively_dir, config | {"quantization": quantization}, dense)
    written(path / "moe", lively_dir, MOE, livelier(qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(MOE))))
    return path


@pytest.fixture(scope="module")
def alone(directory, rows):
    """The models in one process, by name, with the statistics that are also in the cache of the processes that share
    them; with its tokenizer."""

    @cache
    def alone(name: str):
        model, tokenizer = glass_mlx.load(directory / name, stats=False)
        statistics = measure.measure_statistics(model, given_sequences("text", rows, 4), stable_at=None)
        uneven = [1.0 + 3 * (i % 2) for i in range(len(model.blocks))]
        statistics = replace(statistics, sensitivity=uneven)
        (directory / "cache").mkdir(exist_ok=True)
        statistics.write(directory / "cache" / f"{statistics.metadata['fingerprint']}.safetensors")
        statistics.use_in(model)
        return model, tokenizer

    return alone


@pytest.fixture(scope="module")
def seen(directory, alone) -> list[dict]:
    """What the two processes saw."""
    for name in SHARED:
        alone(name)
    program = Path(__file__).with_name("sharded_ranks.py")
    ended = launch(directory, program, directory, GLASS_CACHE_DIR=str(directory / "cache"))
    said = [line for process in ended for line in process.err.splitlines() if "[ring]" not in line]
    assert [process.code for process in ended] == [0, 0], "\n".join(said)
    return [json.loads((directory / f"rank-{rank}.json").read_text()) | {"out": ended[rank].out} for rank in (0, 1)]


WAYS = [*SHARED, "pipeline"]


@pytest.mark.parametrize("way", WAYS)
def test_the_processes_say_the_same(seen, way):
    """Though one is five times faster than the other, and drops weights whenever it can."""
    ours, theirs = seen[0][way], seen[1][way]
    for name in ("dense", "verified", "drafted", "sampled", "turns"):
        assert ours[name] == theirs[name], name
    for name in CHOICES:
        assert ours["steps"][name]["logits"] == theirs["steps"][name]["logits"], name
    assert seen[0]["talk"] == seen[1]["talk"] and len(seen[0]["talk"]) == 6


@pytest.mark.parametrize("way", WAYS)
def test_density_1_and_verified_decoding_are_the_whole_model(seen, alone, way):
    model, tokenizer = alone("moe" if way == "pipeline" else way)
    assert seen[0][way]["dense"] == tokens(model, tokenizer, density=1.0)
    assert seen[0][way]["drafted"] == seen[0][way]["dense"] == seen[0][way]["verified"][:COUNT]


@pytest.mark.parametrize("way", WAYS)
def test_global_ranks_of_the_whole_model_are_found(seen, alone, way):
    model, _ = alone("moe" if way == "pipeline" else way)
    for own in (seen[0][way], seen[1][way]):
        assert own["found"] and not own["left_dense"]
    if way == "pipeline":
        assert [*seen[1][way]["sizes"], *seen[0][way]["sizes"]] == [block.path for block in model.blocks]
    else:
        sizes = {block.path: block.size // 2 for block in model.blocks}
        assert seen[0][way]["sizes"] == sizes == seen[1][way]["sizes"]


class Recorded:
    """What the whole model's blocks see of the prompt, token by token, and of the next token.

    Attributes:
        hidden: of each block hidden vectors [tokens, a, F / E] with the experts [tokens, a] that they belong to.
        inputs: of each block inputs [tokens, H].
    """

    def __init__(self, model):
        self.hidden, self.inputs = {}, {}

        def show(i, h, experts=None):
            rows = np.array(h, np.float64).reshape(len(PROMPT), -1, h.shape[-1])
            of = np.zeros(rows.shape[:2], int) if experts is None else np.array(experts).reshape(rows.shape[:2])
            self.hidden[i] = rows, of

        def show_input(i, x, *routing):
            if not routing:
                self.inputs[i] = np.array(x, np.float64).reshape(len(PROMPT), -1)

        replaced = by_token(model.blocks, show) | watching_inputs(model.blocks, show_input)
        self.cache = model.dense.make_cache() if hasattr(model.dense, "make_cache") else None
        self.cache = self.cache or model.make_cache()[:-1]
        mx.eval(run_with(replaced, model.dense, mx.array([PROMPT]), cache=self.cache))


def norms(block) -> np.ndarray:
    """Output-weight norms by expert, [E, F / E]."""
    weight = np.array(dense_weight(block.module[block.output]).astype(mx.float32), np.float64)
    return np.linalg.norm(weight, axis=-2).reshape(block.experts or 1, -1)


def parts(way: str, rank: int, block, number: int) -> list[int] | None:
    """The neurons of the whole block that a rank has; None if it has not the block."""
    if way == "pipeline":
        return list(range(block.size)) if (number >= 2) == (rank == 0) else None
    each = np.arange(block.size).reshape(block.experts or 1, -1)
    half = each.shape[1] // 2
    return each[:, rank * half : (rank + 1) * half].reshape(-1).tolist()


def shard_energy(recorded, block, i: int, own: list[int], signal: str) -> mx.array:
    """The energies of a shard's neurons after the prompt, from the whole model's hidden vectors."""
    experts = block.experts or 1
    scale = norms(block) if signal == "impact" else np.ones((experts, block.width))
    mine = np.isin(np.arange(block.size), own).reshape(experts, -1)
    energy = np.zeros((experts, block.width))
    for rows, of in zip(*recorded.hidden[i]):
        for h, e in zip(rows, of):
            squares = np.where(mine[e], (h * scale[e]) ** 2, 0)
            energy[e] += squares / max(squares.sum(), 1e-12) / block.active
    return mx.array(energy[mine].astype(np.float32))


def expected_choice(model, recorded, way: str, rank: int, choice: dict) -> dict[str, list[int]]:
    """What a process should keep: the choice of the whole model's statistics and hidden vectors, cut to its part."""
    config = model.config.updated(density=0.5, **choice)
    known = {i: own for i, block in enumerate(model.blocks) if (own := parts(way, rank, block, i)) is not None}
    times = 1 if way == "pipeline" else 2
    whole, shapes, domains, ranks, energies = [], [], {}, {}, []
    measured = model._plan.selector.measured
    for i, block in enumerate(model.blocks):
        # a block of half the size may be cut in other steps
        step = block.step
        whole.append(BlockShape(block.size, 1, times * step, block.experts or 1, block.active))
        if i in known:
            size = len(known[i])
            shapes.append(BlockShape(size, block.group, step, block.experts or 1, block.active))
            energies.append(shard_energy(recorded, block, i, known[i], config.signal))
    for signal, rows in measured.domains.items():
        cut = [rows[i][:, mx.array(own)] for i, own in known.items()]
        domains[signal] = [c / mx.sum(c, axis=-1, keepdims=True) for c in cut]
        order = [np.array(measured.ranks[signal][i])[own] for i, own in known.items()]
        within = [o.reshape(model.blocks[i].experts or 1, -1) for o, i in zip(order, known)]
        ranks[signal] = [mx.array(w.argsort(axis=1).argsort(axis=1).reshape(-1) + 1) for w in within]
    counted = NeuronSelector(whole, measured)
    counts = [counted.counts(config)[i] // times for i in known]
    lost = [getattr(r, "unpredictable", None) for r in model.responses]
    lost = [None if lost[i] is None else lost[i][mx.array(own)] for i, own in known.items()]
    own = NeuronSelector(shapes, Measured(ranks, domains, unpredictable=lost), lambda config: counts)
    kept = own.choose(config, mx.concatenate(energies), len(PROMPT))
    return {model.blocks[i].path: k.tolist() for i, k in zip(known, kept)}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("way", WAYS)
def test_each_process_keeps_what_the_whole_model_would_of_its_part(seen, alone, way, choice):
    model, _ = alone("moe" if way == "pipeline" else way)
    recorded = Recorded(model)
    for rank in (0, 1):
        expected = expected_choice(model, recorded, way, rank, CHOICES[choice])
        assert seen[rank][way]["steps"][choice]["kept"] == expected
    if way != "pipeline":  # so none waits for another
        counts = [[len(kept) for kept in own[way]["steps"][choice]["kept"].values()] for own in seen]
        assert counts[0] == counts[1]
        assert len(set(counts[0])) > 1 or choice == "published" or way == "moe"


def masked_logits(model, recorded, way: str, kept: list[dict], compensation: bool) -> np.ndarray:
    """What the whole model says to the next token if the hidden values of dropped neurons are zero, or what answers for
    them: computed without a compact matrix."""
    masks, predicted, inputs = [], [], {}
    for i, block in enumerate(model.blocks):
        mask = np.zeros(block.size, bool)
        for rank, own in enumerate(kept):
            neurons = parts(way, rank, block, i)
            if neurons is not None:
                mask[np.array(neurons)[own[block.path]]] = True
        masks.append(mask)
        predicted.append(prediction(model, recorded, i) if compensation else None)

    def watch(i, x, *routing):
        inputs[i] = np.array(x, np.float64).reshape(-1, x.shape[-1])[0]  # experts all see the token's

    def mask(i, h, *of):
        other = np.zeros(model.blocks[i].size) if predicted[i] is None else predicted[i](inputs[i])
        kept, other = (model.blocks[i].beside(mx.array(values), *of) for values in (masks[i], other.astype(np.float32)))
        return mx.where(kept, h, other)

    replaced = hooked(model.blocks, mask) | watching_inputs(model.blocks, watch)
    return np.array(run_with(replaced, model.dense, mx.array([[NEXT]]), cache=recorded.cache)[0, -1])


def prediction(model, recorded, i: int):
    """The hidden vector that follows from an input, by the model's statistics and the prompt (``compensation.py``)."""
    response = model.responses[i]
    mu, mean, directions, coefficients = (
        np.array(getattr(response, name).astype(mx.float32), np.float64)
        for name in ("input_mean", "hidden_mean", "directions", "coefficients")
    )

    def predict(x):
        return mean + (x - mu) @ directions @ coefficients

    if model.blocks[i].experts:
        return predict
    rows, x = recorded.hidden[i][0][1:, 0], recorded.inputs[i][1:]  # without BOS
    e = (rows.sum(0) - len(rows) * predict(x.mean(0))) / (len(rows) + 64)
    return lambda x: predict(x) + e


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("way", WAYS)
def test_sparse_decoding_is_masked_dense(seen, alone, way, choice):
    """Also where dropped neurons are answered for: once, not once by every process."""
    model, _ = alone("moe" if way == "pipeline" else way)
    steps = [own[way]["steps"][choice] for own in seen]
    compensated = CHOICES[choice].get("compensation", True)
    expected = masked_logits(model, Recorded(model), way, [step["kept"] for step in steps], compensated)
    got = np.array(steps[0]["logits"])
    assert np.abs(got - expected).max() < 2e-3 * np.abs(expected).max()
    plain = np.array(seen[0][way]["steps"]["uncompensated"]["logits"])
    assert (np.abs(got - plain).max() > 1e-2 * np.abs(plain).max()) == (choice != "uncompensated")


def test_one_process_speaks(seen, alone):
    """The commands print what the whole model says, once."""
    model, tokenizer = alone("plain")
    said, measured = map(json.loads, seen[0]["out"].splitlines())
    assert len(said["tokens"]) == 5 and said["kept_neurons"] == sum(model.kept_counts(0.5))
    assert measured["group"]["of"] == "2 ranks, tensor parallel"
    assert measured["group"]["exchanges"] == {"AllReduce": 2 * len(model.blocks)}
    for own in measured["group"]["ranks"]:
        assert own["ceiling"]["0.5"] == own["dense_bytes"] / own["bytes"]["0.5"]
    assert seen[1]["out"] == ""


@pytest.mark.parametrize("way", WAYS)
def test_responses_say_that_the_model_is_shared(seen, alone, way):
    """And count the neurons of all processes."""
    model, _ = alone("moe" if way == "pipeline" else way)
    kept, total, group = seen[0][way]["described"]
    assert seen[1][way]["described"] == [kept, total, group]
    assert total == sum(block.size for block in model.blocks)
    assert kept == sum(len(k) for own in seen for k in own[way]["steps"]["default"]["kept"].values())
    assert group == f"2 ranks, {'pipeline' if way == 'pipeline' else 'tensor'} parallel"


def test_what_only_whole_models_can(seen):
    low_memory, unknown = seen[1]["refusals"]
    assert "whole model" in low_memory and "Unknown model 'nothing'" in unknown
