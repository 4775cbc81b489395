"""Weights of tokens: SPLADE by heads for masked tokens, the outputs of BGE-M3, and DistilBERT, against transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pooled import (
    TOLERANCE,
    PooledCase,
    check_parity,
    hidden,
    numbers,
    open_pooled,
    params_of,
    prompts_for,
    reference_outputs,
)

from rtp_llm.srt.models.building import ModelBuildError
from tiny_models import make_tiny


def splade(model: Any, outputs: Any) -> torch.Tensor:
    return outputs.logits[0].relu().log1p().amax(0)


def by_predictions(model: Any, outputs: Any) -> torch.Tensor:
    return outputs.prediction_logits[0].relu().log1p().amax(0)


def summed_twice(model: Any, outputs: Any) -> torch.Tensor:
    return outputs.logits[0].relu().log1p().log1p().sum(0)


def write_splade(strategy: str = "max", activation: str = "relu") -> Callable[[Path], None]:
    """Return what adds what sentence-transformers saves of a SparseEncoder."""

    def edit(folder: Path) -> None:
        kinds = {"": "models.MLMTransformer", "1_SpladePooling": "models.SpladePooling"}
        modules = [
            {"path": path, "type": f"sentence_transformers.sparse_encoder.{kind}"} for path, kind in kinds.items()
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_SpladePooling").mkdir()
        settings = {"pooling_strategy": strategy, "activation_function": activation, "word_embedding_dimension": None}
        (folder / "1_SpladePooling" / "config.json").write_text(json.dumps(settings))

    return edit


def m3_heads(hidden_size: int, width: int = 5) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)

    def linear(outputs: int) -> dict[str, torch.Tensor]:
        return {
            "weight": 0.2 * torch.randn(outputs, hidden_size, generator=generator),
            "bias": 0.1 * torch.randn(outputs, generator=generator),
        }

    return {"sparse_linear.pt": linear(1), "colbert_linear.pt": linear(width)}


def write_m3(folder: Path) -> None:
    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    for name, weights in m3_heads(size).items():
        torch.save(weights, folder / name)


def named(architecture: str, edit: Callable[[Path], None] | None = None) -> Callable[[Path], None]:
    """Return what gives a checkpoint an architecture of vLLM's, after another change."""

    def change(folder: Path) -> None:
        if edit is not None:
            edit(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]}))

    return change


def by_head(name: str) -> Callable[[Any, Any], torch.Tensor]:
    def expect(model: Any, outputs: Any) -> torch.Tensor:
        states = hidden(model, outputs)
        weights = m3_heads(states.shape[1])[name]
        return F.linear(states, weights["weight"], weights["bias"])

    return expect


