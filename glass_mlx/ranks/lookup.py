"""Where a model's global statistics are found: a given file, ``stats/``, the user's cache, a Hub repository."""

from __future__ import annotations

import logging
import os
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open

from ..errors import GlassError, StatsError
from ..files import SMALL_HEADER, check_header, read_json
from .format import GlobalStatistics
from .identity import describe, fingerprint, fingerprints

if TYPE_CHECKING:
    from ..model.glass_model import GlassModel

logger = logging.getLogger("glass_mlx")

CACHE_VARIABLE = "GLASS_CACHE_DIR"
REPO_VARIABLE = "GLASS_STATS_REPO"

# A wheel carries a copy of the checkout's stats/ inside the package.
_INSTALLED = Path(__file__).parents[1] / "_stats"
STATS_DIR = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "stats"


def cache_dir() -> Path:
    """The directory of statistics built on this machine: ``GLASS_CACHE_DIR``, or the platform's cache directory."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_path("glass_mlx"))


def cached_file(model: GlassModel) -> Path:
    """The cache file for a model's statistics, whether it exists or not."""
    return cache_dir() / f"{fingerprint(model)}.safetensors"


def local_files() -> list[tuple[str, Path]]:
    """The statistics files on this machine, each with the place it is in: ``stats`` or ``cache``."""
    places = (("stats", STATS_DIR), ("cache", cache_dir()))
    return [(place, path) for place, directory in places for path in sorted(directory.glob("*.safetensors"))]


def measured_models() -> set[str]:
    """Names of the models that have statistics on this machine, and of those that they were converted from."""
    names = set()
    for _, path in local_files():
        try:
            check_header(path, SMALL_HEADER)
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError, ValueError):
            continue
        names |= {metadata.get("model", ""), metadata.get("original", "")}
    return names - {""}


def find_statistics(
    model: GlassModel, source: str | Path | bool | None = None, repo: str | None = None
) -> GlobalStatistics | None:
    """Find the global statistics of a model.

    Args:
        model (GlassModel): the model.
        source (str or bool, optional): a file; False to use none; None to look in ``stats/``, the cache and the Hub
            repository, in this order.
        repo (str, optional): the Hub repository, ``owner/name`` or ``owner/name@revision``. Default: the environment
            variable ``GLASS_STATS_REPO``.

    Returns:
        GlobalStatistics | None: verified to be this model's; None if none were found.

    Raises:
        StatsError: a file is damaged, or the given one belongs to another model.
        GlassError: the repository named by ``repo`` cannot be read.
    """
    if source is False:
        return None
    if source is not None and source is not True:
        return GlobalStatistics.read(source).check(model)
    file = _in_index(model, _read_index(STATS_DIR / "index.json"))
    if file:
        return GlobalStatistics.read(STATS_DIR / file).check(model)
    for cached in (cache_dir() / f"{ours}.safetensors" for ours in fingerprints(model)):
        if cached.exists():
            try:
                return GlobalStatistics.read(cached).check(model)
            except StatsError as e:
                logger.warning("ignored the cached ranks: %s", e)
    if repo:
        return _from_hub(model, repo)
    if os.environ.get(REPO_VARIABLE):
        try:
            return _from_hub(model, os.environ[REPO_VARIABLE])
        except GlassError as e:  # a model must run offline, too
            logger.warning("no ranks from %s: %s", REPO_VARIABLE, e)
    return None


def _from_hub(model: GlassModel, repo: str) -> GlobalStatistics | None:
    from ..hub.access import download  # only here: it takes long to import

    name, _, revision = repo.partition("@")
    file = _in_index(model, _read_index(download(name, "index.json", revision or None)))
    if file is None:
        return None
    return GlobalStatistics.read(download(name, file, revision or None)).check(model)


def _read_index(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    try:
        entries = read_json(path)["models"]
        return [entry for entry in entries if _plain_name(entry["file"])]
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise StatsError(f"{path} is not an index of ranks files: {e}") from e


def _plain_name(file: Any) -> bool:
    """Whether a name is a file's beside the index, and nothing else: an index may come from the network."""
    return isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")


def _in_index(model: GlassModel, entries: list[dict[str, str]]) -> str | None:
    """The file for a model: measured on these very weights, or else on the model that it was converted from."""
    original = describe(model)["original"]
    ours = fingerprints(model)
    own = (entry for entry in entries if entry.get("fingerprint") in ours)
    base = (entry for entry in entries if original and entry.get("original") == original)
    return next((entry["file"] for entry in chain(own, base)), None)
