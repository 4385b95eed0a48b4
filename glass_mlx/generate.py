"""Generate text with GLASS, as mlx-lm's functions of the same names do.

python -m glass_mlx.generate --prompt "The old house stood"
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from jinja2 import TemplateError
from mlx_lm.generate import GenerationResponse as DenseResponse
from mlx_lm.generate import setup_arg_parser as setup_mlx_lm_parser
from mlx_lm.generate import stream_generate as stream_dense
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .cli import add_glass_options, add_verify_options, run, sampler_maker, verify_options
from .errors import GlassError
from .loading import DEFAULT_MODEL, load
from .model import GlassModel
from .verify import stream_verified


@dataclass
class GenerationResponse(DenseResponse):
    """mlx-lm's response, and how GLASS decoded it.

    Attributes:
        density (float): share of the FFN neurons asked for; 1.0 is the dense model.
        kept_neurons (int): FFN neurons decoded with, over all layers.
        total_neurons (int): FFN neurons of these layers.
        global_weight (float): weight that the global ranks had in the choice.
        signal (str): what the neurons were ranked by.
    """

    density: float = 1.0
    kept_neurons: int = 0
    total_neurons: int = 0
    global_weight: float = 0.0
    signal: str = ""


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | mx.array | list[int],
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    *,
    density: float | None = None,
    global_weight: float | str | None = None,
    signal: str | None = None,
    allocation: str | None = None,
    refresh: int | str | None = None,
    verify: bool = False,
    draft_tokens: int | None = None,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    **kwargs: Any,
) -> Iterator[GenerationResponse]:
    """Generate text as ``mlx_lm.stream_generate`` does, with the same arguments, decoding sparsely.

    The prompt is prefilled densely to its last token; then the neurons are chosen, and every further token is
    decoded on their weights. With a prompt cache of an earlier turn the evidence of both turns counts.
    A plain mlx-lm model is passed on to mlx-lm as it is.

    Args:
        model (nn.Module): a GlassModel.
        tokenizer: its tokenizer.
        prompt: text or tokens.
        max_tokens (int): at most so many tokens; -1 for no limit.
        draft_model (nn.Module, optional): for mlx-lm's speculative decoding, which verifies several tokens at
            once, and those run dense: the result is the dense model's.
        density, global_weight, signal, allocation, refresh: where this and later answers of the conversation differ
            from the model's configuration (:class:`glass_mlx.GlassConfig`).
        verify (bool): draft sparsely and check with the dense model, whose answer it then is; see ``verify.py``.
        draft_tokens (int, optional): draft always so many before they are checked. Default: as many as pay.
        prompt_cache (list, optional): from ``model.make_cache()``; updated in place.
        max_kv_size (int, optional): for a new cache, as in mlx-lm.
        kwargs: the remaining options of mlx-lm's ``generate_step``.

    Yields:
        GenerationResponse: a piece of text and what mlx-lm and GLASS say of it.

    Raises:
        GlassError: an argument is out of range, or the prompt is empty.
    """
    choice = {"density": density, "global_weight": global_weight, "signal": signal}
    choice |= {"allocation": allocation, "refresh": refresh}
    if isinstance(prompt, str):
        prompt = encode(tokenizer, prompt)
    prompt = prompt if isinstance(prompt, mx.array) else mx.array(prompt, dtype=mx.int32)
    if prompt.size == 0 and kwargs.get("input_embeddings") is None:
        raise GlassError("The prompt is empty: it has no tokens.")
    if draft_model is not None and any(v is not None for v in (prompt_cache, *choice.values())):
        raise GlassError(
            "With a draft model, start a new conversation at the model's own density: "
            f"give neither prompt_cache nor {', '.join(choice)}."
        )
    if verify and (draft_model is not None or not isinstance(model, GlassModel)):
        raise GlassError("To verify needs a GlassModel, and no draft model: it drafts by itself.")
    session = None
    if isinstance(model, GlassModel) and draft_model is None:
        if prompt_cache is None:
            prompt_cache = model.make_cache(max_kv_size)
        session = model.session(prompt_cache)
        session.configure(**choice)
        embedded = kwargs.get("input_embeddings")
        session.begin_prompt(prompt.size if embedded is None else embedded.shape[0])
        kwargs["prompt_cache"] = prompt_cache
    else:
        kwargs.update(max_kv_size=max_kv_size)
        if prompt_cache is not None:
            kwargs["prompt_cache"] = prompt_cache
    said = None
    if verify and session.config.density < 1:
        if kwargs.pop("input_embeddings", None) is not None:
            raise GlassError("Verified decoding does not take input embeddings.")
        if not isinstance(tokenizer, TokenizerWrapper):
            tokenizer = TokenizerWrapper(tokenizer)
        responses = stream_verified(model, tokenizer, prompt, max_tokens, draft_tokens=draft_tokens, **kwargs)
    else:
        responses = stream_dense(model, tokenizer, prompt, max_tokens, draft_model, **kwargs)
    for response in responses:
        said = said or _describe(model, session)  # after the prompt, which decides the global weight
        yield GenerationResponse(**vars(response), **said)


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | mx.array | list[int],
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """Generate a whole answer as ``mlx_lm.generate`` does; see :func:`stream_generate` for the arguments."""
    text, response = "", None
    if verbose:
        print("=" * 10)
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose:
        print("\n" + "=" * 10)
        print(_statistics(response))
    return text


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt by mlx-lm's rule: BOS is added unless the text begins with it."""
    bos = tokenizer.bos_token
    return tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos))


