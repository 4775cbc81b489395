"""Further encoders, and decoders whose tokens see both ways, against transformers in float32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pooled import (
    TOLERANCE,
    PooledCase,
    check_parity,
    hidden,
    numbers,
    open_pooled,
    params_of,
    prompts_for,
    reference_model,
    reference_outputs,
)
from safetensors.torch import load_file, save_file

from rtp_llm.srt.sampling_params import InvalidRequest
from tiny_models import make_tiny

EMBEDS = {"embed": lambda model, outputs: hidden(model, outputs)[0], "token_embed": hidden}
MEAN = {"embed": lambda model, outputs: hidden(model, outputs).mean(0), "token_embed": hidden}
LAST = {"embed": lambda model, outputs: hidden(model, outputs)[-1], "token_embed": hidden}
CLASSIFIES = {"classify": lambda model, outputs: outputs.logits[0]}
LABELS_OF_TOKENS = {"token_classify": lambda model, outputs: outputs.logits[0]}
THREE = {"num_labels": 3}
MODERN = {"local_attention": 10, "global_attn_every_n_layers": 2, "pad_token_id": 0}
CAUSAL_NO_MORE = {"is_causal": False}
STEP = 6  # the id behind each step of an answer
BOTH_WAYS = {"use_bidirectional_attention": True, "sliding_window": 8}


def rewritten(**entries: object) -> Callable[[Path], None]:
    """Return what changes entries of config.json."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return edit


def both_ways(architecture: str, pooling: str) -> Callable[[Path], None]:
    """Return what makes a checkpoint of Llama-Nemotron's, whose code is not transformers', of a Llama's."""
    return rewritten(architectures=[architecture], model_type="llama_bidirec", pooling=pooling)


def scored_mean(model: Any, outputs: Any) -> torch.Tensor:
    return model.score(hidden(model, outputs).mean(0))


def rewarding(architecture: str, num_outputs: int) -> Callable[[Path], None]:
    """Return what makes a checkpoint of Qwen2.5-Math's, whose code is not transformers', of a Qwen2's: a head."""

    def edit(folder: Path) -> None:
        size = json.loads((folder / "config.json").read_text())["hidden_size"]
        draw = torch.Generator().manual_seed(4)
        head = {
            "score.0.weight": torch.randn(size, size, generator=draw) / size**0.5,
            "score.0.bias": torch.randn(size, generator=draw),
            "score.2.weight": torch.randn(num_outputs, size, generator=draw) / size**0.5,
            "score.2.bias": torch.randn(num_outputs, generator=draw),
        }
        weights = folder / "model.safetensors"
        save_file(load_file(weights) | head, weights, metadata={"format": "pt"})
        rewritten(architectures=[architecture], step_token_id=STEP)(folder)

    return edit


def rewards(model: Any, outputs: Any) -> torch.Tensor:
    """A line for each token."""
    head = load_file(Path(model.name_or_path) / "model.safetensors")
    states = torch.relu(hidden(model, outputs) @ head["score.0.weight"].T + head["score.0.bias"])
    return states @ head["score.2.weight"].T + head["score.2.bias"]


def last_reward(model: Any, outputs: Any) -> torch.Tensor:
    return rewards(model, outputs)[-1]


