"""Tests of memory: idle sessions give up their compact weights, and a model can decode without its dense ones."""

from __future__ import annotations

import copy
import gc
import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.utils import save_model

from glass_mlx import GlassError, GlassModel, load, stream_generate
from glass_mlx.core.slicing import ScatterLinear
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.loading import DEMO_PATH
from glass_mlx.model.blocks import CompactWeights
from glass_mlx.model.config import GlassConfig
from glass_mlx.model.memory import SessionMemory, WeightFiles, default_limit, model_bytes
from glass_mlx.model.session import Session

PROMPT = [3, 14, 15, 9, 26, 5, 35]


def holding(values: int) -> Session:
    """A session with compact weights of so many float32."""
    session = Session(GlassConfig())
    session.hold(CompactWeights([{"down_proj": nn.Linear(values, 1, bias=False)}], {}, 4 * values), 0.0)
    return session


def step(model: GlassModel, cache: list, token: int = 8) -> mx.array:
    model.select(cache)
    logits = model.decode(mx.array([[token]]), cache)
    mx.eval(logits, [entry.state for entry in cache])
    return logits


def read(model: GlassModel, prompt: list[int] = PROMPT, **config) -> list:
    cache = model.make_cache(**config)
    mx.eval(model.prefill(mx.array([prompt]), cache), [entry.state for entry in cache])
    return cache


def test_the_session_not_used_for_longest_gives_way():
    memory, (a, b, c) = SessionMemory(800), [holding(100) for _ in range(3)]
    memory.use(a)
    memory.use(b)
    assert a.compact and b.compact and memory.held() == 800
    memory.use(a)  # b has now waited for longest
    c.drop_weights()
    memory.use(c, needed=400)
    assert a.compact and b.compact is None
    c.hold(holding(100).compact, 0.0)
    assert memory.held() == 800


def test_the_session_in_use_keeps_its_weights():
    memory, session = SessionMemory(0), holding(100)
    memory.use(session)
    memory.use(session)
    assert session.compact and memory.held() == 400


def test_copies_of_a_session_count_once():
    memory, session = SessionMemory(800), holding(100)
    copies = [copy.deepcopy(session) for _ in range(4)]
    for twin in (session, *copies):
        memory.use(twin)
    assert memory.held() == 400 and all(twin.compact for twin in copies)


def test_forgotten_sessions_are_not_kept_alive():
    memory = SessionMemory(400)
    memory.use(holding(100))
    gc.collect()
    assert memory.held() == 0


def test_sessions_take_turns_within_the_limit():
    """What is made again from the kept neurons decodes as before, and memory does not grow with the sessions."""
    dense = tiny_model("llama")
    free, tight = GlassModel(dense), GlassModel(dense, max_session_memory=0)
    prompts = [[*PROMPT, i] for i in range(4)]
    ample, scarce = [read(free, p) for p in prompts], [read(tight, p) for p in prompts]
    peaks = []
    for token in (8, 97):
        for mine, theirs in zip(scarce, ample):
            assert mx.array_equal(step(tight, mine, token), step(free, theirs, token))
            peaks.append(tight.memory.held())
    assert len(set(peaks)) == 1
    assert free.memory.held() == 4 * peaks[0]
    assert sum(tight.session(cache).compact is not None for cache in scarce) == 1


def test_a_long_lived_process_does_not_grow():
    model = GlassModel(tiny_model("llama"), max_session_memory=0)
    sizes = []
    for i in range(8):
        step(model, read(model, [*PROMPT, i]))
        gc.collect()
        sizes.append(mx.get_active_memory())
    assert max(sizes[4:]) <= sizes[3]


