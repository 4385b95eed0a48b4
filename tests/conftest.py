"""Fixtures: the demo model, a cheaper random one on disk, and no network or user files in reach."""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # before anything reads them
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # else the first request of a process may ask the Hub for something more
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's: threads that wait for each other use up the time of other workers
os.environ["SSL_CERT_DIR"] = os.path.dirname(__file__)  # no server has a certificate, and each client of httpx's would
os.environ.pop("SSL_CERT_FILE", None)  # take long to read those of all authorities

import metal
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import processes
import pytest
from huggingface_hub import constants
from mlx.utils import tree_flatten
from mlx_lm.models import llama

import glass_mlx
from glass_mlx import downloads, loading
from glass_mlx.loading import DEMO_PATH
from glass_mlx.ranks import lookup, measure
from glass_mlx.ranks.format import GlobalStatistics
from glass_mlx.ranks.identity import fingerprint
from glass_mlx.ranks.lookup import STATS_DIR
from glass_mlx.ranks.sensitivity import sensitivity
from glass_mlx.ranks.sources import given_sequences
from glass_mlx.serving import catalogue

ROOT = Path(glass_mlx.__file__).parents[1]

gc.disable()  # until all tests are collected: what is imported stays

# MLX's compiler: on a CPU a first run waits for C++'s, and the rules of Metal cannot be read off compiled graphs.
mx.disable_compile()


def pytest_collection_finish():
    """What was imported stays, and collecting garbage, which some tests do often, need not look at it."""
    gc.freeze()
    gc.enable()


_thorough = False
_numbers = itertools.count()


def pytest_configure(config):
    global _thorough
    _thorough = config.getoption("--thorough")
    runs_tests = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)  # or starts workers
    if runs_tests and processes.CORES and not _thorough:
        processes.keep_to_one_core(int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))
    config.addinivalue_line("markers", "few(n): so many of its cases are enough, but for --thorough")


def examples(few: int, many: int) -> int:
    """How many examples of Hypothesis's to try; many with --thorough."""
    return many if _thorough else few


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="all cases of every test, not a few of each kind")
    parser.addoption("--no-metal-rules", action="store_true", help="let pass what MLX's Metal backend refuses")
    parser.addoption("--fuzz", type=int, default=6, help="how many damaged files of each kind to try")
    parser.addoption("--kills", type=int, help="how often to kill each kind of write")
    parser.addoption("--update-snapshots", action="store_true", help="write what snapshots hold anew")


def pytest_collection_modifyitems(config, items):
    """Without --thorough, of a test that is marked ``few(n)``: the first case, the last one, and some between."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not _thorough:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[pytest.Item] = set()
    for several in cases.values():
        few = min(several[0].get_closest_marker("few").args[0], len(several))
        left_out.update(several)
        left_out.difference_update(several[round(i)] for i in np.linspace(0, len(several) - 1, few))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def metal_rules(request):
    """Whatever Metal refuses fails (``metal.py``)."""
    if request.config.getoption("--no-metal-rules"):
        yield
    else:
        with metal.enforce():
            yield


@pytest.fixture(scope="session", autouse=True)
def tokenizers_made_once():
    """Of the same files: making a tokenizer takes longer than most tests. Each load gets a copy that it can change."""
    make, made = mlx_lm.utils._load_tokenizer, {}

    def load(path, *args, **options):
        digest = hashlib.sha1(repr((args, options)).encode())
        for file in sorted(p for p in path.iterdir() if p.is_file() and p.suffix != ".safetensors"):
            digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
        if (key := digest.digest()) not in made:
            made[key] = make(path, *args, **options)
        tokenizer = copy.copy(made[key])
        tokenizer._tokenizer, tokenizer._eos_token_ids = copy.copy(tokenizer._tokenizer), set(tokenizer._eos_token_ids)
        return tokenizer

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mlx_lm.utils, "_load_tokenizer", load)
        yield


@pytest.fixture
def cache_root(tmp_path_factory) -> Path:
    """Where a test's own caches are, if it makes any: most have no need of a directory."""
    return tmp_path_factory.getbasetemp() / f"caches-{next(_numbers)}"


