"""What becomes of every field of a request: it is honoured, refused by name, or ignored with a warning.

The tables list the fields of OpenAI's requests and of mlx-lm's server. The models in ``schema`` and ``responses`` hold
the honoured ones; what else a client sends is judged here. A field that no table knows is ignored with a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import printable
from .errors import BadRequest

HONOURED, REFUSED, IGNORED = "honoured", "refused", "ignored"
_MAX_WARNINGS, _MAX_LENGTH, _MAX_NAME = 16, 200, 60


@dataclass(frozen=True)
class Rule:
    """What becomes of a field.

    Attributes:
        kind: ``HONOURED``, ``REFUSED`` or ``IGNORED``.
        reason: why it is refused or ignored, and what to do instead.
        neutral: values that ask for nothing, besides null.
    """

    kind: str
    reason: str = ""
    neutral: tuple = ()


def _honoured(names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), Rule(HONOURED))


def _refused(reason: str, *neutral: Any) -> Rule:
    return Rule(REFUSED, reason, neutral)


def _ignored(reason: str, *neutral: Any) -> Rule:
    return Rule(IGNORED, reason, neutral)


_GLASS = {
    **_honoured("density quality global_weight signal layer_budgets compensation experts verify"),
    "refresh": _ignored("answers are no longer read again; a higher density does more", 0),
}
_SAMPLING = _honoured(
    "temperature top_p top_k min_p xtc_probability xtc_threshold logit_bias seed stop repetition_penalty "
    "repetition_context_size presence_penalty presence_context_size frequency_penalty frequency_context_size"
)
_NOTHING_KEPT = "nothing is stored, and all requests are served alike"
_OF_OPENAIS_SERVICE = {
    "metadata": _ignored(_NOTHING_KEPT, {}),
    "store": _ignored(_NOTHING_KEPT, False),
    "service_tier": _ignored(_NOTHING_KEPT, "auto", "default"),
    "safety_identifier": _ignored(_NOTHING_KEPT),
    "moderation": _ignored("answers are not moderated"),
    "prompt_cache_key": _ignored("conversations are recognised by their tokens"),
    "prompt_cache_options": _ignored("conversations are recognised by their tokens"),
    "prompt_cache_retention": _ignored("conversations are recognised by their tokens", "in_memory"),
}
_MLX_LM = {
    "adapters": _refused("adapters are fused when the model is loaded: start the server with --adapter-path"),
    "draft_model": _ignored("there are no draft models; verify drafts with the model itself", "default_model"),
    "num_draft_tokens": _ignored("there are no draft models; start the server with --draft-tokens"),
}
_SHARED = {**_honoured("model max_tokens user stream stream_options"), **_SAMPLING, **_GLASS, **_MLX_LM}

CHAT = {
    **_SHARED,
    **_honoured(
        "messages max_completion_tokens n logprobs top_logprobs tools tool_choice parallel_tool_calls response_format "
        "chat_template_kwargs continue_final_message add_generation_prompt"
    ),
    **_OF_OPENAIS_SERVICE,
    "audio": _refused("only text is generated"),
    "modalities": _refused("only text is generated", ["text"], []),
    "functions": _refused("use tools", []),
    "function_call": _refused("use tool_choice", "none", "auto"),
    "web_search_options": _refused("the server searches nothing"),
    "prediction": _ignored("nothing is predicted; verify drafts with the model itself"),
    "reasoning_effort": _ignored("use chat_template_kwargs, if the model's template can set it"),
    "verbosity": _ignored("say it in the prompt"),
    "role_mapping": _ignored("the model's chat template names the roles"),
}

COMPLETIONS = {
    **_SHARED,
    **_honoured("prompt n logprobs top_logprobs echo"),
    "suffix": _refused("the model only continues texts; it does not fill in what is between two", ""),
    "best_of": _refused("every answer is given; ask for n", 1),
}

RESPONSES = {
    **_SHARED,
    **_honoured("input instructions max_output_tokens text tools tool_choice parallel_tool_calls top_logprobs include"),
    **_OF_OPENAIS_SERVICE,
    "background": _refused("answers come in the response to their request", False),
    "background_options": _refused("answers come in the response to their request"),
    "conversation": _refused("nothing is stored: send the whole conversation as input"),
    "previous_response_id": _refused("nothing is stored: send the whole conversation as input"),
    "prompt": _refused("nothing is stored: send the prompt's text as input"),
    "image": _refused("only text is generated"),
    "access_programs": _ignored(_NOTHING_KEPT),
    "context_management": _refused("nothing is left out of a conversation", []),
    "truncation": _refused("nothing is left out of a conversation", "disabled"),
    "max_tool_calls": _ignored("the client calls the tools"),
    "n": _refused("a response has one answer; /v1/chat/completions gives more", 1),
    "reasoning": _ignored("use chat_template_kwargs of /v1/chat/completions, if the model's template can set it", {}),
}


def judge(rules: Mapping[str, Rule], given: Mapping[str, Any]) -> list[str]:
    """Judge the fields of a request that its model does not have.

    Args:
        rules (mapping): the endpoint's table.
        given (mapping): fields and their values.

    Returns:
        list[str]: a warning for each that is ignored.

    Raises:
        BadRequest: one is refused.
    """
    warnings = []
    for name, value in given.items():
        rule = rules.get(name)
        if value is None or (rule is not None and _is_neutral(value, rule.neutral)):
            continue
        if rule is None:
            warnings.append(f"{name[:_MAX_NAME]} is ignored: the server does not know it")
        elif rule.kind == REFUSED:
            raise BadRequest(f"{name} is not supported: {rule.reason}.", name)
        else:
            warnings.append(f"{name} is ignored: {rule.reason}")
    return warnings


def warning_header(warnings: Iterable[str]) -> dict[str, str]:
    """The response header of warnings, in printable ASCII; none without any."""
    shown = [printable(w[:_MAX_LENGTH]).encode("ascii", "backslashreplace").decode() for w in dict.fromkeys(warnings)]
    if len(shown) > _MAX_WARNINGS:
        shown = [*shown[:_MAX_WARNINGS], f"and {len(shown) - _MAX_WARNINGS} more"]
    return {WARNING_HEADER: "; ".join(shown)} if shown else {}


WARNING_HEADER = "X-Glass-Warning"


def _is_neutral(value: Any, neutral: tuple) -> bool:
    return any(type(value) is type(other) and value == other for other in neutral)  # True is not 1
