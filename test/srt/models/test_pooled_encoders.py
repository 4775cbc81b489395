"""Further encoders, and decoders whose tokens see both ways, against transformers in float32."""

import json
from pathlib import Path

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
BOTH_WAYS = {"use_bidirectional_attention": True, "sliding_window": 8}

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
]


@pytest.mark.parametrize("case", params_of(CASES))
def test_outputs_are_those_of_transformers(case: PooledCase, tmp_path: Path) -> None:
    check_parity(case, tmp_path)


def rewrite(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def add_weights(folder: Path, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(load_file(folder / "model.safetensors") | named, folder / "model.safetensors", metadata={"format": "pt"})
    return named


def test_decoders_that_see_both_ways_make_no_text(tmp_path: Path) -> None:
    model_dir = make_tiny("Gemma3ForCausalLM", tmp_path, **BOTH_WAYS)
    with open_pooled(model_dir) as engine, pytest.raises(InvalidRequest, match="makes no text"):
        engine.generate(input_ids=[3, 4, 5])


# Models whose own code is not transformers': Llama-Nemotron's, and Qwen2.5-Math's.


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["avg", "last", "cls"])
def test_llama_both_ways(tmp_path: Path, pooling: str) -> None:
    model_dir = make_tiny("LlamaModel", tmp_path, is_causal=False)
    prompts = prompts_for(model_dir, (21, 8))
    states = [hidden(None, reference_outputs(model_dir, "LlamaModel", prompt)) for prompt in prompts]
    expected = [{"avg": s.mean(0), "last": s[-1], "cls": s[0]}[pooling] for s in states]
    rewrite(tmp_path, architectures=["LlamaBidirectionalModel"], model_type="llama_bidirec", pooling=pooling)
    with open_pooled(model_dir) as engine:
        for result, wanted in zip(engine.encode(input_ids=prompts, normalize=False), expected, strict=True):
            torch.testing.assert_close(numbers(result), wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.slow
def test_llama_both_ways_scores_pairs(tmp_path: Path) -> None:
    model_dir = make_tiny("LlamaForSequenceClassification", tmp_path, is_causal=False, num_labels=1)
    prompts = prompts_for(model_dir, (21, 8))
    score = reference_model(model_dir, "LlamaForSequenceClassification").score
    outputs = [reference_outputs(model_dir, "LlamaForSequenceClassification", prompt) for prompt in prompts]
    expected = [score(output.hidden_states[-1][0].mean(0)) for output in outputs]
    architecture = "LlamaBidirectionalForSequenceClassification"
    rewrite(tmp_path, architectures=[architecture], model_type="llama_bidirec", pooling="avg")
    with open_pooled(model_dir) as engine:
        results = engine.encode(input_ids=prompts, task="score", normalize=False)
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(numbers(result), wanted.detach(), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("architecture", "num_outputs"),
    [("Qwen2ForRewardModel", 1), pytest.param("Qwen2ForProcessRewardModel", 2, marks=pytest.mark.slow)],
)
def test_rewards(tmp_path: Path, architecture: str, num_outputs: int) -> None:
    model_dir = make_tiny("Qwen2ForCausalLM", tmp_path)
    size = json.loads((tmp_path / "config.json").read_text())["hidden_size"]
    draw = torch.Generator().manual_seed(4)
    head = add_weights(
        tmp_path,
        score__0__weight=torch.randn(size, size, generator=draw) / size**0.5,
        score__0__bias=torch.randn(size, generator=draw),
        score__2__weight=torch.randn(num_outputs, size, generator=draw) / size**0.5,
        score__2__bias=torch.randn(num_outputs, generator=draw),
    )
    prompts = prompts_for(model_dir, (21, 8))
    prompts[0][4] = prompts[0][17] = 6
    prompts[1] = [token if token != 6 else 7 for token in prompts[1]]

    def numbers_of(prompt: list[int]) -> torch.Tensor:
        states = hidden(None, reference_outputs(model_dir, "Qwen2ForCausalLM", prompt))
        states = torch.relu(states @ head["score.0.weight"].T + head["score.0.bias"])
        lines = states @ head["score.2.weight"].T + head["score.2.bias"]
        return lines[-1] if num_outputs == 1 else lines[[i for i, token in enumerate(prompt) if token == 6]]

    expected = [numbers_of(prompt) for prompt in prompts]
    rewrite(tmp_path, architectures=[architecture], step_token_id=6)
    with open_pooled(model_dir, chunked_prefill_size=16) as engine:
        results = engine.encode(input_ids=prompts, task="reward", normalize=False)
        if num_outputs == 2:
            assert results[1]["embedding"] == []  # no step ends in it
            results, expected = results[:1], expected[:1]
            [probabilities] = engine.encode(input_ids=prompts[:1], task="reward")
            torch.testing.assert_close(numbers(probabilities), expected[0].softmax(-1))
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(numbers(result), wanted, atol=TOLERANCE, rtol=TOLERANCE)
