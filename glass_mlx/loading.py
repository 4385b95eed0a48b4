"""Load a model by its path, Hub repository or alias, and wrap it as a GlassModel."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import mlx.nn as nn
import mlx_lm
from huggingface_hub import constants, snapshot_download
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .decoding.control_tokens import ChatTokenizer
from .decoding.costs import step_costs
from .decoding.memory_plan import CONTEXT, MemoryPlan, plan_memory
from .errors import GlassError
from .hub.access import hub_access
from .hub.model_files import check_model, problem
from .hub.names import ALIASES, DEFAULT_MODEL, DEMO_PATH, near_miss, repository_of
from .model.config import GlassConfig
from .model.glass_model import GlassModel
from .model.quality import costs_more_than, density_for
from .ranks.format import GlobalStatistics
from .ranks.lookup import find_statistics

logger = logging.getLogger("glass_mlx")

# What mlx-lm downloads from a repository, and the card.
MODEL_FILES = [
    "README.md",  # the card says what the model was converted from
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]


def resolve_model(name: str | Path, revision: str | None = None) -> Path:
    """Find the directory of a model, and download it if necessary.

    Args:
        name (str or Path): ``demo``, an alias (``ALIASES``), a directory or a Hub repository.
        revision (str, optional): of the repository: a branch, a tag or a commit hash.

    Raises:
        GlassError: there is no such model, or it cannot be downloaded.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise GlassError(f"Give the model's name or directory, not {type(name).__name__!r}; wrap takes loaded models.")
    if str(name) == DEFAULT_MODEL:
        return DEMO_PATH
    path = Path(name).expanduser()
    if path.is_dir():
        if (reason := problem(path)) is not None:
            raise GlassError(f"{path} {reason}.")
        return path
    if path.exists():
        raise GlassError(f"{path} is a file: give the model's directory.")
    repo = repository_of(str(name))
    try:
        with hub_access(repo, revision):
            path = Path(snapshot_download(repo, revision=revision, allow_patterns=MODEL_FILES))
    except GlassError as e:
        close = "" if repo in ALIASES.values() else near_miss(repo, ALIASES.values())
        raise GlassError(f"{e} {close[:1].upper()}{close[1:]}".strip()) from e
    if (reason := problem(path)) is not None:  # without a network, what there is of it comes back
        raise GlassError(f"{repo} in {constants.HF_HUB_CACHE} {reason}. If a download was cut short, go online.")
    return path


def load_dense(path: Path, adapter_path: str | None = None, **options: Any) -> tuple[nn.Module, TokenizerWrapper, dict]:
    """Call mlx-lm's ``load``, with one-line errors and the adapter fused in; returns (model, tokenizer, config)."""
    check_model(path)
    try:
        model, tokenizer, config = mlx_lm.load(str(path), adapter_path=adapter_path, return_config=True, **options)
    except FileNotFoundError as e:
        raise GlassError(f"{path} lacks a file: {_first_line(e)}.") from e
    except KeyError as e:
        raise GlassError(f"{path}/config.json lacks {e}: give a text model that mlx-lm can load.") from e
    except (ValueError, RuntimeError, TypeError, AttributeError, OSError, SystemExit) as e:  # olmo's code exits
        raise GlassError(f"mlx-lm cannot load {path} as a text model: {_first_line(e)}") from e
    if adapter_path is not None:
        fused = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
        model.update_modules(tree_unflatten(fused))
    return model, ChatTokenizer(tokenizer), config


class LoadOptions(TypedDict, total=False):
    """What :func:`load` takes besides its first arguments."""

    revision: str | None
    trust_remote_code: bool
    density: float
    global_weight: float | str
    signal: str
    layer_budgets: str
    compensation: bool
    experts: str
    quality: str | None
    stats: str | Path | bool | None
    stats_repo: str | None
    build: bool
    max_session_memory: int | None
    low_memory: bool | None


@overload
def load(
    path_or_hf_repo: str | Path = ...,
    tokenizer_config: dict[str, Any] | None = ...,
    model_config: dict[str, Any] | None = ...,
    adapter_path: str | None = ...,
    lazy: bool = ...,
    return_config: Literal[False] = ...,
    **options: Unpack[LoadOptions],
) -> tuple[GlassModel, TokenizerWrapper]: ...


