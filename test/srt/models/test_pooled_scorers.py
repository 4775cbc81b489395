"""Decoders that score a pair of texts by the logits of chosen tokens at its end, against transformers in float32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pooled import TOLERANCE, PooledCase, check_parity, numbers, open_pooled, params_of, prompts_for, reference_outputs

from rtp_llm.srt.configs.model_config import ModelConfigError
from rtp_llm.srt.models.building import ModelBuildError
from tiny_models import make_tiny

NO, YES = 7, 11
TWO = json.dumps({"classifier_from_token": [NO, YES], "method": "from_2_way_softmax"})
AS_VLLM = {"classifier_from_token": [NO, YES], "is_original_qwen3_reranker": True}
LABELS = json.dumps({"classifier_from_token": [3, 9, 4], "method": "no_post_processing"})
ONE = json.dumps({"classifier_from_token": [YES], "method": "no_post_processing"})


def difference(model: Any, outputs: Any) -> torch.Tensor:
    """The logarithm of the odds of the softmax over both tokens' logits."""
    return outputs.logits[0, -1, YES] - outputs.logits[0, -1, NO]


def logits_of(*ids: int) -> Callable[[Any, Any], torch.Tensor]:
    return lambda model, outputs: outputs.logits[0, -1, list(ids)]


def overridden(overrides: str) -> dict[str, Any]:
    return {"json_model_override_args": overrides}


def as_vllm(architecture: str) -> dict[str, Any]:
    return overridden(json.dumps({"architectures": [architecture], **AS_VLLM}))


def write_logit_score(folder: Path) -> None:
    """As sentence-transformers saves a CrossEncoder of a decoder."""
    kinds = {"": "base.modules.transformer.Transformer", "1_LogitScore": "cross_encoder.modules.logit_score.LogitScore"}
    modules = [
        {"idx": i, "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_LogitScore").mkdir()
    settings = {"true_token_id": YES, "false_token_id": NO, "module_input_name": "causal_logits"}
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps(settings))


SCORES = {"score": difference}
QWEN3, GEMMA2 = "Qwen3ForCausalLM", "Gemma2ForCausalLM"
CASES = [
    PooledCase("qwen3", QWEN3, SCORES, options=overridden(TWO) | {"chunked_prefill_size": 16}),
    PooledCase("as-vllm", QWEN3, SCORES, options=as_vllm("Qwen3ForSequenceClassification"), slow=True),
    PooledCase("untied", QWEN3, SCORES, {"tie_word_embeddings": False}, overridden(TWO), slow=True),
    PooledCase("logit-score", QWEN3, SCORES, edit=write_logit_score, slow=True),
    PooledCase("labels", QWEN3, {"classify": logits_of(3, 9, 4)}, options=overridden(LABELS), slow=True),
    PooledCase("one", QWEN3, {"score": logits_of(YES)}, options=overridden(ONE), slow=True),
    PooledCase("soft-cap", GEMMA2, SCORES, {"final_logit_softcapping": 3.0}, overridden(TWO), slow=True),
    PooledCase("scaled", "GraniteForCausalLM", SCORES, {"logits_scaling": 3.0}, overridden(TWO), slow=True),
    PooledCase("llama", "LlamaForCausalLM", SCORES, options=overridden(TWO), slow=True),
    PooledCase("gpt2", "GPT2LMHeadModel", SCORES, options=overridden(TWO), slow=True),
]


@pytest.mark.parametrize("case", params_of(CASES))
def test_outputs_are_those_of_transformers(case: PooledCase, tmp_path: Path) -> None:
    check_parity(case, tmp_path)


def test_scores_are_probabilities_and_prefixes_come_from_the_cache(tmp_path: Path) -> None:
    model_dir = make_tiny(QWEN3, tmp_path)
    [query, *documents] = prompts_for(model_dir, (70, 9, 17, 1))
    pairs = [query + document for document in documents]
    with open_pooled(model_dir, inline=True, **overridden(TWO)) as engine:
        assert engine.tasks == ["score"]
        results = engine.encode(input_ids=pairs, task="score")
        stats = engine._runner.core.scheduler.stats
        assert stats.computed_tokens == 70 + 9 + 17 + 1  # the query once, for documents that came together
        for result, pair in zip(results, pairs, strict=True):
            chosen = reference_outputs(model_dir, QWEN3, pair).logits[0, -1, [NO, YES]]
            torch.testing.assert_close(numbers(result), chosen.softmax(-1)[1:], atol=TOLERANCE, rtol=TOLERANCE)
        text = engine.generate(input_ids=query, sampling_params={"temperature": 0, "max_new_tokens": 1})
        best = reference_outputs(model_dir, QWEN3, query).logits[0, -1].argmax()
        assert text["output_ids"] == [int(best)]  # it makes tokens as before


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
def test_on_two_ranks(tmp_path: Path) -> None:
    model_dir = make_tiny(QWEN3, tmp_path)
    prompts = prompts_for(model_dir)
    with open_pooled(model_dir, tp_size=2, **overridden(TWO)) as engine:
        results = engine.encode(input_ids=prompts, task="score", normalize=False)
    for result, prompt in zip(results, prompts, strict=True):
        expected = difference(None, reference_outputs(model_dir, QWEN3, prompt))
        torch.testing.assert_close(numbers(result)[0], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"classifier_from_token": "yes"}, ModelConfigError, "must be a list of tokens"),
        ({"classifier_from_token": ["a"], "method": "from_2_way_softmax"}, ModelConfigError, "is for two tokens"),
        ({"classifier_from_token": ["a"], "method": "mean"}, ModelConfigError, "method must be 'from_2_way_softmax'"),
        ({"classifier_from_token": ["a", "no such token"]}, ModelBuildError, "'no such token' is no token"),
    ],
)
def test_tokens_that_cannot_be_scored_are_refused(
    overrides: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    model_dir = make_tiny(QWEN3, tmp_path)
    with pytest.raises(error, match=words):
        open_pooled(model_dir, **overridden(json.dumps(overrides)))
