"""The chat in a terminal: messages and commands go in, answers and what they cost come out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import mlx.core as mx
from rich.console import Console

from ..cli.options import sampler_maker, verify_options
from ..cli.values import density
from ..decoding.conversation import Conversation
from ..decoding.stream import GenerationResponse, context_length
from ..errors import GlassError, printable, printable_lines
from ..group import size
from ..hub.names import near_miss
from ..loading import build_statistics
from .loading import load_for
from .messages import FENCE, line_reader, messages
from .wrap import WordWrap

QUIT = ("q", "/quit", "/exit", "quit", "exit")
HELP = f"""\
  q, /quit        leave, as /exit and Ctrl-D do
  r, /reset       forget the conversation
  h, /help        this help
  /density X      decode with this share of the FFN neurons; without X, show it
  /dense          answer the last message again with all neurons, to compare
  /measure        measure the model's global ranks: better sparse answers
  {FENCE}             begins and ends a message of several lines, as pasting does
  Ctrl-C          stop the answer and keep the conversation"""


class Chat:
    """Reads messages and commands, and prints the answers.

    On a terminal everything is seen. Otherwise standard output gets the answers only, each with a line's end, and
    standard error the rest.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.interactive = sys.stdin.isatty() and size() == 1  # of several processes all must do the same
        on_terminal = self.interactive and sys.stdout.isatty()
        self.console = Console(highlight=False, stderr=not on_terminal)
        mx.random.seed(args.seed)
        self.model, self.tokenizer = load_for(args, stats=args.stats)
        self.conversation = Conversation(self.model, self.tokenizer, args.system_prompt, args.max_kv_size)
        self.commands = {
            **dict.fromkeys(("r", "/reset"), self._reset),
            **dict.fromkeys(("h", "/help"), lambda _: self._note(HELP)),
            "/density": self._set_density,
            "/dense": self._answer_densely,
            "/measure": self._measure,
        }

    def loop(self) -> None:
        """Take messages and commands until the user leaves."""
        if self.interactive:
            sizes = sum(block.size for block in self.model.blocks)
            self._note(f"{self.args.model}: {sizes:,} FFN neurons in {len(self.model.blocks)} layers")
            self._note(HELP)
        with ThreadPoolExecutor(1) as thread:
            ahead: Future | None = None
            for message in messages(line_reader(), (lambda: None) if self.interactive else None):
                if ahead is not None:
                    wait([ahead])
                if message in QUIT:
                    return
                self._do(message)
                if self.interactive:  # while the user reads and types
                    ahead = thread.submit(self.conversation.read_ahead)

    def _do(self, message: str) -> None:
        command, _, argument = message.partition(" ")
        if command in self.commands and (command.startswith("/") or not argument):
            self.commands[command](argument.strip())
        elif command.startswith("/"):
            meant = "" if command in QUIT else near_miss(command, (*self.commands, *QUIT))
            meant = meant or "/help lists the commands"
            self._note(f"unknown command {command}; {meant}")
        else:
            self._answer(message)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self._note("conversation forgotten")

    def _set_density(self, text: str) -> None:
        session = self.conversation.session
        if text:
            try:
                session.configure(density=density(text))
            except argparse.ArgumentTypeError as e:
                self._note(str(e))
                return
        self._note(f"density {session.config.density:g}")

    def _options(self) -> dict[str, Any]:
        args = self.args
        sampler = sampler_maker(args)(
            args.temp,
            args.top_p,
            xtc_threshold=args.xtc_threshold,
            xtc_probability=args.xtc_probability,
            xtc_special_tokens=self.tokenizer.encode("\n") + list(self.tokenizer.eos_token_ids),
        )
        return {
            "sampler": sampler,
            "max_tokens": args.max_tokens,
            "prefill_step_size": args.prefill_step_size,
            **verify_options(args),
        }

    def _answer(self, text: str) -> None:
        self._show(self.conversation.reply(text, **self._options()))

    def _answer_densely(self, _: str) -> None:
        """Show how the dense model answers the last message. The conversation keeps its own answer."""
        self._show(self.conversation.answer_again(density=1.0, **self._options()))

    def _measure(self, _: str) -> None:
        """Measure the global ranks; Ctrl-C stops it, and what has been read is kept."""
        statistics = build_statistics(self.model, self.tokenizer)
        if statistics is not None:
            statistics.use_in(self.model)
            self._note("measured: from the next message on")

    def _show(self, stream: Iterator[GenerationResponse]) -> None:
        """Print an answer as it comes, then a line about its cost. Ctrl-C ends the answer, or what is piped."""
        response, drafted = None, 0
        shown = WordWrap(_write) if sys.stdout.isatty() else None
        try:
            for response in stream:
                drafted += response.from_draft
                (shown.add if shown else _write)(printable_lines(response.text))
        except KeyboardInterrupt:
            stream.close()
            if not self.interactive:
                raise
            (shown.add if shown else _write)(" [stopped]")
        except GlassError as e:
            self._note(f"error: {e}")
        if shown:
            shown.flush()
        print(flush=True)
        if response is not None:
            self._after(response, drafted)

    def _after(self, response: GenerationResponse, drafted: int) -> None:
        """What an answer cost, and what the user cannot see from it."""
        self._note(status_line(response))
        if self.args.verify:
            self._note(f"verified: {drafted / response.generation_tokens:.0%} of the tokens were drafted")
        if self.conversation.left_out:
            context = context_length(self.model, self.tokenizer, self.conversation.cache)
            self._note(
                f"the conversation is longer than the model's context of {context:,} tokens: "
                f"its first {self.conversation.left_out} messages were left out"
            )
        if response.finish_reason == "length":
            asked = response.generation_tokens == self.args.max_tokens
            why = "--max-tokens N allows more" if asked else "the model's context is full"
            self._note(f"cut at {response.generation_tokens} tokens: {why}")

    def _note(self, text: str) -> None:
        shown = printable_lines(text) if text is HELP else printable(text)
        if self.console.options.ascii_only:
            shown = shown.replace("·", "|")
        self.console.print(shown, style="dim", markup=False, soft_wrap=not self.console.is_terminal)
        self.console.file.flush()


def _write(text: str) -> None:
    print(text, end="", flush=True)


def status_line(r: GenerationResponse) -> str:
    """One line about what an answer cost."""
    speed = f"{r.generation_tps:.1f} tok/s · " if r.generation_tokens > 1 else ""  # one token is the prompt's time
    return (
        f"{r.generation_tokens} tokens · {speed}prompt {r.prompt_tps:.1f} tok/s · "
        f"density {r.density:g} ({r.kept_neurons:,} of {r.total_neurons:,} neurons) · peak {r.peak_memory:.2f} GB"
        f"{r.group and f' · {r.group}'}"
    )
