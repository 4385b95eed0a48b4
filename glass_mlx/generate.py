"""Generate text with GLASS, as mlx-lm's functions of the same names do.

python -m glass_mlx.generate --prompt "The old house stood"
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from .cli import checks
from .cli.options import (
    add_generation_options,
    add_glass_options,
    add_verify_options,
    sampler_maker,
    verify_options,
)
from .cli.output import say
from .cli.parser import Parser
from .cli.running import run
from .cli.values import template_args, text
from .errors import GlassError, printable_lines
from .group import PIPELINE, together

if TYPE_CHECKING:
    from .decoding.stream import GenerationResponse
    from .model.glass_model import GlassModel

IDLE = (
    checks.Idle("verify prompt_cache_file", beside="draft_model", refused=True),
    *checks.GLASS,
    checks.DENSE,
    checks.Idle("density quality build", beside="dense draft_model"),
    checks.Idle(f"{checks.CHOICE} verify draft_tokens", beside="dense draft_model density=1"),
    checks.Idle("build", beside="global_weight=0 density=1"),
    checks.VERIFY,
    checks.Idle("num_draft_tokens", without="draft_model"),
    *checks.SAMPLING,
    checks.Idle("top_k min_p min_tokens_to_keep", without="temp"),
    checks.Idle("min_tokens_to_keep", without="min_p"),
    checks.KV,
    checks.Idle("max_kv_size", beside="draft_model prompt_cache_file"),
    checks.Idle("system_prompt prefill_response chat_template_config", beside="ignore_chat_template"),
    checks.Idle("system_prompt", beside="prompt_cache_file"),
)


def _yes(argument: str) -> bool:
    """mlx-lm's rule for ``--verbose``."""
    return argument.lower() not in ("false", "f")


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options for generate, and GLASS's."""
    parser = Parser(
        "glass_mlx.generate", description="Generate text with only the FFN neurons that the prompt calls for."
    )
    add_generation_options(parser, max_tokens=100, seed=None)
    add = parser.add_argument
    add("--prompt", "-p", type=text, default="hello", metavar="TEXT", help="the prompt; -: read it from standard input")
    add("--prefill-response", type=text, metavar="TEXT", help="beginning of the answer, for the model to continue")
    add("--ignore-chat-template", action="store_true", help="continue the prompt as plain text, rather than answer it")
    add("--use-default-chat-template", action="store_true", help="no effect: tokenizers no longer have one")
    add("--chat-template-config", metavar="JSON", help="arguments of the chat template, as a JSON object")
    add("--extra-eos-token", default=(), nargs="+", metavar="TOKEN", help="further tokens that end an answer")
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="drop tokens less likely than this share of the likeliest; 0: off",
    )
    add("--min-tokens-to-keep", type=int, default=1, metavar="N", help="with --min-p: keep at least N tokens")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens; 0: from all")
    add("--prompt-cache-file", metavar="FILE", help="prompt cache to go on from, as written by mlx_lm.cache_prompt")
    add("--kv-bits", type=int, metavar="N", help="quantise the KV cache to N bits (default: not quantised)")
    add("--kv-group-size", type=int, default=64, metavar="N", help="with --kv-bits: group size")
    add("--quantized-kv-start", type=int, default=5000, metavar="N", help="with --kv-bits: quantise from this token on")
    add(
        "--quantize-activations",
        "-qa",
        action="store_true",
        help="quantise activations like the weights that they are multiplied with",
    )
    add("--draft-model", metavar="MODEL", help="another model that drafts for this one, which then answers densely")
    add("--num-draft-tokens", type=int, default=3, metavar="K", help="with --draft-model: draft K tokens at a time")
    add("--pipeline", action="store_true", help=PIPELINE)
    add("--image", default=(), nargs="+", metavar="FILE", help="not supported: text only")
    # None: an explicit True also shows tracebacks
    add("--verbose", type=_yes, metavar="BOOL", help="print figures after the answer; False: only the answer")
    add_glass_options(parser, build=False)
    add_verify_options(parser)
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.image:
        parser.error("--image: glass_mlx generates from text only")
    checks.check_numbers(parser, args)
    checks.check_together(parser, args, IDLE)
    try:
        template = template_args(args.chat_template_config) if args.chat_template_config else {}
    except argparse.ArgumentTypeError as e:
        parser.error(f"argument --chat-template-config: {e}")
    run(together(lambda: _generate(args, template)), args.verbose is True)


