"""mlx-lm's own tests, run on GlassModels (``mlx_lm_suite.py``): each ends as with plain mlx-lm, or is listed here.

They are not part of the package: name their directory, of a checkout of mlx-lm at the installed version, in the
environment variable GLASS_MLX_LM_TESTS.
"""

from __future__ import annotations

import os
from pathlib import Path

import mlx_lm
import mlx_lm_suite as suite
import pytest

VARIABLE = "GLASS_MLX_LM_TESTS"

_FAMILIES = """Klear afmoe bailing_moe bailing_moe_linear deepseek_v32 dots1 exaone_moe glm4_moe glm4_moe_lite
    granitemoehybrid jamba kimi_vl laguna llama4 longcat_flash longcat_flash_ngram mimo_v2_flash qwen3_5_moe
    qwen3_next""".split()

# Tests that may end otherwise, by the reason.
EXPECTED = {
    "conversations are not batched: each decodes with its own weights": """
        test_generate.TestGenerate.test_batch_continued_generation
        test_generate.TestGenerate.test_batch_continued_generation_gated_delta
        test_generate.TestGenerate.test_batch_generate_no_logprobs_by_default
        test_generate.TestGenerate.test_batch_generate_processor_tokens_match_prompt_on_first_step
        test_generate.TestGenerate.test_batch_generate_return_logprobs
        test_generate.TestGenerate.test_batch_generate_with_logits_processors
        test_generate.TestGenerate.test_batch_generate_with_samplers
        test_generate.TestGenerate.test_batch_matches_single
        test_generate.TestGenerate.test_batch_max_kv_size_limits_cache_growth
        test_generate.TestGenerate.test_batch_max_kv_size_none_creates_regular_cache
        test_generate.TestGenerate.test_batch_unique_max_toks
        test_generate.TestGenerate.test_many_batches
        test_generate.TestGenerate.test_remove_prompt_batch_updates_currently_processing""".split(),
    "the test evaluates nothing, GlassModel does, and MLX's CPU backend has experts in float32 only": [
        *(
            f"test_models.TestModels.test_{name}"
            for name in ("deepseek_v3", "hunyuan", "lfm2_moe", "qwen2_moe", "step3p5")
        ),
        "test_models.TestModels.test_all_models",
        *(f"test_models.TestModels.test_all_models [Testing {n}] (model_type='{n}')" for n in _FAMILIES),
    ],
    "names of modules begin with dense": ["test_models.TestModels.test_gemma4_moe_router_quantizes_to_8bit"],
    "decodes on some of the neurons, and compares with all": ["test_models.TestModels.test_llama4_chunked_kv_cache"],
}


def directory() -> Path | None:
    """mlx-lm's tests: where the variable says, or beside the installed package."""
    given = os.environ.get(VARIABLE)
    beside = Path(mlx_lm.__file__).parents[1] / "tests"
    return Path(given) if given else beside if (beside / "test_prompt_cache.py").is_file() else None


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, suite.Outcome]:
    if directory() is None:
        pytest.skip(f"mlx-lm's tests are not here: name their directory in {VARIABLE}")
    return suite.run(directory(), None, tmp_path_factory.mktemp("suite") / "log")


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_as_with_plain_mlx_lm(plain, density, tmp_path):
    ours = suite.run(directory(), density, tmp_path / "log")
    found = suite.differences(plain, ours)
    reasons = {test: reason for reason, tests in EXPECTED.items() for test in tests}
    passed = sum(outcome.outcome == "passed" for outcome in plain.values())
    print(f"density {density}: {len(ours) - len(found)} of {len(ours)} as with mlx-lm, where {passed} pass")
    print("\n".join(f"{test}: {reasons.get(test, how)}" for test, how in found.items()))
    print("not wrapped:", *sorted({left for outcome in ours.values() for left in outcome.left}), sep="\n")
    assert ours and not {test: how for test, how in found.items() if test not in reasons}


SOME_TESTS = """
import os, unittest
from glass_mlx.evaluation.tiny_models import tiny_config
from mlx_lm.models import llama, mamba
from mlx_lm.utils import load

def args(family, name):
    return family.ModelArgs.from_dict(tiny_config(name))

class Test(unittest.TestCase):
    def test_alike(self):
        self.assertEqual(len(llama.Model(args(llama, "llama")).layers), 2)
    def test_demo(self):
        model, tokenizer = load("some/repository")
        self.assertEqual((model.model_type, tokenizer.bos_token_id), ("llama", 1))
    def test_made(self):
        self.assertIs(type(llama.Model(args(llama, "llama"))), llama.Model)
    def test_loaded(self):
        self.assertIs(type(load("some/repository")[0]), llama.Model)
    def test_no_ffn(self):
        self.assertIs(type(mamba.Model(args(mamba, "mamba"))), mamba.Model)
    def test_parts(self):
        for i in range(2):
            with self.subTest(i=i):
                self.assertEqual(i, 0)
    @unittest.skip("here")
    def test_skipped(self):
        pass
    def test_ends_the_process(self):
        os._exit(1)
"""


def test_runner(tmp_path):
    (tmp_path / "test_models.py").write_text(SOME_TESTS)
    (tmp_path / "test_other.py").write_text("raise SystemExit\n")  # not one of the files
    plain = suite.run(tmp_path, None, tmp_path / "log")
    (tmp_path / "test_models.py").write_text(SOME_TESTS.partition("    def test_ends_the_process")[0])
    ours = suite.run(tmp_path, 0.5, tmp_path / "log")
    outcomes = {test.removeprefix("test_models.Test."): outcome for test, outcome in plain.items()}
    assert {test: outcome.outcome for test, outcome in outcomes.items()} == {
        "test_alike": "passed",
        "test_demo": "passed",
        "test_made": "passed",
        "test_loaded": "passed",
        "test_no_ffn": "passed",
        "test_parts": "failed",
        "test_parts (i=0)": "passed",
        "test_parts (i=1)": "failed",
        "test_skipped": "skipped",
        "test_ends_the_process": "crashed",
    }
    assert outcomes["test_parts (i=1)"].why == "AssertionError: 1 != 0"
    different = ["test_ends_the_process", "test_loaded", "test_made"]  # the first one is not there any more
    assert sorted(suite.differences(plain, ours)) == [f"test_models.Test.{name}" for name in different]
    assert [test for test, outcome in ours.items() if outcome.left] == ["test_models.Test.test_no_ffn"]