@pytest.fixture(autouse=True)
def isolation(cache_root, monkeypatch):
    """No Hub, caches of the test's own, and Metal's rules held against its own graphs."""
    metal.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache_root / "hub"))
    for name in ("HF_HOME", "XDG_CACHE_HOME", "GLASS_CACHE_DIR"):
        monkeypatch.setenv(name, str(cache_root / name.lower()))
    monkeypatch.delenv("GLASS_STATS_REPO", raising=False)


@pytest.fixture(scope="module", autouse=True)
def left_alone():
    """Nor need it look at what a module's tests have imported and made for the session: late in a run, a single
    ``gc.collect()`` would take half a second."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def log_level():
    """A command may silence the package's warnings; the next test finds them on again."""
    logger = logging.getLogger("glass_mlx")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def real_demo():
    """The demo model and its tokenizer. Tests leave them as they are: what changes is in prompt caches."""
    return glass_mlx.load(DEMO_PATH, stats=STATS_DIR / "demo.safetensors")


@pytest.fixture(scope="session")
def demo(real_demo):
    """The same, but in modules that do with a smaller model in its place (``small_demo``)."""
    return real_demo


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A random two-layer Llama with the demo's tokenizer, as a directory of mlx-lm's."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_PATH / name, path)
    config = {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (path / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    weights = dict(tree_flatten(llama.Model(llama.ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return path


@pytest.fixture(scope="session")
def tiny(tiny_dir):
    """The random model, without global ranks, and its tokenizer."""
    return glass_mlx.load(tiny_dir, stats=False)


@pytest.fixture(scope="session")
def lively_dir(tiny_dir, tmp_path_factory) -> Path:
    """The random model with weights by which every block matters: what it says is not one token again and again."""
    path = shutil.copytree(tiny_dir, tmp_path_factory.mktemp("lively") / "lively")
    shapes = {name: w.shape for name, w in mx.load(str(path / "model.safetensors")).items()}
    weights = {name: mx.ones(shape) for name, shape in shapes.items() if len(shape) == 1}
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    for key, (name, shape) in zip(mx.random.split(mx.random.key(0), len(matrices)), sorted(matrices.items())):
        gain = 1 if "embed" in name else 2
        weights[name] = gain * mx.random.normal(shape, key=key) * shape[-1] ** -0.5
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return path


@pytest.fixture(scope="session")
def rows() -> list[list[int]]:
    """Token sequences of unequal length."""
    rng = np.random.default_rng(0)
    return [[1, *map(int, rng.integers(3, 4096, n))] for n in (7, 1, 12, 4, 0, 9, 3)]


@pytest.fixture(scope="session")
def ranks(tiny, rows) -> GlobalStatistics:
    """The random model's global statistics."""
    return measure.measure_statistics(tiny[0], given_sequences("text", rows, 4), stable_at=None, name="tiny")


@pytest.fixture(scope="session")
def exact(lively_dir, rows):
    """The lively model with global ranks, and its tokenizer.

    It is in float32, where it makes no difference in which pieces a text is read, and much faster than the demo."""
    model, tokenizer = glass_mlx.load(lively_dir, stats=False)
    measure.measure_statistics(model, given_sequences("text", rows, 4), stable_at=None).use_in(model)
    return model, tokenizer


@pytest.fixture(scope="session")
def talker_dir(lively_dir, tmp_path_factory) -> Path:
    """The lively model, made to end its answers after some words, as the demo does."""
    path = shutil.copytree(lively_dir, tmp_path_factory.mktemp("talker") / "talker")
    config, file, name = path / "config.json", path / "model.safetensors", "model.embed_tokens.weight"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}  # as wide as MLX can quantise
    config.write_text(json.dumps(json.loads(config.read_text()) | heads))
    weights = mx.load(str(file))
    vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    rest = mx.array([i for piece, i in vocabulary.items() if not re.fullmatch("▁[A-Za-z]+", piece)])
    weights[name][rest] *= 0.01  # it says words
    weights[name][2] = 2.5 * mx.random.normal((64,), key=mx.random.key(22)) / 8  # but not too many
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    return path


@pytest.fixture(scope="session")
def talker_ranks(talker_dir, tmp_path_factory) -> Path:
    """A directory like ``stats/``, of the talker's global statistics."""
    path = tmp_path_factory.mktemp("stats")
    model, tokenizer = glass_mlx.load(talker_dir, stats=False)
    text = given_sequences("text", [[1, *range(start, 4096, 97)] for start in (5, 6)], 2)  # as long as quality asks for
    measure.build_ranks(model, tokenizer, path / "demo.safetensors", text, stable_at=None, name="demo")
    entry = {"file": "demo.safetensors", "fingerprint": fingerprint(model)}
    (path / "index.json").write_text(json.dumps({"models": [entry]}))
    return path


@pytest.fixture(scope="module")
def small_demo(talker_dir, talker_ranks):
    """The talker in the place of the demo model, and its tokenizer: it costs a tenth, but talks nonsense."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (loading, downloads, catalogue):
            patch.setattr(module, "DEMO_PATH", talker_dir)
        patch.setattr(lookup, "STATS_DIR", talker_ranks)
        yield glass_mlx.load("demo")


@pytest.fixture(scope="session")
def written(ranks, tmp_path_factory) -> Path:
    """A file of them."""
    path = tmp_path_factory.mktemp("ranks") / "tiny.safetensors"
    ranks.write(path)
    return path


@pytest.fixture
def insensitive(monkeypatch):
    """Blocks are all as sensitive: finding out takes longest, no part of it is kept, and it is tested by itself.

    For one test each: what is measured once for all tests is measured as it is."""
    monkeypatch.setattr(measure, "sensitivity", lambda model, *_: np.ones(len(model.blocks)))


@pytest.fixture
def sensitive(insensitive, monkeypatch):
    """They are not, as in a real measuring."""
    monkeypatch.setattr(measure, "sensitivity", sensitivity)


@pytest.fixture
def small_builds(monkeypatch):
    """Ranks that are built where a model has none are measured on few tokens."""
    monkeypatch.setattr(measure, "null_prompt", partial(measure.null_prompt, sequences=4, length=8))
    monkeypatch.setattr(measure, "build_ranks", partial(measure.build_ranks, tokens=40))


@pytest.fixture
def small_steps(monkeypatch):
    """Ranks that are measured take several small steps."""
    monkeypatch.setattr(measure, "null_prompt", partial(measure.null_prompt, sequences=2, length=4))
    monkeypatch.setattr(measure, "build_ranks", partial(measure.build_ranks, tokens=30, stable_at=None))


@pytest.fixture
def model_copy(tiny_dir, tmp_path) -> Path:
    """A copy of the random model's directory, to be damaged."""
    return shutil.copytree(tiny_dir, tmp_path / "model")


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that were saved, which takes longer the more dots there are."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    figures, original = [], Figure.savefig

    def savefig(figure, *args, **options):
        figures.append(figure)
        return original(figure, *args, **options | {"dpi": 20})

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@dataclass
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def invoke(monkeypatch, capsys):
    """Run a ``main()`` in this process."""

    def invoke(main, *args) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code or 0
            if isinstance(code, str):  # what the interpreter does with a message
                print(code, file=sys.stderr)
                code = 1
        return Outcome(code, *capsys.readouterr())

    return invoke


@pytest.fixture
def python(tmp_path):
    """Run Python in a process of its own, elsewhere than in the repository."""

    def python(*args, stdin: str = "") -> Outcome:
        done = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=tmp_path,
            env=processes.environment(),
            input=stdin,
            capture_output=True,
            text=True,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return python


@pytest.fixture
def python_m(python):
    """Run ``python -m`` in a process of its own."""
    return lambda *args, stdin="": python("-m", *args, stdin=stdin)


@pytest.fixture
def forked(tmp_path):
    """Run Python in a process that is forked from one that has imported the package (``processes.py``)."""

    def forked(*args, stdin: str = "") -> Outcome:
        done = processes.run(args, tmp_path, processes.environment(), stdin)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return forked