@overload
def load(
    path_or_hf_repo: str | Path = ...,
    tokenizer_config: dict[str, Any] | None = ...,
    model_config: dict[str, Any] | None = ...,
    adapter_path: str | None = ...,
    lazy: bool = ...,
    *,
    return_config: Literal[True],
    **options: Unpack[LoadOptions],
) -> tuple[GlassModel, TokenizerWrapper, dict[str, Any]]: ...


def load(
    path_or_hf_repo: str | Path = DEFAULT_MODEL,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    density: float = GlassConfig.density,
    global_weight: float | str = GlassConfig.global_weight,
    signal: str = GlassConfig.signal,
    layer_budgets: str = GlassConfig.layer_budgets,
    compensation: bool = GlassConfig.compensation,
    experts: str = GlassConfig.experts,
    quality: str | None = None,
    stats: str | Path | bool | None = None,
    stats_repo: str | None = None,
    build: bool = False,
    max_session_memory: int | None = None,
    low_memory: bool | None = None,
) -> tuple[GlassModel, TokenizerWrapper] | tuple[GlassModel, TokenizerWrapper, dict[str, Any]]:
    """Load a model that decodes with GLASS.

    Args:
        path_or_hf_repo (str): a directory, a Hub repository, an alias (``ALIASES``) or ``demo``.
        tokenizer_config, ..., trust_remote_code: as in ``mlx_lm.load``.
        density, ..., experts: how neurons are chosen; see :class:`glass_mlx.GlassConfig`.
        quality (str, optional): ``"high"``, ``"balanced"`` or ``"fast"``: instead of ``density`` the one that costs at
            most what this says (``model/quality.py``), by what the ranks file knows of the model.
        stats (str or bool, optional): a global-ranks file, or False to use none. Default: the model's own, looked up
            in ``stats/``, the user's cache and ``stats_repo``.
        stats_repo (str, optional): a Hub repository of ranks, ``owner/name`` or ``owner/name@revision``. Default: the
            environment variable ``GLASS_STATS_REPO``.
        build (bool): if there are no ranks, measure them now, with a progress bar, and keep them in the cache.
        max_session_memory: see :class:`glass_mlx.GlassModel`.
        low_memory (bool, optional): as there. Default: where the model and a conversation would not fit into memory
            without it (``decoding/memory_plan.py``), nor with dense routed experts, which are tried first.

    Returns:
        tuple: (GlassModel, tokenizer), and the model's config as a third if ``return_config``.

    Raises:
        GlassError: the model cannot be found, loaded or sparsified, or an argument is out of range.
        StatsError: the ranks file is damaged or belongs to another model.
    """
    config = GlassConfig(density, global_weight, signal, layer_budgets, compensation, experts)
    path = resolve_model(path_or_hf_repo, revision)
    options = {"model_config": model_config, "lazy": lazy, "trust_remote_code": trust_remote_code}
    options["tokenizer_config"] = {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})}
    dense, tokenizer, model_config = load_dense(path, adapter_path, **options)
    model = GlassModel(dense, config, path=path, max_session_memory=max_session_memory, low_memory=bool(low_memory))
    statistics = find_statistics(model, stats, stats_repo)
    if statistics is None and build and stats is not False:
        statistics = build_statistics(model, tokenizer)
    use_statistics(model, statistics, stats is not False)
    choose_density(model, quality)
    fit_memory(model, low_memory)
    return (model, tokenizer, model_config) if return_config else (model, tokenizer)


