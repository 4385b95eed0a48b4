"""Accuracy on generation tasks of lm-evaluation-harness, through mlx-lm's own wrapper.

It needs ``pip install 'glass_mlx[eval]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..decoding.stream import stream_generate
from ..errors import GlassError
from ..model.config import GlassConfig
from ..model.glass_model import GlassModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from mlx_lm.evaluate import MLXLM

# Tokens of an answer, where neither the task nor a stop text ends it.
_MAX_TOKENS = 512


def standard_configs(densities: list[float]) -> dict[str, dict[float, GlassConfig]]:
    """The dense model, and at each density GRIFFIN and GLASS."""
    return {
        "dense": {1.0: GlassConfig(1.0)},
        "griffin": {d: GlassConfig(d, 0.0, "activation", 0, "uniform") for d in densities},
        "glass": {d: GlassConfig(d) for d in densities},
    }


def evaluate(
    model: GlassModel,
    tokenizer: Any,
    names: list[str],
    configs: dict[str, dict[float, GlassConfig]],
    include_path: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Run tasks with each configuration; every question is a session of its own.

    Args:
        model (GlassModel): the model.
        tokenizer: its tokenizer.
        names (list[str]): the tasks, as lm-evaluation-harness calls them.
        configs (dict): configurations by arm and density.
        include_path (str, optional): a folder with YAML files of further tasks.
        limit (int, optional): only so many questions of each task.
        seed (int): of the choice of examples.

    Returns:
        dict: by arm, density and task the metrics, and the number of questions under ``samples``.

    Raises:
        GlassError: lm-evaluation-harness is not installed; there is no such task, its data cannot be had, or it
            does not let the model generate.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from mlx_lm.evaluate import MLXLM
    except ImportError as e:
        raise GlassError(f"Tasks need lm-evaluation-harness ({e}): pip install 'glass_mlx[eval]'") from e
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if include_path is not None and _unknown(manager, names):
        manager = TaskManager(include_path=include_path)  # reading all tasks there are takes long
    unknown = _unknown(manager, names)
    if unknown:
        raise GlassError(f"lm-evaluation-harness has no task {unknown[0]!r}.")
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for arm, by_density in configs.items():
        for density, config in by_density.items():
            lm = _wrapper(MLXLM, model, tokenizer, config)
            try:
                results = lm_eval.simple_evaluate(
                    lm,
                    tasks=names,
                    task_manager=manager,
                    limit=limit,
                    apply_chat_template=lm.use_chat_template,
                    fewshot_as_multiturn=lm.use_chat_template,
                    log_samples=False,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
            except (OSError, ValueError, RuntimeError) as e:  # data that cannot be had, mostly
                raise GlassError(f"{', '.join(names)} cannot be run: {(str(e).splitlines() or [type(e)])[0]}") from e
            metrics = {task: _numbers(row) for task, row in results["results"].items()}
            for task, row in metrics.items():
                row["samples"] = results["n-samples"][task]["effective"]
            found.setdefault(arm, {})[f"{density:g}"] = metrics
    return found


def _wrapper(base: type[MLXLM], model: GlassModel, tokenizer: Any, config: GlassConfig) -> MLXLM:
    """mlx-lm's wrapper around a model that is already loaded. Its answers are decoded one after the other, as sessions
    do not share a batch."""

    class GlassLM(base):
        def __init__(self):
            super(base, self).__init__()  # mlx-lm's own would load a model
            self._model, self.tokenizer = model, tokenizer
            self._max_tokens, self._batch_size, self._sampler = None, 1, None
            self.use_chat_template = tokenizer.has_chat_template

        def generate_until(self, requests) -> list[str]:
            return [self._answer(*request.args) for request in requests]

        def _answer(self, context: str, options: dict[str, Any]) -> str:
            if options.get("do_sample") and options.get("temperature"):
                raise GlassError("Tasks that sample their answers are not supported: only greedy decoding is.")
            prompt = tokenizer.encode(context, add_special_tokens=not self.use_chat_template)
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            tokens = options.get("max_gen_toks", _MAX_TOKENS)
            text, cache = "", model.make_cache(**vars(config))
            for response in stream_generate(model, tokenizer, prompt, tokens, prompt_cache=cache):
                text += response.text
                found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
                if found:
                    return text[: min(found)]
            return text

        def loglikelihood(self, requests):
            raise GlassError("Only generation tasks say something of sparse decoding; this one scores given texts.")

        loglikelihood_rolling = loglikelihood

    return GlassLM()


def _unknown(manager: TaskManager, names: list[str]) -> list[str]:
    return [name for name in names if not manager.match_tasks([name])]


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task's results: ``exact_match,none`` and the like."""
    return {key: value for key, value in row.items() if "," in key and isinstance(value, (int, float))}


def table(result: dict[str, Any]) -> str:
    """Metrics by task, arm and density as text."""
    arms, lines = result["tasks"], [result["model"]]
    for task, metrics in arms["dense"]["1"].items():
        names = [m for m in metrics if m != "samples" and "_stderr" not in m]
        lines += ["", f"{task}: {metrics['samples']} questions"]
        lines.append(f"{'':>14} {'density':>8}" + "".join(f" {name.removesuffix(',none'):>24}" for name in names))
        for arm, by_density in arms.items():
            for density, tasks in by_density.items():
                cells = "".join(f" {_cell(tasks[task], name):>24}" for name in names)
                lines.append(f"{arm:>14} {density:>8}{cells}")
    return "\n".join(lines)


def _cell(metrics: dict[str, float], name: str) -> str:
    error = metrics.get(name.replace(",", "_stderr,", 1))
    return f"{metrics[name]:.4g}" + ("" if error is None else f" ± {error:.2g}")
