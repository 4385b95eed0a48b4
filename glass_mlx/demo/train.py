"""Train the embedded demo model from text.

    pip install 'glass_mlx[train]'
    python -m glass_mlx.demo.train --prose prose.txt.xz --dialogues dialogues.jsonl.xz --out my-model

The prose file holds one paragraph a line and a blank line between books; the dialogues file holds one
``{"messages": [{"role", "content"}, ...]}`` a line. The result is a Llama in the mlx-lm directory format, or with
``--experts`` a Mixtral, whose experts share out the neurons of the Llama that ``--init`` names. PyTorch is used because
its CPU kernels train several times faster than MLX's.

The learning rate follows the elapsed time, so a run takes ``--minutes`` on any machine. It writes a checkpoint
every few minutes; the same command with ``--resume`` goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import lzma
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

try:
    import torch
    from safetensors.torch import load_file, save

    from glass_mlx.demo.torch_model import Config, Model, grow, split_into_experts
except ImportError:  # main() asks for it; what makes rows of texts does without
    torch = None

DEFAULT_TOKENIZER = Path(__file__).parent / "model"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
HELD_OUT_EVERY = 60  # one book in so many is kept for the held-out loss


def read_text(path: Path) -> str:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as f:
        return f.read()


def book_rows(ids: np.ndarray, newline: int, bos: int, length: int) -> Iterator[np.ndarray]:
    """Cut one book into rows of ``length`` tokens: BOS, then text that starts at a paragraph where it can."""
    starts = np.flatnonzero(ids == newline) + 1
    at, body = 0, length - 1
    while at + body <= len(ids):
        yield np.concatenate(([bos], ids[at : at + body]))
        later = starts[(starts > at + body // 2) & (starts <= at + body)]
        at = int(later[-1]) if len(later) else at + body


def dialogue_tokens(path: Path, tokenizer_dir: Path, tokenizer) -> list[np.ndarray]:
    """Each dialogue through the chat template, as it will be rendered when chatting."""
    import jinja2

    template = jinja2.Template((tokenizer_dir / "chat_template.jinja").read_text())
    texts = [
        template.render(messages=json.loads(line)["messages"], bos_token="<s>", eos_token="</s>")
        for line in read_text(path).splitlines()
    ]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(e.ids, np.uint16) for e in encoded]


def prepare(args, tokenizer) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Tokenise once, cached in the output directory: training rows of prose and of dialogues (uint16,
    [rows, context + 1]) and the token lists of the held-out books' first paragraphs."""
    cache, length = args.out / "tokens.npz", args.context + 1
    made_of = json.dumps([length, *((p.name, p.stat().st_size) for p in (args.prose, args.dialogues))])
    if cache.exists():
        with np.load(cache) as z:
            if str(z["made_of"]) == made_of:
                held = np.split(z["held"], z["held_at"])
                return z["prose"], z["dialogues"], held
    newline = tokenizer.encode("\n", add_special_tokens=False).ids[-1]
    bos = tokenizer.token_to_id("<s>")
    rows, held = [], []
    books = read_text(args.prose).split("\n\n")
    print(f"tokenising {len(books)} books ...", flush=True)
    for n in range(0, len(books), 8):
        encoded = tokenizer.encode_batch(books[n : n + 8], add_special_tokens=False)
        for i, e in enumerate(encoded, n):
            if i % HELD_OUT_EVERY == 0:
                for paragraph in [p for p in books[i].split("\n") if len(p) > 200][20:40]:
                    ids = tokenizer.encode(paragraph, add_special_tokens=False).ids
                    held.append(np.array([bos, *ids][:length], np.uint16))
            else:
                rows.extend(book_rows(np.array(e.ids, np.uint16), newline, bos, length))
    flat = np.concatenate([[], *dialogue_tokens(args.dialogues, args.tokenizer, tokenizer)]).astype(np.uint16)
    if not rows or not held or len(flat) < length:
        sys.exit(
            f"error: too little text: {len(rows)} rows of prose and {len(flat) // length} of dialogues, "
            f"{len(held)} held-out paragraphs (of one book in {HELD_OUT_EVERY}, the first among them)"
        )
    prose = np.stack(rows).astype(np.uint16)
    dialogues = flat[: len(flat) // length * length].reshape(-1, length)
    np.savez(
        cache,
        made_of=made_of,
        prose=prose,
        dialogues=dialogues,
        held=np.concatenate(held),
        held_at=np.cumsum([len(h) for h in held])[:-1],
    )
    return prose, dialogues, held


def nats_per_byte(model: Model, sequences: list[np.ndarray], tokenizer) -> float:
    """Held-out loss: the summed negative log likelihood over the bytes of the predicted text."""
    nats = bytes_ = 0.0
    for ids in sequences:
        with torch.no_grad():
            tokens = torch.from_numpy(ids.astype(np.int64))[None].to(model.norm.weight.device)
            nats += model.loss(tokens, reduction="sum").item()
        text = tokenizer.decode(ids[1:].tolist(), skip_special_tokens=True)
        bytes_ += len(text.encode())
    return nats / bytes_


def export(model: Model, out: Path, tokenizer_dir: Path) -> None:
    """Write the mlx-lm model directory, bfloat16 weights; complete or not at all."""
    tensors = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.published().items()}
    (out / "model.tmp").write_bytes(save(tensors, metadata={"format": "mlx"}))
    (out / "model.tmp").replace(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(model.c.to_json(), indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).exists() and not (out / name).exists():
            shutil.copy(tokenizer_dir / name, out / name)


def make_model(args, vocab_size: int) -> Model:
    config = Config(vocab_size=vocab_size, num_hidden_layers=args.layers)
    if args.experts:
        config.num_local_experts, config.num_experts_per_tok = args.experts, args.active
        config.intermediate_size = args.expert_width
    model = Model(config)
    if args.init:
        weights = load_file(args.init / "model.safetensors")
        weights = grow({k.removeprefix("model."): v.float() for k, v in weights.items()}, args.layers)
        if args.experts:
            weights = split_into_experts(weights, config)
        model.load_state_dict(weights, strict=not args.experts)  # a dense checkpoint has no routers
    return model


def make_optimizers(model: Model, args) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks but their routers, AdamW for the rest. In float32, AdamW for all: PyTorch's
    Muon computes in bfloat16."""
    matrices = [p for name, p in model.layers.named_parameters() if p.ndim == 2 and "mlp.gate." not in name]
    muon = [] if args.float32 else matrices
    rest = [p for p in model.parameters() if not any(p is m for m in muon)]
    optimizers = [torch.optim.AdamW(rest, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=args.muon_lr, momentum=0.95, weight_decay=0.01))
    return optimizers


def batch_at(step: int, prose: np.ndarray, dialogues: np.ndarray, args) -> np.ndarray:
    """The rows of a step, [batch_size, context + 1] int64: a resumed run goes on in the same order. Prose is read
    epoch by epoch, each in an order of its own; dialogues are drawn with replacement."""
    talks = max(1, round(args.batch_size * args.dialogue_share))
    n = args.batch_size - talks
    order = _epoch_order(args.seed, step * n // len(prose), len(prose))
    rows = order[np.arange(step * n, step * n + n) % len(prose)]
    drawn = np.random.default_rng((args.seed, step)).integers(len(dialogues), size=talks)
    return np.concatenate([prose[rows], dialogues[drawn]]).astype(np.int64)


@functools.lru_cache(maxsize=1)
def _epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng((seed, 1 + epoch)).permutation(rows)


def schedule(progress: float) -> float:
    """Learning-rate factor at ``progress`` in [0, 1]: 2 % warm-up, then linear to 2 %."""
    return min(1.0, progress / 0.02 + 0.01) * (1 - 0.98 * min(progress, 1.0))


class Training:
    """A model in training: how far it is, and what it is saved as.

    Attributes:
        step: how many batches it has read.
        elapsed: seconds that this took.
    """

    def __init__(self, model: Model, optimizers: list[torch.optim.Optimizer], args: argparse.Namespace):
        self.model, self.optimizers, self.args = model, optimizers, args
        self.step, self.elapsed, self.average = 0, 0.0, None
        self.checkpoint = args.out / "checkpoint.pt"
        self._peak = [[group["lr"] for group in o.param_groups] for o in optimizers]
        self._loss = self._forward if args.no_compile else torch.compile(self._forward)

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"]):
                optimizer.load_state_dict(state)
            self.step, self.elapsed = saved["step"], saved["elapsed"]

    def save(self) -> None:
        """Write the checkpoint and the mlx-lm model."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "elapsed": self.elapsed,
        }
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)
        export(self.model, self.args.out, self.args.tokenizer)

    def run(self, batches: Callable[[int], np.ndarray], steps: int) -> None:
        """Train for so many steps, or until the time is over, and print how it went."""
        tic, before, args = time.perf_counter(), self.step, self.args
        done = self.elapsed
        while self.step < before + steps and done < args.minutes * 60:
            self._train(batches(self.step), schedule(done / (args.minutes * 60)))
            done = self.elapsed + time.perf_counter() - tic
        tokens = args.batch_size * args.context
        speed = (self.step - before) * tokens / (done - self.elapsed)
        self.elapsed = done
        print(
            f"step {self.step}  {done / 60:.1f}/{args.minutes:g} min  {self.step * tokens / 1e6:.1f} M tokens  "
            f"loss {self.average:.4f} nats/token  {speed:,.0f} tokens/s",
            flush=True,
        )

    def _train(self, batch: np.ndarray, factor: float) -> None:
        """One step on rows [batch, context + 1], with this factor of the learning rates."""
        for optimizer, rates in zip(self.optimizers, self._peak):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
        loss = self._loss(torch.from_numpy(batch).to(self.model.norm.weight.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average = loss.item() if self.average is None else 0.98 * self.average + 0.02 * loss.item()
        if not math.isfinite(self.average):
            sys.exit(f"The loss is {self.average} at step {self.step}: lower --muon-lr or --adam-lr.")

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=not self.args.float32):
            return self.model.loss(tokens) + self.args.balance * self.model.balance()


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--prose", type=Path, required=True, help="one paragraph a line (.txt, .xz)")
    parser.add_argument("--dialogues", type=Path, required=True, help="messages as JSON lines")
    parser.add_argument("--dialogues-dev", type=Path, help="held-out dialogues")
    parser.add_argument("--out", type=Path, required=True, help="model and checkpoint directory")
    parser.add_argument("--init", type=Path, help="start from this Llama checkpoint, deepened")
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_TOKENIZER)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=0, help="routed experts a layer (a Mixtral); default: a Llama")
    parser.add_argument("--active", type=int, default=2, help="experts that read a token")
    parser.add_argument("--expert-width", type=int, default=256, help="neurons of one expert")
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the experts' load-balancing loss")
    parser.add_argument("--minutes", type=float, default=120, help="training time")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dialogue-share", type=float, default=0.15)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-minutes", type=float, default=10)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--float32", action="store_true", help="faster on CPUs that have no bfloat16; all with AdamW")
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    if torch is None:
        sys.exit("error: training needs PyTorch: pip install 'glass_mlx[train]'")
    from tokenizers import Tokenizer

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    prose, dialogues, held = prepare(args, tokenizer)
    held_out = {"prose": held}
    if args.dialogues_dev:
        dev = dialogue_tokens(args.dialogues_dev, args.tokenizer, tokenizer)[:40]
        held_out["dialogues"] = [d[: args.context + 1] for d in dev]
    model = make_model(args, tokenizer.get_vocab_size())
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    training = Training(model, make_optimizers(model, args), args)
    if args.resume:
        training.restore()

    def print_held_out(when: str) -> None:
        scores = {name: nats_per_byte(model, texts, tokenizer) for name, texts in held_out.items()}
        print(f"held-out nats per byte{when}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()), flush=True)

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {prose.size / 1e6:.1f} M prose tokens, "
          f"{dialogues.size / 1e6:.1f} M dialogue tokens", flush=True)  # fmt: skip
    print_held_out(" before")
    total, next_eval = args.minutes * 60, training.elapsed + args.eval_minutes * 60
    while training.elapsed < total:
        training.run(lambda step: batch_at(step, prose, dialogues, args), steps=50)
        if training.elapsed >= min(next_eval, total):
            next_eval = training.elapsed + args.eval_minutes * 60
            training.save()
            print_held_out("")


if __name__ == "__main__":
    main()
