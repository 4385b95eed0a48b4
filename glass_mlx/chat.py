"""Chat with a model in the terminal.

python -m glass_mlx.chat --model mistral-7b
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

import mlx.core as mx
from mlx_lm.chat import setup_arg_parser as setup_mlx_lm_parser
from rich.console import Console

from .cli import (
    add_glass_options,
    add_verbose,
    add_verify_options,
    check_numbers,
    density,
    glass_choice,
    run,
    sampler_maker,
    verify_options,
)
from .decoding.conversation import Conversation
from .decoding.stream import GenerationResponse
from .errors import GlassError, printable, printable_lines
from .loading import DEFAULT_MODEL, load

with contextlib.suppress(ImportError):  # gives input() a history and line editing where available
    import readline  # noqa: F401

HELP = """\
  q or Ctrl-D     leave
  r               forget the conversation
  h               this help
  /density X      decode with this share of the FFN neurons, in (0, 1]; without X, show it
  /dense          answer the last message again with all neurons, to compare
  Ctrl-C          stop the answer and keep the conversation"""


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options for chat, and GLASS's."""
    parser = setup_mlx_lm_parser()
    parser.prog = "glass_mlx.chat"
    parser.description = "Chat with a model that decodes with only the FFN neurons that your prompt calls for."
    parser.set_defaults(model=DEFAULT_MODEL)
    add_glass_options(parser, build=True)
    add_verify_options(parser)
    add_verbose(parser)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.pipeline:
        parser.error("--pipeline: glass_mlx runs on one machine")
    if args.max_tokens == 0 or args.max_tokens < -1:
        parser.error("--max-tokens must be positive, or -1 for no limit")
    check_numbers(parser, args)
    run(lambda: Chat(args).loop(), args.verbose)


class Chat:
    """Reads messages and commands from the terminal, and prints the answers."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.console = Console(highlight=False)
        mx.random.seed(args.seed)
        self.model, self.tokenizer = load(
            args.model,
            adapter_path=args.adapter_path,
            trust_remote_code=args.trust_remote_code,
            **glass_choice(args),
            quality=None if args.dense else args.quality,
            stats=args.stats,
            stats_repo=args.stats_repo,
            max_session_memory=args.max_session_memory,
            low_memory=False if args.dense else args.low_memory,
            build=args.build and not args.dense and args.global_weight != 0,
        )
        self.conversation = Conversation(self.model, self.tokenizer, args.system_prompt, args.max_kv_size)

    def loop(self) -> None:
        """Read messages and commands until the user leaves."""
        sizes = sum(block.size for block in self.model.blocks)
        self._note(f"{self.args.model}: {sizes:,} FFN neurons in {len(self.model.blocks)} layers")
        print(HELP)
        while True:
            try:
                line = input(">> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                continue
            if line == "q":
                return
            if line:
                self._do(line)

    def _do(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if line == "r":
            self.conversation.reset()
            self._note("conversation forgotten")
        elif line == "h":
            print(HELP)
        elif command == "/density":
            self._set_density(argument.strip())
        elif command == "/dense":
            self._answer_densely()
        elif command.startswith("/"):
            self._note(f"unknown command {command}; h lists the commands")
        else:
            self._answer(line)

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

    def _answer_densely(self) -> None:
        """Show how the dense model answers the last message. The conversation keeps its own answer."""
        self._show(self.conversation.answer_again(density=1.0, **self._options()))

    def _show(self, stream: Any) -> None:
        """Print an answer as it comes, then a line about its cost. Ctrl-C ends the answer."""
        response = None
        try:
            for response in stream:
                print(printable_lines(response.text), end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
            print(" [stopped]", end="")
        except GlassError as e:
            self._note(f"error: {e}")
        print()
        if response is not None:
            self._note(status_line(response))

    def _note(self, text: str) -> None:
        self.console.print(printable(text), style="dim", markup=False, soft_wrap=True)
        sys.stdout.flush()


def status_line(r: GenerationResponse) -> str:
    """One line about what an answer cost."""
    return (
        f"{r.generation_tokens} tokens · {r.generation_tps:.1f} tok/s · prompt {r.prompt_tps:.1f} tok/s · "
        f"density {r.density:g} ({r.kept_neurons:,} of {r.total_neurons:,} neurons) · peak {r.peak_memory:.2f} GB"
    )


if __name__ == "__main__":
    main()