def render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    """Tokens of a conversation by the chat template; templates refuse some, a system prompt say."""
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as e:
        raise GlassError(f"The model's chat template does not take this conversation: {e}") from e


def _describe(model: nn.Module, session: Any) -> dict[str, Any]:
    """The fields of a response that say how GLASS decodes it."""
    if not isinstance(model, GlassModel):
        return {}
    sizes = [block.size for block in model.blocks]
    if session is None:
        return {"kept_neurons": sum(sizes), "total_neurons": sum(sizes)}
    config = session.config
    return {
        "density": config.density,
        "kept_neurons": sum(model.kept_counts(config.density, config.allocation)),
        "total_neurons": sum(sizes),
        "global_weight": model.global_weight(session),
        "signal": config.signal,
    }


def _statistics(r: GenerationResponse) -> str:
    lines = [
        f"Prompt: {r.prompt_tokens} tokens, {r.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {r.generation_tokens} tokens, {r.generation_tps:.3f} tokens-per-sec",
        f"Peak memory: {r.peak_memory:.3f} GB",
    ]
    if r.total_neurons:
        lines.append(
            f"GLASS: density {r.density:g}, {r.kept_neurons:,} of {r.total_neurons:,} FFN neurons, "
            f"global weight {r.global_weight:g}, signal {r.signal or 'none'}"
        )
    return "\n".join(lines)


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options for generate, and GLASS's."""
    parser = setup_mlx_lm_parser()
    parser.prog = "glass_mlx.generate"
    parser.description = "Generate text on the FFN neurons that the prompt calls for."
    # --verbose True, given, also shows tracebacks
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
    if args.draft_model and args.prompt_cache_file:
        parser.error("--draft-model cannot be used with --prompt-cache-file")
    try:
        template = json.loads(args.chat_template_config or "{}")
        if not isinstance(template, dict):
            raise ValueError("not an object")
    except ValueError as e:
        parser.error(f"--chat-template-config is no JSON object: {e}")
    run(lambda: _generate(args, template), args.verbose is True)


def _generate(args: argparse.Namespace, template: dict[str, Any]) -> None:
    if args.seed is not None:
        mx.random.seed(args.seed)
    options: dict[str, Any] = {}
    cached = _read_cache(args.prompt_cache_file) if args.prompt_cache_file else None
    model, tokenizer = load(
        args.model,
        adapter_path=args.adapter_path,
        model_config={"quantize_activations": args.quantize_activations},
        trust_remote_code=args.trust_remote_code,
        density=args.density,
        global_weight=args.global_weight,
        signal=args.signal,
        allocation=args.allocation,
        refresh=args.refresh,
        stats=False if args.dense and not args.stats else args.stats,
        stats_repo=args.stats_repo,
        max_session_memory=args.max_session_memory,
        low_memory=args.low_memory and not args.dense,
        build=args.build and args.global_weight != 0,
    )
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)
    if args.draft_model:
        draft, draft_tokenizer = load(args.draft_model, stats=False)
        if draft_tokenizer.vocab_size != tokenizer.vocab_size:
            raise GlassError(f"{args.draft_model} cannot draft for {args.model}: their vocabularies differ.")
        options["draft_model"] = draft.dense
        options["num_draft_tokens"] = args.num_draft_tokens
    used: nn.Module = model.dense if args.dense else model
    if cached is not None:
        cached = model.add_session(cached)
        if len(cached) != len(model.make_cache()):
            raise GlassError(f"{args.prompt_cache_file} is the prompt cache of another model.")
        options["prompt_cache"] = cached[:-1] if args.dense else cached
    sampler = sampler_maker(args)(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    prompt = _prompt(args, tokenizer, template, after_cache=cached is not None)
    if args.kv_bits is not None:
        options |= {"kv_bits": args.kv_bits, "kv_group_size": args.kv_group_size}
        options["quantized_kv_start"] = args.quantized_kv_start
    text, tokens, response = "", [], None
    loud = args.verbose is not False and not args.json
    if loud:
        print("=" * 10)
    if not args.dense:
        options |= verify_options(args)
    options |= {"max_kv_size": args.max_kv_size, "prefill_step_size": args.prefill_step_size}
    try:
        for response in stream_generate(used, tokenizer, prompt, args.max_tokens, sampler=sampler, **options):
            text += response.text
            tokens.append(response.token)
            if not args.json:
                print(response.text, end="", flush=True)
    except (ValueError, RuntimeError) as e:  # options of mlx-lm's that the model, or the prompt cache, cannot have
        raise GlassError(f"mlx-lm cannot generate with these options: {str(e).splitlines()[0]}") from e
    if args.json:
        print(json.dumps(_as_json(text, tokens, response)))
    elif loud:
        print("\n" + "=" * 10)
        print(_statistics(response))
    else:
        print()


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


def _read_cache(path: str) -> list[Any]:
    try:
        return load_prompt_cache(path)
    except (OSError, RuntimeError, ValueError, KeyError) as e:
        raise GlassError(f"{path} is no prompt cache: {str(e).splitlines()[0]}") from e


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