def test_default_limit(tiny):
    model, _ = tiny
    assert model_bytes(model.dense) == sum(a.nbytes for _, a in tree_flatten(model.dense.parameters()))
    assert 0 < model.memory.limit == default_limit(model.dense)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantised model in a directory of its own: mixed precision, one down projection in groups of 32."""
    folder = tmp_path_factory.mktemp("model")
    for file in DEMO_PATH.iterdir():
        shutil.copy(file, folder / file.name)
    model, _ = load(DEMO_PATH, stats=False)
    model.dense.set_dtype(mx.float32)  # quantised products are slow in bfloat16 on a CPU

    def recipe(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": 4, "group_size": 32 if path.endswith("2.mlp.down_proj") else 64}

    nn.quantize(model.dense, class_predicate=recipe)
    (folder / "model.safetensors").unlink()
    save_model(folder, model.dense)
    config = json.loads((folder / "config.json").read_text())
    special = {"group_size": 32, "bits": 4}
    config["quantization"] = {"group_size": 64, "bits": 4, "model.layers.2.mlp.down_proj": special}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("which", ["demo", "saved"])
def test_without_dense_weights_in_memory(which, request):
    path = DEMO_PATH if which == "demo" else request.getfixturevalue("saved")
    usual, tokenizer = load(path, stats=False)  # as there is none without the weights
    said, active = {}, {}
    for name, model in (("usual", usual), ("low", load(path, stats=False, low_memory=True)[0])):
        cache, said[name] = model.make_cache(), []
        for turn in ("The ship sailed", " on. Then"):
            stream = stream_generate(model, tokenizer, turn, max_tokens=4, prompt_cache=cache)
            said[name] += [(r.token, r.logprobs.tolist()) for r in stream]
    assert said["low"] == said["usual"]
    del model, cache, stream
    gc.collect()
    model, _ = load(path, stats=False, low_memory=True)
    cache = read(model)
    before = mx.get_active_memory()
    step(model, cache)
    compact = model.session(cache).compact.projections
    gone = sum(
        a.nbytes
        for block, projections in zip(model.blocks, compact)
        for name, projection in projections.items()
        if not isinstance(projection, ScatterLinear)
        for a in block.module[name].parameters().values()
    )
    assert any(isinstance(p, ScatterLinear) for projections in compact for p in projections.values()) == (
        which == "saved"
    )
    active = mx.get_active_memory() - before
    assert active <= model.session(cache).compact_bytes - gone + 200_000  # the KV cache grew


def test_dense_weights_that_are_read_again_take_the_place_of_compact_ones(tiny_dir):
    """Of all conversations, which go on as before."""
    said = {}
    for low_memory in (False, True):
        model, _ = load(tiny_dir, stats=False, low_memory=low_memory)
        caches = [read(model), read(model)]
        model.select(caches[0])
        first = model.decode(mx.array([[7]]), caches[0])
        model.prefill(mx.array([[5, 6]]), caches[1])
        assert (model.memory.held() == 0) == low_memory
        model.select(caches[0])
        said[low_memory] = [*first.tolist(), *model.decode(mx.array([[8]]), caches[0]).tolist()]
    assert said[True] == said[False]


ON_THREADS = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import mlx.core as mx
from glass_mlx import load, stream_generate

mx.disable_compile()

def elsewhere(call, *args, **options):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *args, **options).result()

def answers(low_memory):
    model, tokenizer = load(sys.argv[1], stats=False, low_memory=low_memory)
    caches = [model.make_cache() for _ in range(2)]

    def turn(text, cache, **options):
        stream = stream_generate(model, tokenizer, text, max_tokens=4, prompt_cache=cache, **options)
        said = [response.token for response in stream]
        mx.eval([entry.state for entry in cache])  # the last step may still be running
        return said

    def step(cache):
        model.select(cache)
        return model.decode(mx.array([[8]]), cache).tolist()

    yield from (elsewhere(turn, text, cache) for text in ("The ship", " and then") for cache in caches)
    yield elsewhere(turn, " to sea", caches[0], verify=True)
    yield turn(" with a", caches[1])
    model.session(caches[1]).drop_choice()  # the next one slices weights that the other thread let go of
    yield elsewhere(step, caches[1])
    yield elsewhere(turn, " crew", caches[0], density=1.0)
    yield step(caches[1])
    yield elsewhere(lambda: model(mx.array([[3, 14, 15]])).tolist())

print(json.dumps([list(answers(low_memory)) for low_memory in (False, True)]))
"""


def test_weights_are_read_on_the_thread_that_uses_them(forked, lively_dir):
    """Conversations take turns on threads, each of which may have ended by the next turn. In a process of its own:
    checking a graph against Metal's rules ties arrays to a thread."""
    done = forked("-c", ON_THREADS, lively_dir)
    assert done.code == 0, done.err
    usual, low = json.loads(done.out)
    assert usual == low and len(usual) == 10


def test_peak_of_making_compact_weights():
    """While they are made, memory holds little beside them and the dense model."""
    model = GlassModel(tiny_model("llama"))
    cache = read(model)
    session = model.session(cache)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step(model, cache)
    assert mx.get_peak_memory() - before < 3 * session.compact_bytes + 500_000
    assert mx.get_active_memory() - before >= session.compact_bytes


def test_what_loading_changed_stays_in_memory(caplog):
    """An adapter's weights, say, are in no file: letting go of them would lose them."""
    blocks = load(DEMO_PATH, stats=False)[0].blocks
    changed = blocks[1].module.down_proj
    changed.weight = changed.weight + 1
    weight = changed.weight
    files = WeightFiles(DEMO_PATH, blocks)
    files.release(1, blocks[1], {name: nn.Identity() for name in ("gate_proj", "up_proj", "down_proj")}, files.read())
    assert changed.weight is weight and "WARNING" not in caplog.text
    WeightFiles(DEMO_PATH.parent, blocks)  # no files at all
    assert "stay there" in caplog.text


def test_low_memory_needs_files():
    with pytest.raises(GlassError, match="directory"):
        GlassModel(tiny_model("llama"), low_memory=True)


def test_a_saved_choice_that_does_not_fit_the_weights_is_made_again(tmp_path):
    """A conversation saved with the 16-bit model goes on with its 4-bit conversion, which keeps neurons in units."""
    whole, packed = tiny_model("llama"), tiny_model("llama")
    nn.quantize(packed, group_size=64, bits=4)
    model = GlassModel(whole)
    cache = read(model)
    step(model, cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    own = model.session(loaded.copy())
    assert all(mx.array_equal(a, b) for a, b in zip(own.kept, model.session(cache).kept))
    other = GlassModel(packed)
    session = other.session(loaded)
    assert session.kept is None and session.energy is not None
    step(other, loaded)
    assert [kept.size for kept in session.kept] == other.kept_counts(0.5)
