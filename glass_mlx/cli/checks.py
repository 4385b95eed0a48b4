"""What options must be in themselves, and beside each other."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from .running import log_to_stderr

# What the numbers on command lines may be.
_ANY = 2**31 - 1
_RANGES = {
    **dict.fromkeys(("top_p", "min_p", "xtc_probability"), (0, 1)),
    **dict.fromkeys(("temp", "top_k", "idle_timeout", "quantized_kv_start"), (0, _ANY)),
    **dict.fromkeys(("prefill_step_size", "max_kv_size", "min_tokens_to_keep", "kv_bits", "kv_group_size"), (1, _ANY)),
    **dict.fromkeys(("draft_tokens", "num_draft_tokens", "max_queue", "max_prompt_tokens"), (1, _ANY)),
    "prompt_cache_size": (1, _ANY),
    "xtc_threshold": (0, 0.5),
    "seed": (0, 2**64 - 1),
    "port": (0, 65535),
}


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Report a number on the command line that is out of its range, as argparse reports errors."""
    if getattr(args, "max_tokens", 1) < -1 or getattr(args, "max_tokens", 1) == 0:
        parser.error("--max-tokens must be positive, or -1 for no limit")
    for name, (low, high) in _RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:  # nor is it NaN
            parser.error(
                f"--{name.replace('_', '-')} must be {f'at least {low}' if high == _ANY else f'{low} to {high}'}"
            )


class Idle(NamedTuple):
    """Options that have no effect without or beside others. Names are those of ``argparse``'s namespace, with spaces
    between them; ``name=value`` is an option of that value, or with it among its values.

    Attributes:
        options: those without effect
        without: unless one of these is given;
        beside: if one of these is given that has an effect itself.
        until: what would give them an effect later.
        refused: whether that is an error.
    """

    options: str
    without: str = ""
    beside: str = ""
    until: str = ""
    refused: bool = False


# What says which neurons to decode with.
CHOICE = "global_weight layer_budgets compensation experts signal stats stats_repo max_session_memory"
GLASS = (Idle("density", beside="quality"), Idle("stats_repo build", beside="stats"))
DENSE = Idle("density quality low_memory", beside="dense")
VERIFY = Idle("draft_tokens", without="verify")
SAMPLING = (
    Idle("top_p xtc_probability xtc_threshold seed", without="temp"),
    Idle("xtc_threshold", without="xtc_probability"),
)
KV = Idle("kv_group_size quantized_kv_start", without="kv_bits")
SHAPE = Idle("layers bits", without="shape", refused=True)


def check_together(parser: argparse.ArgumentParser, args: argparse.Namespace, rules: Iterable[Idle]) -> None:
    """Log a warning for the options that were given and have no effect beside the others, or report an error."""
    idle: set[str] = set()
    told: dict[str, list[str]] = {}  # options by the reason
    for rule in rules:
        reason = _reason(parser, args, rule, idle)
        names = [name for name in rule.options.split() if _given(parser, args, name) and name not in idle]
        if not reason or not names:
            continue
        idle.update(names)
        options = [_option(name, getattr(args, name)) for name in names]
        if rule.refused:
            parser.error(f"{_listed(options)} cannot be used {reason}")
        told.setdefault(reason + (rule.until and f" until {rule.until}"), []).extend(options)
    for reason, options in told.items():
        log_to_stderr()
        verb = "has" if len(options) == 1 else "have"
        logging.getLogger("glass_mlx").warning("%s %s no effect %s", _listed(options), verb, reason)


def _reason(parser: argparse.ArgumentParser, args: argparse.Namespace, rule: Idle, idle: set[str]) -> str:
    """Why a rule's options have no effect; empty if they have."""
    needed, rivals = rule.without.split(), rule.beside.split()
    if needed and not any(_holds(parser, args, condition) for condition in needed):
        return f"without {' or '.join(map(_shown, needed))}"
    found = [c for c in rivals if _holds(parser, args, c) and c.partition("=")[0] not in idle]
    return f"with {_shown(found[0])}" if found else ""


def _given(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) not in (None, parser.get_default(name))


def _holds(parser: argparse.ArgumentParser, args: argparse.Namespace, condition: str) -> bool:
    name, _, wanted = condition.partition("=")
    value = getattr(args, name)
    if not wanted:
        return _given(parser, args, name)
    if value is None:  # all of them
        return True
    values = value if isinstance(value, (list, tuple)) else [value]
    return wanted in (f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def _listed(options: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(options[:-1]), options[-1]]))


def _shown(condition: str) -> str:
    name, _, value = condition.partition("=")
    return f"{_option(name)} {value}".rstrip()


def _option(name: str, value: Any = True) -> str:
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
