"""Generate text as mlx-lm's functions of the same names do, decoding sparsely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse as DenseResponse
from mlx_lm.generate import stream_generate as stream_dense
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import group
from ..errors import GlassError
from ..model.config import RETIRED
from ..model.glass_model import GlassModel
from ..model.quality import agreement_at
from ..model.session import Phase, Session
from .prompt import Prompt, as_tokens
from .speculative import stream_verified


@dataclass
class GenerationResponse(DenseResponse):
    """mlx-lm's response, and how GLASS decoded it.

    Attributes:
        density (float): share of the FFN neurons asked for; 1.0 is the dense model.
        kept_neurons (int): FFN neurons decoded with, over all layers.
        total_neurons (int): FFN neurons of these layers.
        global_weight (float): weight that the global ranks had in the choice.
        signal (str): what the neurons were ranked by.
        expected_agreement (float | None): how often the sparse model's most likely token is the dense one's, as the
            model's ranks say; None if that was not measured.
        group (str): the processes that share the model, if any; the other figures are of this one, but for the neurons.
    """

    density: float = 1.0
    kept_neurons: int = 0
    total_neurons: int = 0
    global_weight: float = 0.0
    signal: str = ""
    expected_agreement: float | None = None
    group: str = ""


class PhasedModel(nn.Module):
    """What mlx-lm's generation loop calls in a GlassModel's place, for one prompt and its answer.

    It knows how many tokens the prompt has, so each call is the phase that it is: prefill to the prompt's last token,
    then select once, then decode.
    """

    def __init__(self, model: GlassModel, prompt_tokens: int):
        super().__init__()
        self.model, self.prompt_left = model, prompt_tokens

    # mlx-lm looks for input_embeddings in the signature
    def __call__(
        self, inputs: mx.array, cache: list[Any], input_embeddings: mx.array | None = None, **kwargs: Any
    ) -> mx.array:
        if input_embeddings is not None:
            kwargs["input_embeddings"] = input_embeddings
        if self.prompt_left > 0:
            self.prompt_left -= (inputs if input_embeddings is None else input_embeddings).shape[1]
            return self.model.prefill(inputs, cache, **kwargs)
        return self.model.run_phase(Phase.DECODE, inputs, cache, **kwargs)


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    *,
    density: float | None = None,
    global_weight: float | str | None = None,
    signal: str | None = None,
    layer_budgets: str | None = None,
    compensation: bool | None = None,
    experts: str | None = None,
    verify: bool = False,
    draft_tokens: int | None = None,
    prompt_cache: list[Any] | None = None,
    max_kv_size: int | None = None,
    **kwargs: Any,
) -> Iterator[GenerationResponse]:
    """Generate text as ``mlx_lm.stream_generate`` does, with the same arguments, decoding sparsely.

    The prompt is prefilled densely to its last token. Then the neurons are chosen, and every further token is decoded
    on their weights. With a prompt cache of an earlier turn, the evidence of both turns counts. A plain mlx-lm model is
    passed on to mlx-lm.

    Args:
        model (nn.Module): a GlassModel.
        tokenizer: its tokenizer.
        prompt: text, tokens, or messages (dicts of ``role`` and ``content``), which the chat template renders.
        max_tokens (int): the longest answer; -1 for no limit but the model's context.
        draft_model (nn.Module, optional): for mlx-lm's speculative decoding. The model checks several tokens at once,
            and those calls are dense, so the answer is the dense model's.
        density, global_weight, signal, layer_budgets, compensation, experts: where this and later answers of the
            conversation differ from the model's configuration (:class:`glass_mlx.GlassConfig`).
        verify (bool): draft sparsely and check with the dense model, whose answer it then is
            (``decoding/speculative.py``).
        draft_tokens (int, optional): how many tokens to draft before each check. Default: as many as pay.
        prompt_cache (list, optional): from ``model.make_cache()``; updated in place.
        max_kv_size (int, optional): for a new cache, as in mlx-lm.
        kwargs: the remaining options of mlx-lm's ``generate_step``.

    Yields:
        GenerationResponse: a piece of text, with what mlx-lm and GLASS report.

    Raises:
        GlassError: an argument is out of range, or the prompt is empty or longer than the model's context.
    """
    choice = {"density": density, "global_weight": global_weight, "signal": signal}
    choice |= {"layer_budgets": layer_budgets, "compensation": compensation, "experts": experts}
    kwargs = {name: value for name, value in kwargs.items() if name not in RETIRED}
    if not isinstance(model, nn.Module):
        raise GlassError(f"The model comes first, then the tokenizer; this is a {type(model).__name__!r}.")
    if not isinstance(max_tokens, Integral) or max_tokens < -1 or max_tokens == 0:
        raise GlassError(f"max_tokens must be a positive number, or -1 for no limit, not {max_tokens!r}.")
    prompt = as_tokens(tokenizer, prompt)
    if prompt.size == 0 and kwargs.get("input_embeddings") is None:
        raise GlassError("The prompt is empty: it has no tokens.")
    if any(kwargs.get(name) is not None and kwargs[name] < 1 for name in ("kv_bits", "kv_group_size")):
        raise GlassError("kv_bits and kv_group_size must be at least 1.")  # MLX would divide by zero
    if draft_model is not None and any(v is not None for v in (prompt_cache, *choice.values())):
        raise GlassError(
            "With a draft model, start a new conversation at the model's own density: "
            f"give neither prompt_cache nor {', '.join(choice)}."
        )
    if verify and (draft_model is not None or not isinstance(model, GlassModel)):
        raise GlassError("verify needs a GlassModel and no draft model: it drafts by itself.")
    if draft_model is not None or not isinstance(model, GlassModel):
        kwargs |= {"max_kv_size": max_kv_size} | ({} if prompt_cache is None else {"prompt_cache": prompt_cache})
        responses = stream_dense(model, tokenizer, prompt, max_tokens, draft_model, **kwargs)
        return _described(responses, lambda: _describe_dense(model))
    prompt_cache = model.make_cache(max_kv_size) if prompt_cache is None else prompt_cache
    session = model.session(prompt_cache)
    session.configure(**choice)
    kwargs["prompt_cache"] = prompt_cache
    embeddings = kwargs.get("input_embeddings")
    length = prompt.size if embeddings is None else embeddings.shape[0]
    max_tokens = _within_context(model, tokenizer, prompt_cache, length, max_tokens)
    if verify and not model.keeps_all(session.config):
        if kwargs.pop("input_embeddings", None) is not None:
            raise GlassError("Verified decoding does not take input embeddings.")
        if not isinstance(tokenizer, TokenizerWrapper):
            tokenizer = TokenizerWrapper(tokenizer)
        responses = stream_verified(model, tokenizer, prompt, max_tokens, draft_tokens=draft_tokens, **kwargs)
    else:
        phased = PhasedModel(model, length)
        responses = stream_dense(phased, tokenizer, prompt, max_tokens, **kwargs)
    return _described(responses, lambda: _describe(model, session))


def context_length(model: GlassModel, tokenizer: Any, cache: list[Any]) -> int | None:
    """The longest text, prompt and answer, in tokens that a conversation may have: what the model was made for, as its
    configuration says or else its tokenizer. None where neither does, or the cache is a sliding window, which never
    holds more than its own size."""
    if all(isinstance(entry, RotatingKVCache) for entry in cache[:-1]):
        return None
    said = model.context_length or getattr(tokenizer, "model_max_length", None)
    return said if isinstance(said, int) and said < 2**40 else None  # tokenizers have huge numbers for "unknown"


def _within_context(model: GlassModel, tokenizer: Any, cache: list[Any], length: int, max_tokens: int) -> int:
    """How many tokens an answer to a prompt of so many tokens may have.

    Raises:
        GlassError: none, because the prompt fills the model's context.
    """
    # of a pipeline each process has layers of its own, of which some may all be sliding windows
    known = [n for (n,) in group.gather([context_length(model, tokenizer, cache) or 0]) if n]
    if not known:
        return max_tokens
    context = min(known)
    used = model.session(cache).offset + length
    if used > context:
        raise GlassError(
            f"The prompt has {used:,} tokens with what was read before it; the model's context is {context:,}, "
            "with the answer: shorten it."
        )
    left = max(1, context - used)  # the last token of a full prompt still has one after it
    return min(max_tokens, left) if max_tokens >= 0 else left


def _described(
    responses: Iterator[DenseResponse], describe: Callable[[], dict[str, Any]]
) -> Iterator[GenerationResponse]:
    """mlx-lm's responses with what GLASS reports; ``describe`` is asked after the prompt, which decides it.

    Speeds count the intervals between tokens: mlx-lm's clock starts at the first token, and counts it.
    """
    with _finished(), closing(responses):
        fields = None
        for response in responses:
            fields = fields or describe()
            between = (response.generation_tokens - 1) / max(1, response.generation_tokens)
            speed = {"generation_tps": response.generation_tps * between}
            yield GenerationResponse(**{**vars(response), **speed}, **fields)


@contextmanager
def _finished() -> Iterator[None]:
    """Nothing is left under way at the end, where processes share a model."""
    try:
        yield
    finally:
        group.settle()


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
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
        print(statistics(response))
    return text


def _describe(model: GlassModel, session: Session) -> dict[str, Any]:
    """The fields of a response that say how GLASS decodes it."""
    config = session.config
    return {
        **_describe_dense(model),
        "density": config.density,
        "kept_neurons": sum(model.kept_counts(**vars(config))) if model.part is None else model.part.kept(config),
        "global_weight": model.global_weight(session),
        "signal": config.signal,
        "expected_agreement": agreement_at(config.density, model.quality),
    }


def _describe_dense(model: nn.Module) -> dict[str, Any]:
    """The same for a model that decodes densely."""
    if not isinstance(model, GlassModel):
        return {}
    whole = None if model.part is None else model.part.whole
    neurons = sum(block.size for block in model.blocks) if whole is None else whole.neurons
    return {"kept_neurons": neurons, "total_neurons": neurons, "group": str(whole or "")}


def statistics(r: GenerationResponse) -> str:
    """An answer's figures, a line each, as mlx-lm prints them."""
    lines = [
        f"Prompt: {r.prompt_tokens} tokens, {r.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {r.generation_tokens} tokens, {r.generation_tps:.3f} tokens-per-sec",
        f"Peak memory: {r.peak_memory:.3f} GB",
    ]
    if r.total_neurons:
        expected = "" if r.expected_agreement is None else f", same top token {r.expected_agreement:.0%}"
        lines.append(
            f"GLASS: density {r.density:g}, {r.kept_neurons:,} of {r.total_neurons:,} FFN neurons, "
            f"global weight {r.global_weight:.2g}, signal {r.signal or 'none'}{expected}"
        )
    if r.group:
        lines.append(f"Group: {r.group}; memory is of rank 0")
    return "\n".join(lines)
