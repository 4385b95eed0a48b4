"""Tests of the bundled model and of the parts of its training script that need no PyTorch."""

from __future__ import annotations

import json
import lzma
import py_compile
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model, load_tokenizer

from glass_mlx.demo import train
from glass_mlx.loading import DEMO_PATH

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hello "},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
]
RENDERED = "<s><|user|> Be brief.<|user|> Hello<|assistant|> Hi!</s><|user|> Bye"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_PATH)


def test_files():
    files = {path.name: path.stat().st_size for path in DEMO_PATH.iterdir()}
    assert {"README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert sum(files.values()) < 20e6


def test_card():
    card = (DEMO_PATH / "README.md").read_text(encoding="utf-8").lower()
    for word in ("prose", "dialogues", "cc by-sa 4.0", "licen"):
        assert word in card, word


def test_weights_match_config():
    config = json.loads((DEMO_PATH / "config.json").read_text())
    weights = mx.load(str(DEMO_PATH / "model.safetensors"))
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    assert len(layers) == config["num_hidden_layers"]
    assert weights["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    for weight in weights.values():
        assert mx.isfinite(weight).all()


def test_bos(tokenizer):
    assert tokenizer.encode("Hello")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.parametrize("text", ["The old house.", "naïve — “quoted”", "日本語 🙂", "two\n\nparagraphs", "  spaces  "])
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)).strip() == text.strip()


@pytest.mark.parametrize("prompting", [True, False])
def test_chat_template(tokenizer, prompting):
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=prompting, tokenize=False)
    assert text == RENDERED + "<|assistant|>" * prompting
    tokens = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=prompting)
    assert tokens.count(1) == 1 and tokens.count(2) == 1
    assert tokenizer.decode(tokens) == text


def test_it_talks(demo):
    model, tokenizer = demo
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "I want to find a restaurant in San Jose."}])
    logits = model(mx.array([prompt]))[0, -1].astype(mx.float32)
    assert mx.isfinite(logits).all() and mx.argmax(logits).item() == tokenizer.encode("<|assistant|>")[-1]


# The training script


def test_script_compiles(tmp_path):
    py_compile.compile(train.__file__, cfile=tmp_path / "train.pyc", doraise=True)


def test_script_without_torch(invoke, monkeypatch):
    assert invoke(train.main, "--help").out.startswith("usage:")
    monkeypatch.setattr(train, "torch", None)
    done = invoke(train.main, "--prose", "x", "--dialogues", "x", "--out", "x")
    assert done.code == 1 and "pip install" in done.err


def test_schedule():
    rates = [train.schedule(x) for x in np.linspace(0, 1, 501)]
    peak = int(np.argmax(rates))
    assert rates[0] == pytest.approx(0.01) and rates[-1] == pytest.approx(0.02)
    assert 0.01 < peak / 500 < 0.03 and 0.95 < max(rates) <= 1
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) < 0).all()
    assert train.schedule(1.5) == train.schedule(1)


NEWLINE, BOS = 7, 1


@pytest.mark.parametrize("length", [8, 33])
@pytest.mark.parametrize("paragraph", [3, 11, 1000])
def test_book_rows(length, paragraph):
    """Rows are stretches of the book that leave nothing out, and start paragraphs where they can."""
    ids = np.arange(100, 700)
    ids[paragraph::paragraph] = NEWLINE
    rows = list(train.book_rows(ids, NEWLINE, BOS, length))
    seen = np.zeros(len(ids), bool)
    position = {id_: i for i, id_ in enumerate(ids) if id_ != NEWLINE}
    for n, row in enumerate(rows):
        start = next(position[id_] - i for i, id_ in enumerate(row[1:]) if id_ != NEWLINE)
        assert len(row) == length and row[0] == BOS
        assert (row[1:] == ids[start : start + length - 1]).all()
        seen[start : start + length - 1] = True
        if n and paragraph < length // 2:
            assert ids[start - 1] == NEWLINE
    assert seen[: len(ids) - length].all()


def test_short_book():
    assert list(train.book_rows(np.arange(5), NEWLINE, BOS, 8)) == []


@pytest.mark.parametrize("name", ["x.txt", "x.txt.xz"])
def test_read_text(tmp_path, name):
    data = "Ärger\n".encode()
    (tmp_path / name).write_bytes(lzma.compress(data) if name.endswith("xz") else data)
    assert train.read_text(tmp_path / name) == "Ärger\n"


@pytest.fixture
def corpus(tmp_path, tokenizer):
    """Arguments and tokenizer for ``prepare``: three books, a dialogue."""
    book = "\n".join(f"{i} and the old house stood at the end of the street." * 5 for i in range(25))
    (tmp_path / "prose.txt").write_text("\n\n".join([book] * 3))
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    paths = {"prose": tmp_path / "prose.txt", "dialogues": tmp_path / "talk.jsonl"}
    args = SimpleNamespace(**paths, out=tmp_path, tokenizer=DEMO_PATH, context=16)
    return args, tokenizer._tokenizer.backend_tokenizer


