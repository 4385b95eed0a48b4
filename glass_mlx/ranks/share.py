"""Share ranks files on the Hugging Face Hub: the file, an index that ``lookup`` reads, and a card."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from ..errors import GlassError
from ..hub.access import download, hub_access, hub_api
from .format import FORMAT_VERSION, GlobalStatistics, index_entry

INDEX, CARD = "index.json", "README.md"

_ABOUT = """## Global neuron ranks for GLASS

Each `.safetensors` file says which neurons of one model's feed-forward layers matter most to what the model tends to
generate: their ranks, and their mean share of a token's energy. It holds no weights. With it, `glass_mlx` decodes with
only the neurons that matter (GLASS, [arXiv 2508.14302](https://arxiv.org/abs/2508.14302)):

```sh
python -m glass_mlx.chat --model MODEL --stats-repo {repo}
export GLASS_STATS_REPO={repo}  # or this, for every command; {repo}@COMMIT pins it
```

`index.json` lists the files and the models they belong to; any other model refuses a file. The ranks are measurements
of a model, whose own licence may apply to their use.

"""


def upload(
    path: str | Path,
    repo: str,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
    license: str = "other",
) -> str:
    """Upload a ranks file with the updated index and card of its repository, in one commit.

    Args:
        path (str or Path): the file.
        repo (str): the Hub repository ``owner/name``; created if it does not exist.
        revision (str, optional): the branch. Default: main.
        private (bool): make a new repository private.
        message (str, optional): the commit message.
        license (str): the licence that a new card names.

    Returns:
        str: the commit's URL.

    Raises:
        GlassError: the file is unusable, or the Hub refuses it. The repository's files are as before; a new repository
            may be left empty.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise GlassError(f"{path} would not be found in {repo}: rename it so that it ends in .safetensors.")
    entry = index_entry(path.name, metadata := GlobalStatistics.read(path).metadata)
    with hub_access(repo, revision):
        api = hub_api()
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo, revision=revision)
        if private and not info.private:
            raise GlassError(f"{repo} exists and is public: make it private on its Hub page, or upload publicly.")
        there = {s.rfilename for s in info.siblings or ()}
        old = {f: download(repo, f, info.sha).read_bytes() for f in (INDEX, CARD) if f in there}
        new = {INDEX: _index(old.get(INDEX), entry, repo), CARD: _card(old.get(CARD), repo, entry, metadata, license)}
        operations = [CommitOperationAdd(path.name, path)]
        operations += [CommitOperationAdd(file, text.encode()) for file, text in new.items()]
        message = message or f"Add global ranks of {entry['model'] or path.stem}"
        return api.create_commit(
            repo, operations, commit_message=message, revision=revision, parent_commit=info.sha
        ).commit_url


def _index(old: bytes | None, entry: dict[str, str], repo: str) -> str:
    """A repository's index with an entry added; it replaces the entry of the same model."""
    try:
        index = json.loads(old) if old else {"format_version": FORMAT_VERSION, "models": []}
        if index["format_version"] != FORMAT_VERSION:
            raise ValueError
        others = [e for e in index["models"] if e["fingerprint"] != entry["fingerprint"]]
        taken = [e["model"] for e in others if e["file"] == entry["file"]]
        index["models"] = sorted([*others, entry], key=lambda e: e["file"])
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise GlassError(f"{repo} has an index.json of another version: use another repository.") from e
    if taken:
        raise GlassError(f"{repo} already has a {entry['file']}, for {taken[0]}: rename your file.")
    return json.dumps(index, indent=2) + "\n"


def _card(old: bytes | None, repo: str, entry: dict[str, str], metadata: dict[str, str], license: str) -> str:
    """A repository's card with a file's section added or replaced; everything else stays."""
    name = "license_name: that-of-each-model\n" if license == "other" else ""
    front = f"---\nlicense: {license}\n{name}tags:\n- glass\n- mlx\n---\n\n"
    text = old.decode() if old else front + f"# {repo.split('/')[1]}\n"
    sizes = json.loads(metadata["sizes"])
    rows = {k: v for k, v in sorted(metadata.items()) if v and k not in ("format_version", "sizes", "blocks")}
    rows = {"model": entry["model"], **rows, "FFN layers": len(sizes), "neurons": sum(sizes)}
    cells = ((k, re.sub(r"([|<>\[\]`*\\])", r"\\\1", " ".join(str(v).split()))) for k, v in rows.items())
    section = f"## {entry['file']}\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in cells) + "\n"
    parts = [part.rstrip("\n") + "\n\n" for part in re.split(r"^(?=## )", text, flags=re.MULTILINE)]
    for new in (_ABOUT.format(repo=repo), section):
        heading = new.partition("\n")[0]
        at = next((i for i, part in enumerate(parts) if part.partition("\n")[0].rstrip() == heading), len(parts))
        parts[at : at + 1] = [new]
    return "".join(parts).rstrip("\n") + "\n"
