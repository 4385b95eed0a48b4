"""What options must be beside each other, and numbers in themselves."""

from __future__ import annotations

import argparse
import logging

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


# Options that have no effect without another one.
_NEEDS = {"kv_group_size": "kv_bits", "quantized_kv_start": "kv_bits", "draft_tokens": "verify"}
_NOT_WITH_DENSE = ("density", "quality", "verify", "low_memory")


def warn_of_idle_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Log a warning for each option that was given and has no effect besides the others."""

    def given(name: str) -> bool:
        return getattr(args, name, None) not in (None, parser.get_default(name))

    def option(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    idle = [(name, f"without {option(needed)}") for name, needed in _NEEDS.items() if not given(needed)]
    if getattr(args, "dense", False):
        idle += [(name, "with --dense") for name in _NOT_WITH_DENSE]
    for name, why in idle:
        if given(name):
            logging.getLogger("glass_mlx").warning("%s has no effect %s", option(name), why)