def wrap(
    model: nn.Module,
    *,
    config: GlassConfig | None = None,
    stats: str | Path | bool | GlobalStatistics | None = None,
    path: str | Path | None = None,
    **choice: Any,
) -> GlassModel:
    """Wrap an mlx-lm model that is already loaded. The model itself keeps its behaviour.

    Args:
        model (nn.Module): the loaded model.
        config (GlassConfig, optional): how neurons are chosen.
        stats: as in :func:`load`, or statistics that have been read already.
        path (str, optional): the model's directory, kept as ``GlassModel.path``.
        choice: fields of ``GlassConfig`` that differ from ``config``.

    Returns:
        GlassModel: the model itself if it is one already.

    Raises:
        GlassError, StatsError: as in :func:`load`; or this is no model, or one that is wrapped already and nothing else
            can be given.
    """
    if isinstance(model, GlassModel):
        if config is not None or stats is not None or path is not None or choice:
            raise GlassError(
                "The model is wrapped already: set its config, or give density and the like to stream_generate; "
                "wrap(model.dense, ...) makes another one."
            )
        return model
    if not isinstance(model, nn.Module):
        raise GlassError(f"wrap takes a model, the first of what mlx_lm.load returns, not {type(model).__name__!r}.")
    config = (config or GlassConfig()).updated(**choice)
    wrapped = GlassModel(model, config, path=Path(path) if path is not None else None)
    statistics = stats.check(wrapped) if isinstance(stats, GlobalStatistics) else find_statistics(wrapped, stats)
    use_statistics(wrapped, statistics, stats is not False)
    return wrapped


def choose_density(model: GlassModel, quality: str | None) -> None:
    """Give a model the density of a quality, if one is given; else warn if its density costs much."""
    if quality is not None:
        model.config = model.config.updated(density=density_for(quality, model.quality))
    elif costs_more_than("fast", model.config.density, model.quality):
        logger.warning(
            "density %g costs this model more than quantising it to 3 bits would; --quality fast gives density %g",
            model.config.density,
            density_for("fast", model.quality),
        )


def fit_memory(model: GlassModel, low_memory: bool | None) -> None:
    """Say how much memory the model takes, and save some where there is too little and nobody said how."""
    plan = plan_memory(model)
    if not plan.fits and low_memory is None:
        plan = _save_memory(model, plan)
    if plan.fits:
        logger.info("memory: %s", plan)
    else:
        logger.warning("memory: %s; choose a smaller model, or one of fewer bits", plan)


def _save_memory(model: GlassModel, plan: MemoryPlan) -> MemoryPlan:
    """Leave routed experts dense, if that saves any; and decode without the dense FFN weights, if it must still be."""
    config = model.config
    model.config = config.updated(experts="dense")
    smaller = plan_memory(model)
    if smaller.needed < plan.needed:
        read = [step_costs(model, config.density, CONTEXT, experts).sparse_step() for experts in ("sparse", "dense")]
        logger.warning(
            "too little memory for compact weights of all routed experts: these stay dense. With --low-memory a token "
            "would read %.0f %% less, and each prompt would read the dense weights from disk",
            100 * (1 - read[0] / read[1]),
        )
        plan = smaller
    else:
        model.config = config
    saved = replace(plan, low_memory=True)
    if plan.fits or saved.needed >= plan.needed:
        return plan
    logger.warning("too little memory to keep the dense FFN weights while decoding: each prompt reads them from disk")
    model.let_go_of_dense_weights()
    return saved


def use_statistics(model: GlassModel, statistics: GlobalStatistics | None, expected: bool) -> None:
    """Give a model its statistics; warn if it has none but would use them."""
    if statistics is not None:
        statistics.use_in(model)
    elif expected and model.config.global_weight != 0 and model.config.density < 1:
        logger.warning(
            "no global ranks for this model: the prompt alone chooses the neurons, and answers stray further from the "
            "dense model's. Measuring them takes minutes for a small model, and can be stopped at any time: "
            "/measure in the chat, or python -m glass_mlx.stats build --model %s",
            model.path or "MODEL",
        )


def build_statistics(model: GlassModel, tokenizer: TokenizerWrapper) -> GlobalStatistics | None:
    """Measure a model's statistics, with a progress bar; None if the user interrupts it or they cannot be written."""
    from .ranks.measure import build_ranks  # only here: it is rarely needed

    if model.part is not None:
        logger.warning("not measured: global ranks are measured on a whole model, on one machine")
        return None
    logger.warning(
        "no global ranks for this model yet: measuring them, once. Ctrl-C goes on without; what was read is kept."
    )
    try:
        return GlobalStatistics.read(build_ranks(model, tokenizer))
    except KeyboardInterrupt:
        pass  # it has been said what is kept
    except GlassError as e:  # the cache cannot be written, say; the model runs without
        logger.warning("not measured: %s", e)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