def _generate(args: argparse.Namespace, template: dict[str, Any]) -> None:
    from .decoding.stream import statistics, stream_generate
    from .terminal.loading import load_for

    if args.seed is not None:
        mx.random.seed(args.seed)
    cached = _read_cache(args.prompt_cache_file) if args.prompt_cache_file else None
    model, tokenizer = load_for(
        args,
        stats=False if args.dense and not args.stats else args.stats,
        model_config={"quantize_activations": args.quantize_activations},
    )
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    options = _options(args, model, tokenizer, cached)
    prompt = _prompt(args, tokenizer, template, after_cache=cached is not None)
    decorated = args.verbose is not False and not args.json
    if decorated:
        print("=" * 10)
    used: nn.Module = model.dense if args.dense else model
    answer, tokens, drafted, response = "", [], 0, None
    shown = printable_lines if sys.stdout.isatty() else str  # files and pipes get it as it is
    try:
        for response in stream_generate(used, tokenizer, prompt, args.max_tokens, **options):
            answer += response.text
            tokens.append(response.token)
            drafted += response.from_draft
            if not args.json:
                print(shown(response.text), end="", flush=True)
    except (ValueError, RuntimeError) as e:  # options of mlx-lm's that the model, or the prompt cache, cannot have
        raise GlassError(f"mlx-lm cannot generate with these options: {str(e).splitlines()[0]}") from e
    if args.json:
        print(json.dumps(_as_json(answer, tokens, response)))
    elif decorated:
        print("\n" + "=" * 10)
        say(statistics(response))
        if args.verify or args.draft_model:
            print(f"Drafted: {drafted / len(tokens):.0%} of the tokens")
    else:
        print()


def _options(args: argparse.Namespace, model: GlassModel, tokenizer: Any, cached: list[Any] | None) -> dict[str, Any]:
    """Arguments of ``stream_generate`` besides the prompt."""
    options = {"max_kv_size": args.max_kv_size, "prefill_step_size": args.prefill_step_size}
    options["sampler"] = sampler_maker(args)(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    if args.draft_model:
        from .loading import load

        draft, draft_tokenizer = load(args.draft_model, stats=False)
        if draft_tokenizer.vocab_size != tokenizer.vocab_size:
            raise GlassError(f"{args.draft_model} cannot draft for {args.model}: their vocabularies differ.")
        options |= {"draft_model": draft.dense, "num_draft_tokens": args.num_draft_tokens}
    if cached is not None:
        cache = _with_session(args.prompt_cache_file, cached, model)
        options["prompt_cache"] = cache[:-1] if args.dense else cache
    if args.kv_bits is not None:
        options |= {"kv_bits": args.kv_bits, "kv_group_size": args.kv_group_size}
        options["quantized_kv_start"] = args.quantized_kv_start
    return options if args.dense else options | verify_options(args)


def _read_cache(path: str) -> list[Any]:
    from .model.saved_cache import UnusableCache, read_prompt_cache

    try:
        return read_prompt_cache(path)
    except UnusableCache as e:
        raise GlassError(f"{path} is not a usable prompt cache: {e.reason}") from e


def _with_session(path: str, cached: list[Any], model: GlassModel) -> list[Any]:
    from .model.saved_cache import UnusableCache

    try:
        return model.add_session(cached)
    except UnusableCache as e:
        raise GlassError(f"{path} is not a usable prompt cache: {e.reason}") from e


def _prompt(args: argparse.Namespace, tokenizer: Any, template: dict[str, Any], after_cache: bool) -> list[int]:
    """The prompt's tokens; after a prompt cache, as in mlx-lm, only what the template has from the user's text on."""
    from .decoding.prompt import render

    prompt = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if prompt == "-":
        prompt = sys.stdin.read()
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return tokenizer.encode(prompt, add_special_tokens=not after_cache)
    prefilled = args.prefill_response is not None

    def rendered(text: str, **options: Any) -> Any:
        messages = [{"role": "user", "content": text}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        if prefilled:
            messages.append({"role": "assistant", "content": args.prefill_response})
        options |= {"continue_final_message": prefilled, "add_generation_prompt": not prefilled}
        return render(tokenizer, messages, **options, **template)

    if not after_cache:
        return rendered(prompt)
    start = rendered("<query>", tokenize=False).index("<query>")
    return tokenizer.encode(rendered(prompt, tokenize=False)[start:], add_special_tokens=False)


def _as_json(answer: str, tokens: list[int], r: GenerationResponse) -> dict[str, Any]:
    return {
        "text": answer,
        "tokens": tokens,
        "prompt_tokens": r.prompt_tokens,
        "generation_tokens": r.generation_tokens,
        "prompt_tps": r.prompt_tps,
        "generation_tps": r.generation_tps,
        "peak_memory": r.peak_memory,
        "density": r.density,
        "kept_neurons": r.kept_neurons,
        "global_weight": r.global_weight,
        "signal": r.signal,
        "finish_reason": r.finish_reason,
    }


if __name__ == "__main__":
    main()
