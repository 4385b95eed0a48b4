"""Load this process's part of a model that several share, as mlx-lm's function of the same name does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm import utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import group
from ._version import __version__
from .decoding.control_tokens import ChatTokenizer
from .errors import GlassError
from .hub.model_files import check_model
from .hub.names import DEFAULT_MODEL
from .loading import choose_density, fit_memory, resolve_model, use_statistics
from .model.blocks import Block
from .model.config import GlassConfig
from .model.discovery import find_blocks
from .model.glass_model import GlassModel
from .model.part import WholeBlock, WholeModel
from .ranks.format import GlobalStatistics
from .ranks.identity import fingerprints_of
from .ranks.lookup import find_statistics

_Any = TypeVar("_Any")


def sharded_load(
    path_or_hf_repo: str | Path = DEFAULT_MODEL,
    pipeline_group: mx.distributed.Group | None = None,
    tensor_group: mx.distributed.Group | None = None,
    return_config: bool = False,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quality: str | None = None,
    stats: str | Path | bool | None = None,
    stats_repo: str | None = None,
    max_session_memory: int | None = None,
    **choice: Any,
) -> tuple[GlassModel, TokenizerWrapper] | tuple[GlassModel, TokenizerWrapper, dict[str, Any]]:
    """Load a model that the processes of a group share, each its own part, to decode with GLASS.

    Every process must call this with the same arguments, and from then on take the same steps with the model. The whole
    model's files, and its global ranks if it has any, must be on every machine.

    Args:
        path_or_hf_repo: as in :func:`glass_mlx.load`.
        pipeline_group, tensor_group: as in ``mlx_lm.utils.sharded_load``: what the processes share, whole layers or
            each of them. Default: each layer, in the group of all processes.
        return_config, tokenizer_config, trust_remote_code, revision: as in :func:`glass_mlx.load`.
        quality, stats, stats_repo, max_session_memory, choice: as there.

    Returns:
        tuple: (GlassModel, tokenizer), and the model's config as a third if ``return_config``.

    Raises:
        GlassError: as in :func:`glass_mlx.load`; or mlx-lm cannot share this model, or the machines differ.
    """
    config = GlassConfig(**choice)
    if pipeline_group is tensor_group is None:
        tensor_group = mx.distributed.init()

    def find() -> tuple[Path, WholeModel]:
        path = resolve_model(path_or_hf_repo, revision)
        check_model(path)
        return path, _whole_model(path, pipeline_group, tensor_group, trust_remote_code)

    path, whole = group.attempt(find)
    versions = f"glass_mlx {__version__}, MLX {mx.__version__}"
    group.agree({"the installed versions": versions, "the model's weights": whole.fingerprints[0]})
    dense, tokenizer, model_config = _mlx_lm(
        path,
        utils.sharded_load,
        str(path),
        pipeline_group,
        tensor_group,
        return_config=True,
        tokenizer_config={"trust_remote_code": trust_remote_code, **(tokenizer_config or {})},
        trust_remote_code=trust_remote_code,
    )

    def wrap() -> tuple[GlassModel, GlobalStatistics | None]:
        model = GlassModel(dense, config, path=path, max_session_memory=max_session_memory, whole=whole)
        return model, find_statistics(model, stats, stats_repo)

    model, statistics = group.attempt(wrap)
    group.agree({"the global ranks": _brief(statistics)})
    use_statistics(model, statistics, stats is not False)
    choose_density(model, quality)
    fit_memory(model, low_memory=False)
    tokenizer = ChatTokenizer(tokenizer)
    return (model, tokenizer, model_config) if return_config else (model, tokenizer)


def _whole_model(
    path: Path,
    pipeline_group: mx.distributed.Group | None,
    tensor_group: mx.distributed.Group | None,
    trust_remote_code: bool,
) -> WholeModel:
    """What is known of a model before it is shared. Its FFN weights are read once, a block at a time."""
    dense, _ = _mlx_lm(path, utils.load_model, path, lazy=True, strict=False, trust_remote_code=trust_remote_code)
    blocks, _ = find_blocks(dense)
    known: list[WholeBlock] = []

    def remember(block: Block) -> None:
        known.append(WholeBlock.of(block))
        for name in block.names:
            block.module[name].clear()  # this model is never run

    fingerprints = fingerprints_of(blocks, remember)
    shared, way = (tensor_group, "tensor") if pipeline_group is None else (pipeline_group, "pipeline")
    return WholeModel(shared.rank(), shared.size(), way, known, fingerprints)


def _mlx_lm(path: Path, load: Callable[..., _Any], *args: Any, **kwargs: Any) -> _Any:
    """What a function of mlx-lm's returns, with one-line errors."""
    try:
        return load(*args, **kwargs)
    except FileNotFoundError as e:
        raise GlassError(f"{path} lacks {Path(e.filename or 'a file').name}, which sharing its layers needs.") from e
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".: ")
        raise GlassError(f"mlx-lm cannot share {path} between these processes: {reason}.") from e


def _brief(statistics: GlobalStatistics | None) -> str:
    """What tells global statistics from others."""
    if statistics is None:
        return "none"
    about = json.dumps([sorted(statistics.metadata.items()), statistics.sensitivity, str(statistics.quality)])
    return (
        f"those of {statistics.metadata.get('tokens', '?')} tokens ({hashlib.sha256(about.encode()).hexdigest()[:8]})"
    )