def test_prepare(corpus):
    args, _ = corpus
    prose, dialogues, held = train.prepare(*corpus)
    assert prose.shape[1] == dialogues.shape[1] == 17 and prose.dtype == dialogues.dtype == np.uint16
    assert (prose[:, 0] == BOS).all() and len(dialogues) == 1
    assert len(held) == 5 and {len(h) for h in held} == {17}
    text = args.prose.read_text()
    args.prose.write_text("x" * len(text))  # the second time, what was tokenised is read
    again = train.prepare(*corpus)
    assert (again[0] == prose).all() and (again[1] == dialogues).all()
    assert all((a == b).all() for a, b in zip(again[2], held, strict=True))
    args.prose.write_text(text * 2)  # another file is tokenised anew
    assert len(train.prepare(*corpus)[0]) != len(prose)


@pytest.mark.parametrize("name", ["prose.txt", "talk.jsonl"])
def test_too_little_text(corpus, tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(SystemExit, match="too little text"):
        train.prepare(*corpus)


def test_dialogues_are_rendered_as_in_chat(tmp_path, tokenizer):
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    [tokens] = train.dialogue_tokens(tmp_path / "talk.jsonl", DEMO_PATH, tokenizer._tokenizer.backend_tokenizer)
    assert tokens.tolist() == tokenizer.apply_chat_template(MESSAGES)


def test_batches_are_the_same_after_a_resumption_and_read_each_row_once_an_epoch():
    prose, talk = np.arange(20)[:, None] * np.ones((1, 3), int), -np.ones((4, 3), int)
    args = SimpleNamespace(batch_size=6, dialogue_share=0.15, seed=5)
    read = [train.batch_at(step, prose, talk, args) for step in range(8)]
    assert all((batch[-1] == -1).all() and batch.shape == (6, 3) for batch in read)
    for epoch in (read[:4], read[4:]):
        assert sorted(np.concatenate([batch[:5, 0] for batch in epoch])) == list(range(20))
    assert any((a != b).any() for a, b in zip(read[:4], read[4:]))
    assert all((train.batch_at(step, prose, talk, args) == read[step]).all() for step in (7, 0, 3))


# The model in PyTorch

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def random_model(torch, **fields):
    """A small model in PyTorch with weights that bfloat16 can hold."""
    from glass_mlx.demo.torch_model import Config, Model

    torch.manual_seed(0)
    model = Model(Config(**SMALL, **fields))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
        weight.data = weight.data.bfloat16().float()
    return model


@pytest.mark.parametrize("fields", [{}, {"num_local_experts": 4, "num_experts_per_tok": 2}], ids=["llama", "mixtral"])
def test_what_is_exported_computes_the_same_in_mlx_lm(torch, fields, tmp_path):
    model, tokens = random_model(torch, **fields), np.random.default_rng(0).integers(64, size=(2, 40))
    train.export(model, tmp_path, DEMO_PATH)
    exported, config = load_model(tmp_path)
    exported.set_dtype(mx.float32)
    assert config["model_type"] == ("mixtral" if fields else "llama")
    ours = model(torch.from_numpy(tokens)).detach().numpy()
    np.testing.assert_allclose(np.array(exported(mx.array(tokens))), ours, atol=1e-5)


def test_experts_of_a_dense_model(torch):
    """Experts with all the neurons of a dense FFN, weighed alike, add up to as many times its output as are active."""
    from glass_mlx.demo.torch_model import Config, Model, split_into_experts

    dense = random_model(torch)
    config = Config(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    routed = Model(config)
    routed.load_state_dict(split_into_experts(dense.state_dict(), config), strict=False)
    x = torch.randn(1, 20, 32)
    for layer, own in zip(dense.layers, routed.layers):
        torch.nn.init.zeros_(own.mlp.gate.weight)
        np.testing.assert_allclose(own.mlp(x).detach().numpy(), 2 * layer.mlp(x).detach().numpy(), atol=1e-5)


def test_balance(torch):
    """The load-balancing loss is 1 where all experts get the same, and more where they do not."""
    model = random_model(torch, num_local_experts=4, num_experts_per_tok=2)
    model.loss(torch.arange(60)[None])
    assert model.balance() > 1.0
    for layer in model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    model.loss(torch.arange(60)[None])
    assert float(model.balance()) == pytest.approx(1, abs=1e-6)
    assert float(random_model(torch).balance()) == 0


def test_training_goes_on_where_it_stopped(torch, tmp_path):
    rows = np.random.default_rng(0).integers(64, size=(4, 17))

    def training():
        args = SimpleNamespace(out=tmp_path, tokenizer=DEMO_PATH, no_compile=True, float32=True, adam_lr=1e-3)
        vars(args).update(minutes=1e6, balance=0.01, batch_size=4, context=16)
        model = random_model(torch, num_local_experts=4, num_experts_per_tok=2)
        return train.Training(model, train.make_optimizers(model, args), args)

    whole, first = training(), training()
    whole.run(lambda step: rows, 4)
    first.run(lambda step: rows, 2)
    first.save()
    rest = training()
    rest.restore()
    rest.run(lambda step: rows, 2)
    assert rest.step == whole.step == 4
    for a, b in zip(whole.model.parameters(), rest.model.parameters()):
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), atol=1e-4)
