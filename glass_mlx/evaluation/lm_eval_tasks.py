"""Accuracy on generation tasks of lm-evaluation-harness, through mlx-lm's own wrapper.

It needs ``pip install 'glass_mlx[eval]'``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..decoding.stream import stream_generate
from ..errors import GlassError
from ..model.config import GlassConfig
from ..model.glass_model import GlassModel
from .tables import text_table

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from mlx_lm.evaluate import MLXLM

# The most tokens of an answer, if neither the task nor a stop text ends it.
_MAX_TOKENS = 512

# By name and density.
Configs = dict[str, dict[float, GlassConfig]]


def standard_configs(densities: list[float], experts: str = GlassConfig.experts) -> Configs:
    """The dense model, and GRIFFIN and GLASS at each density."""
    return {
        "dense": {1.0: GlassConfig(1.0)},
        "griffin": {d: GlassConfig(d, 0.0, "activation", layer_budgets="uniform", experts=experts) for d in densities},
        "glass": {d: GlassConfig(d, experts=experts) for d in densities},
    }


def run_tasks(
    model: GlassModel,
    tokenizer: Any,
    names: list[str],
    configs: Configs,
    include_path: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Run tasks with each configuration. Every question is a session of its own.

    Args:
        model (GlassModel): the model.
        tokenizer: its tokenizer.
        names (list[str]): the tasks' names in lm-evaluation-harness.
        configs (dict): configurations by name and density.
        include_path (str, optional): a folder with YAML files of further tasks.
        limit (int, optional): only the first questions of each task.
        seed (int): of the choice of examples.

    Returns:
        dict: by configuration, density and task the metrics, and the number of questions under ``samples``.

    Raises:
        GlassError: lm-evaluation-harness is not installed, or a task is unknown, lacks its data, or does not let the
            model generate.
    """
    try:
        import lm_eval
        from mlx_lm.evaluate import MLXLM
    except ImportError as e:
        raise GlassError(f"Tasks need lm-evaluation-harness ({e}): pip install 'glass_mlx[eval]'") from e
    manager = _task_manager(names, include_path)
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for kind, by_density in configs.items():
        for density, config in by_density.items():
            lm = _wrapper(MLXLM, model, tokenizer, config)
            chat = {"apply_chat_template": lm.use_chat_template, "fewshot_as_multiturn": lm.use_chat_template}
            seeds = {f"{of}_seed": seed for of in ("random", "numpy_random", "torch_random", "fewshot_random")}
            options = {"tasks": names, "task_manager": manager, "limit": limit, "log_samples": False}
            try:
                results = lm_eval.simple_evaluate(lm, **options, **chat, **seeds)
            except (OSError, ValueError, RuntimeError) as e:  # mostly data that is not available
                raise GlassError(f"{', '.join(names)} cannot be run: {(str(e).splitlines() or [type(e)])[0]}") from e
            metrics = {task: _numbers(row) for task, row in results["results"].items()}
            for task, row in metrics.items():
                row["samples"] = results["n-samples"][task]["effective"]
            found.setdefault(kind, {})[f"{density:g}"] = metrics
    return found


def _task_manager(names: list[str], include_path: str | None) -> TaskManager:
    """lm-evaluation-harness's list of tasks, with all of its own only if needed, because reading them takes long."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if include_path is not None and _unknown(manager, names):
        manager = TaskManager(include_path=include_path)
    unknown = _unknown(manager, names)
    if unknown:
        raise GlassError(f"lm-evaluation-harness has no task {unknown[0]!r}: check the name.")
    return manager


def _wrapper(base: type[MLXLM], model: GlassModel, tokenizer: Any, config: GlassConfig) -> MLXLM:
    """mlx-lm's wrapper around a model that is already loaded. It decodes one answer after the other, because sessions
    do not share a batch."""

    class GlassLM(base):
        def __init__(self):
            super(base, self).__init__()  # mlx-lm's own __init__ would load a model
            self._model, self.tokenizer = model, tokenizer
            self._max_tokens, self._batch_size, self._sampler = None, 1, None
            self.use_chat_template = tokenizer.has_chat_template

        def generate_until(self, requests) -> list[str]:
            return [self._answer(*request.args) for request in requests]

        def _answer(self, context: str, options: dict[str, Any]) -> str:
            if options.get("do_sample") and options.get("temperature"):
                raise GlassError("Tasks that sample their answers are not supported: use one with greedy decoding.")
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
            raise GlassError("Only generation tasks measure sparse decoding, not those that score given texts.")

        loglikelihood_rolling = loglikelihood

    return GlassLM()


def _unknown(manager: TaskManager, names: list[str]) -> list[str]:
    return [name for name in names if not manager.match_tasks([name])]


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task's results: ``exact_match,none`` and the like."""
    return {key: value for key, value in row.items() if "," in key and isinstance(value, (int, float))}


def table(result: dict[str, Any]) -> str:
    """The result of ``evaluate --tasks --json`` as text: metrics by task, configuration and density."""
    configs, lines = result["tasks"], [result["model"]]
    for task, metrics in configs["dense"]["1"].items():
        names = [m for m in metrics if m != "samples" and "_stderr" not in m]
        lines += ["", f"{task}: {metrics['samples']} questions"]
        cells = [
            [kind, density, *(_cell(tasks[task], name) for name in names)]
            for kind, by_density in configs.items()
            for density, tasks in by_density.items()
        ]
        lines += text_table(("", "density", *(name.removesuffix(",none") for name in names)), cells, names=2)
    return "\n".join(lines)


def _cell(metrics: dict[str, float], name: str) -> str:
    error = metrics.get(name.replace(",", "_stderr,", 1))
    return f"{metrics[name]:.4g}" + ("" if error is None else f" ± {error:.2g}")
