"""mlx-lm's families as cases of tests: one of each kind always, and a few of the others (all with --thorough)."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

# One for each set of projections (``evaluation/coverage.py`` lists them), kind of FFN (dense, shared, routed) and kinds
# of prompt cache.
KINDS = frozenset(
    """deepseek_v3 deepseek_v41 exaone falcon_h1 gemma3_text gemma3n gpt2 gpt_neox gpt_oss gptj jamba lfm2 llama llama4
    longcat_flash_ngram muse_glimmer nemotron_h olmo_hybrid openelm phi phi3 phi3small phixtral prism_hadamard_qwen35
    qwen qwen2_moe recurrent_gemma talkie""".split()
)


def by_family(names: Iterable[str], few: int = 4) -> pytest.MarkDecorator:
    """A test of each family by name."""
    others = pytest.mark.few(few)
    cases = [name if name in KINDS else pytest.param(name, marks=others) for name in sorted(names)]
    return pytest.mark.parametrize("name", cases)
