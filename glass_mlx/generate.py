"""Generate text with GLASS, as mlx-lm's functions of the same names do.

python -m glass_mlx.generate --prompt "The old house stood"
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import setup_arg_parser as setup_mlx_lm_parser

from .cli import (
    add_glass_options,
    add_verify_options,
    check_numbers,
    glass_choice,
    run,
    sampler_maker,
    template_args,
    verify_options,
)
from .decoding.prompt import render
from .decoding.stream import GenerationResponse, statistics, stream_generate
from .errors import GlassError, printable_lines
from .loading import DEFAULT_MODEL, load
from .model.glass_model import GlassModel
from .model.saved_cache import UnusableCache, read_prompt_cache


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options for generate, and GLASS's."""
    parser = setup_mlx_lm_parser()
    parser.prog = "glass_mlx.generate"
    parser.description = "Generate text on the FFN neurons that the prompt calls for."
    # an explicit --verbose True also shows tracebacks
    parser.set_defaults(model=DEFAULT_MODEL, verbose=None)
    add_glass_options(parser, build=False)
    add_verify_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.image:
        parser.error("--image: glass_mlx generates from text only")
    if args.max_tokens == 0 or args.max_tokens < -1:
        parser.error("--max-tokens must be positive, or -1 for no limit")
    check_numbers(parser, args)
    if args.draft_model and args.prompt_cache_file:
        parser.error("--draft-model cannot be used with --prompt-cache-file")
    try:
        template = template_args(args.chat_template_config or "{}")
    except argparse.ArgumentTypeError as e:
        parser.error(f"argument --chat-template-config: {e}")
    run(lambda: _generate(args, template), args.verbose is True)


def _generate(args: argparse.Namespace, template: dict[str, Any]) -> None:
    if args.seed is not None:
        mx.random.seed(args.seed)
    cached = _read_cache(args.prompt_cache_file) if args.prompt_cache_file else None
    model, tokenizer = load(
        args.model,
        adapter_path=args.adapter_path,
        model_config={"quantize_activations": args.quantize_activations},
        trust_remote_code=args.trust_remote_code,
        **glass_choice(args),
        quality=None if args.dense else args.quality,
        stats=False if args.dense and not args.stats else args.stats,
        stats_repo=args.stats_repo,
        max_session_memory=args.max_session_memory,
        low_memory=False if args.dense else args.low_memory,
        build=args.build and args.global_weight != 0,
    )
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    options = _options(args, model, tokenizer, cached)
    prompt = _prompt(args, tokenizer, template, after_cache=cached is not None)
    decorated = args.verbose is not False and not args.json
    if decorated:
        print("=" * 10)
    used: nn.Module = model.dense if args.dense else model
    text, tokens, response = "", [], None
    shown = printable_lines if sys.stdout.isatty() else str  # files and pipes get it as it is
    try:
        for response in stream_generate(used, tokenizer, prompt, args.max_tokens, **options):
            text += response.text
            tokens.append(response.token)
            if not args.json:
                print(shown(response.text), end="", flush=True)
    except (ValueError, RuntimeError) as e:  # options of mlx-lm's that the model, or the prompt cache, cannot have
        raise GlassError(f"mlx-lm cannot generate with these options: {str(e).splitlines()[0]}") from e
    if args.json:
        print(json.dumps(_as_json(text, tokens, response)))
    elif decorated:
        print("\n" + "=" * 10)
        print(statistics(response))
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
    try:
        return read_prompt_cache(path)
    except UnusableCache as e:
        raise GlassError(f"{path} is not a usable prompt cache: {e.reason}") from e


def _with_session(path: str, cached: list[Any], model: GlassModel) -> list[Any]:
    try:
        return model.add_session(cached)
    except UnusableCache as e:
        raise GlassError(f"{path} is not a usable prompt cache: {e.reason}") from e


def _prompt(args: argparse.Namespace, tokenizer: Any, template: dict[str, Any], after_cache: bool) -> list[int]:
    """The prompt's tokens; after a prompt cache, as in mlx-lm, only what the template has from the user's text on."""
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


def _as_json(text: str, tokens: list[int], r: GenerationResponse) -> dict[str, Any]:
    return {
        "text": text,
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
