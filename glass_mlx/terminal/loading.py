"""The model that a command line asks for: whole, or under ``mlx.launch`` this process's part of it."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import mlx.core as mx

from ..cli.options import glass_choice
from ..errors import GlassError
from ..group import size
from ..loading import load
from ..model.glass_model import GlassModel
from ..sharded_loading import sharded_load

logger = logging.getLogger("glass_mlx")

# Options of models that one machine has whole.
_ALONE = ("adapter_path", "build", "draft_model", "low_memory", "prompt_cache_file", "quantize_activations")


def load_for(args: argparse.Namespace, stats: Any, **options: Any) -> tuple[GlassModel, Any]:
    """Load the model of a command line.

    Args:
        args: with the options of ``add_generation_options`` and ``add_glass_options``, and ``pipeline``.
        stats: as in :func:`glass_mlx.load`.
        options: what that takes besides, for whole models only.

    Returns:
        tuple: (GlassModel, tokenizer).

    Raises:
        GlassError: as there; or an option is for whole models only.
    """
    known = {
        **glass_choice(args),
        "trust_remote_code": args.trust_remote_code,
        "quality": None if args.dense else args.quality,
        "stats": stats,
        "stats_repo": args.stats_repo,
        "max_session_memory": args.max_session_memory,
    }
    check_group(args)
    if size() > 1:
        groups = {"pipeline_group" if args.pipeline else "tensor_group": mx.distributed.init()}
        return sharded_load(args.model, **groups, **known)
    return load(
        args.model,
        adapter_path=args.adapter_path,
        low_memory=False if args.dense else args.low_memory,
        build=args.build and not args.dense and args.global_weight != 0,
        **options,
        **known,
    )


def check_group(args: argparse.Namespace) -> None:
    """Warn if a command line asks for a group and there is none.

    Raises:
        GlassError: there is one, and an option is for whole models only.
    """
    if size() == 1:
        if args.pipeline:
            logger.warning("--pipeline has no effect without mlx.launch")
        return
    for name in _ALONE:
        if getattr(args, name, None):
            raise GlassError(f"--{name.replace('_', '-')} is for one machine: leave it out under mlx.launch.")