ROBERTA = {"pad_token_id": 1, "max_position_embeddings": 202}
MODERN = {"local_attention": 10, "global_attn_every_n_layers": 2, "pad_token_id": 0, "tie_word_embeddings": True}
THREE = {"num_labels": 3}
DISTIL = {"max_position_embeddings": 200}
EMBEDS = {"embed": lambda model, outputs: hidden(model, outputs)[0], "token_embed": hidden}
M3 = {
    "embed": EMBEDS["embed"],
    "sparse": by_head("sparse_linear.pt"),
    "token_embed": by_head("colbert_linear.pt"),
}
SPARSE = {"sparse": splade}
CASES = [
    PooledCase("bert-splade", "BertForMaskedLM", SPARSE | {"embed": EMBEDS["embed"]}),
    PooledCase("bert-untied", "BertForMaskedLM", SPARSE, {"tie_word_embeddings": False}),
    PooledCase(
        "bert-pretrained", "BertForMaskedLM", {"sparse": by_predictions}, slow=True, reference="BertForPreTraining"
    ),
    PooledCase("roberta-untied", "RobertaForMaskedLM", SPARSE, ROBERTA | {"tie_word_embeddings": False}, slow=True),
    PooledCase("roberta-splade", "RobertaForMaskedLM", SPARSE, ROBERTA, slow=True),
    PooledCase("xlm-roberta-splade", "XLMRobertaForMaskedLM", SPARSE, ROBERTA, slow=True),
    PooledCase("modernbert-splade", "ModernBertForMaskedLM", SPARSE, MODERN, slow=True),
    PooledCase(
        "modernbert-untied", "ModernBertForMaskedLM", SPARSE, MODERN | {"tie_word_embeddings": False}, slow=True
    ),
    PooledCase("distilbert-splade", "DistilBertForMaskedLM", SPARSE, DISTIL, edit=write_splade()),
    PooledCase(
        "summed", "BertForMaskedLM", {"sparse": summed_twice}, edit=write_splade("sum", "log1p_relu"), slow=True
    ),
    PooledCase(
        "as-vllm",
        "BertSpladeSparseEmbeddingModel",
        SPARSE,
        edit=named("BertSpladeSparseEmbeddingModel"),
        slow=True,
        reference="BertForMaskedLM",
    ),
    PooledCase("by-option", "BertForMaskedLM", SPARSE, options={"pooling": "splade"}, slow=True),
    PooledCase("bge-m3", "XLMRobertaModel", M3, ROBERTA, edit=write_m3),
    PooledCase(
        "bge-m3-as-vllm",
        "BgeM3EmbeddingModel",
        M3,
        ROBERTA,
        edit=named("BgeM3EmbeddingModel", write_m3),
        slow=True,
        reference="XLMRobertaModel",
    ),
    PooledCase("distilbert", "DistilBertModel", EMBEDS, DISTIL, slow=True),
    PooledCase(
        "distilbert-labels",
        "DistilBertForSequenceClassification",
        {"classify": lambda model, outputs: outputs.logits[0]},
        DISTIL | THREE,
        slow=True,
    ),
    PooledCase(
        "distilbert-tokens",
        "DistilBertForTokenClassification",
        {"token_classify": lambda model, outputs: outputs.logits[0]},
        DISTIL | THREE,
        slow=True,
    ),
]


@pytest.mark.parametrize("case", params_of(CASES))
def test_outputs_are_those_of_transformers(case: PooledCase, tmp_path: Path) -> None:
    check_parity(case, tmp_path)


def test_bge_m3_weighs_all_tokens_and_gives_vectors_of_all_but_the_first(tmp_path: Path) -> None:
    model_dir = make_tiny("XLMRobertaModel", tmp_path, **ROBERTA, bos_token_id=5)
    write_m3(tmp_path)
    [text] = prompts_for(model_dir, (9,))
    prompt = [5, *text]
    with open_pooled(model_dir) as engine:
        sparse = numbers(engine.encode(input_ids=prompt, task="sparse"))
        vectors = numbers(engine.encode(input_ids=prompt, task="token_embed"))
        alone = engine.encode(input_ids=[5], task="token_embed")
    outputs = reference_outputs(model_dir, "XLMRobertaModel", prompt)
    expected = by_head("sparse_linear.pt")(None, outputs).relu()
    torch.testing.assert_close(sparse, expected, atol=TOLERANCE, rtol=TOLERANCE)
    expected = F.normalize(by_head("colbert_linear.pt")(None, outputs)[1:], dim=-1)
    torch.testing.assert_close(vectors, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert alone["embedding"] == []


def test_splade_alone_is_all_that_its_checkpoints_give(tmp_path: Path) -> None:
    model_dir = make_tiny("BertForMaskedLM", tmp_path)
    with open_pooled(model_dir, pooling="splade") as engine:
        assert engine.tasks == ["sparse"]
    model_dir = make_tiny("BertModel", tmp_path / "bare")
    with pytest.raises(ModelBuildError, match=r"no head for masked tokens.*ForMaskedLM"):
        open_pooled(model_dir, pooling="splade")


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model_dir = make_tiny("XLMRobertaModel", tmp_path, **ROBERTA)
    torch.save({"weight": torch.ones(1, 3), "bias": torch.ones(1)}, tmp_path / "sparse_linear.pt")
    with pytest.raises(ModelBuildError, match=r"sparse_linear.pt must have a weight \[\*, \d+\] and a bias"):
        open_pooled(model_dir)


def test_long_inputs_are_weighed_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rtp_llm.srt.layers import splade as module

    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    check_parity(PooledCase("pieces", "BertForMaskedLM", SPARSE), tmp_path)