CASES = [
    PooledCase("modernbert", "ModernBertModel", EMBEDS, MODERN),
    PooledCase("modernbert-masked", "ModernBertForMaskedLM", {"token_embed": hidden}, MODERN, slow=True),
    PooledCase("modernbert-labels", "ModernBertForSequenceClassification", CLASSIFIES, MODERN | THREE, slow=True),
    PooledCase(
        "modernbert-mean",
        "ModernBertForSequenceClassification",
        CLASSIFIES,
        MODERN | THREE | {"classifier_pooling": "mean", "attention_bias": True, "mlp_bias": True, "norm_bias": True},
        slow=True,
    ),
    PooledCase("modernbert-tokens", "ModernBertForTokenClassification", LABELS_OF_TOKENS, MODERN | THREE, slow=True),
    PooledCase("nomic", "NomicBertModel", MEAN),
    PooledCase("nomic-masked", "NomicBertForMaskedLM", {"token_embed": hidden}, slow=True),
    PooledCase("nomic-labels", "NomicBertForSequenceClassification", CLASSIFIES, THREE, slow=True),
    PooledCase("nomic-tokens", "NomicBertForTokenClassification", LABELS_OF_TOKENS, THREE, slow=True),
    PooledCase("gte", "GteModel", EMBEDS, {"type_vocab_size": 1}),
    PooledCase("gte-no-types", "GteModel", EMBEDS, {"type_vocab_size": 0}, slow=True),
    PooledCase("gte-masked", "GteForMaskedLM", {"token_embed": hidden}, slow=True),
    PooledCase("gte-labels", "GteForSequenceClassification", CLASSIFIES, THREE, slow=True),
    PooledCase("gte-tokens", "GteForTokenClassification", LABELS_OF_TOKENS, THREE, slow=True),
    PooledCase("embedding-gemma", "Gemma3TextModel", LAST, BOTH_WAYS),
    PooledCase("qwen2-both-ways", "Qwen2Model", LAST, {"is_causal": False}, slow=True),
    PooledCase("mistral-window-both-ways", "MistralModel", LAST, {"is_causal": False, "sliding_window": 6}, slow=True),
    PooledCase(
        "llama-both-ways",
        "LlamaBidirectionalModel",
        MEAN,
        CAUSAL_NO_MORE,
        edit=both_ways("LlamaBidirectionalModel", "avg"),
        reference="LlamaModel",
    ),
    PooledCase(
        "llama-both-ways-last",
        "LlamaBidirectionalModel",
        LAST,
        CAUSAL_NO_MORE,
        edit=both_ways("LlamaBidirectionalModel", "last"),
        reference="LlamaModel",
        slow=True,
    ),
    PooledCase(
        "llama-both-ways-scores",
        "LlamaBidirectionalForSequenceClassification",
        {"score": scored_mean, "classify": scored_mean},
        CAUSAL_NO_MORE | {"num_labels": 1},
        edit=both_ways("LlamaBidirectionalForSequenceClassification", "avg"),
        reference="LlamaForSequenceClassification",
        slow=True,
    ),
    PooledCase(
        "qwen2-reward",
        "Qwen2ForRewardModel",
        {"reward": last_reward},
        options={"chunked_prefill_size": 16},
        edit=rewarding("Qwen2ForRewardModel", 1),
        reference="Qwen2ForCausalLM",
    ),
]


@pytest.mark.parametrize("case", params_of(CASES))
def test_outputs_are_those_of_transformers(case: PooledCase, tmp_path: Path) -> None:
    check_parity(case, tmp_path)


def test_decoders_that_see_both_ways_make_no_text(tmp_path: Path) -> None:
    model_dir = make_tiny("Gemma3ForCausalLM", tmp_path, **BOTH_WAYS)
    with open_pooled(model_dir) as engine, pytest.raises(InvalidRequest, match="makes no text"):
        engine.generate(input_ids=[3, 4, 5])


STEPS = PooledCase(
    "qwen2-process-reward",
    "Qwen2ForProcessRewardModel",
    {"reward": rewards},
    options={"chunked_prefill_size": 16},
    edit=rewarding("Qwen2ForProcessRewardModel", 2),
    reference="Qwen2ForCausalLM",
)
CASES.append(STEPS)  # for the page of supported models; its test is the one below


def test_steps_are_rewarded(tmp_path: Path) -> None:
    model_dir = STEPS.make(tmp_path)
    prompts = prompts_for(model_dir, (21, 8))
    prompts[0][4] = prompts[0][17] = STEP
    prompts[1] = [token if token != STEP else STEP + 1 for token in prompts[1]]
    with open_pooled(model_dir, **STEPS.options) as engine:
        raw, nothing = engine.encode(input_ids=prompts, task="reward", normalize=False)
        [probabilities] = engine.encode(input_ids=prompts[:1], task="reward")
    model = reference_model(model_dir, "Qwen2ForCausalLM")
    lines = rewards(model, reference_outputs(model_dir, "Qwen2ForCausalLM", prompts[0]))
    expected = lines[[i for i, token in enumerate(prompts[0]) if token == STEP]]
    torch.testing.assert_close(numbers(raw), expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(numbers(probabilities), expected.softmax(-1), atol=TOLERANCE, rtol=TOLERANCE)
    assert nothing["embedding"] == []  # no step ends in it
