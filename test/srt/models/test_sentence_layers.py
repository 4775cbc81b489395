"""Modules of sentence-transformers behind a model: against formulas, and against sentence-transformers itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from pooled import TOLERANCE, hidden, numbers, open_pooled, prompts_for, reference_outputs
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from rtp_llm import Engine
from rtp_llm.srt.models.building import ModelBuildError
from rtp_llm.srt.sampling_params import InvalidRequest
from tiny_models import make_tiny
from tiny_server import make_checkpoint

TOKENS = {"module_input_name": "token_embeddings"}
PAIR = (["the cat", "hello world"], ["a dog", "the cat sat"])


def write(folder: Path, modules: list[tuple[str, dict[str, Any], dict[str, torch.Tensor]]], **settings: Any) -> None:
    """Write modules behind a model: kind, configuration, weights. ``settings``: of the checkpoint."""
    kinds = ["Transformer", *(kind for kind, _, _ in modules)]
    (folder / "modules.json").write_text(
        json.dumps([{"path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
                    for i, kind in enumerate(kinds)])
    )  # fmt: skip
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    for i, (kind, config, weights) in enumerate(modules, 1):
        path = folder / f"{i}_{kind}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        if weights:
            save_file(weights, path / "model.safetensors")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(inputs: int, outputs: int, activation: str, **settings: Any) -> Any:
    weights = {"linear.weight": drawn(outputs, inputs), "linear.bias": drawn(outputs, seed=1)}
    if settings.get("use_residual") and inputs != outputs:
        weights["residual.weight"] = drawn(outputs, inputs, seed=2)
    config = {
        "in_features": inputs,
        "out_features": outputs,
        "activation_function": f"torch.nn.modules.activation.{activation}",
    }
    return "Dense", config | settings, weights


def mean_of(folder: str, prompt: list[int]) -> torch.Tensor:
    return hidden(None, reference_outputs(folder, "BertModel", prompt)).mean(0)


def test_layers_with_residuals_and_norms_in_their_order(tmp_path: Path) -> None:
    folder = make_tiny("BertModel", tmp_path)
    size = json.loads((tmp_path / "config.json").read_text())["hidden_size"]
    same, smaller = dense(size, size, "Tanh", use_residual=True), dense(size, 6, "SiLU", use_residual=True)
    norm = ("LayerNorm", {"dimension": 6}, {"norm.weight": drawn(6) + 1, "norm.bias": drawn(6, seed=4)})
    pooling = ("Pooling", {"word_embedding_dimension": size}, {})  # no mode is the mean
    write(tmp_path, [pooling, ("Normalize", {}, {}), same, smaller, norm, ("Normalize", {}, {})], truncate_dim=4)
    prompts = prompts_for(folder)
    with open_pooled(folder) as engine:
        results = engine.encode(input_ids=prompts)
    for prompt, result in zip(prompts, results, strict=True):
        x = F.normalize(mean_of(folder, prompt), dim=0)
        x = torch.tanh(F.linear(x, same[2]["linear.weight"], same[2]["linear.bias"])) + x
        x = F.silu(F.linear(x, smaller[2]["linear.weight"], smaller[2]["linear.bias"])) + F.linear(
            x, smaller[2]["residual.weight"]
        )
        x = F.normalize(F.layer_norm(x, (6,), norm[2]["norm.weight"], norm[2]["norm.bias"]), dim=0)
        torch.testing.assert_close(numbers(result), x[:4], atol=TOLERANCE, rtol=TOLERANCE)


def test_layers_on_tokens(tmp_path: Path) -> None:
    folder = make_tiny("BertModel", tmp_path)
    size = json.loads((tmp_path / "config.json").read_text())["hidden_size"]
    layer = dense(size, 6, "Tanh", **TOKENS)
    write(tmp_path, [layer, ("Normalize", TOKENS, {}), ("Pooling", {"pooling_mode": ["max", "mean"]}, {})])
    prompts = prompts_for(folder)
    with open_pooled(folder) as engine:
        pooled, tokens = (engine.encode(input_ids=prompts, task=task) for task in ("embed", "token_embed"))
        assert engine.tasks == ["embed", "token_embed"]
    for prompt, result, lines in zip(prompts, pooled, tokens, strict=True):
        states = hidden(None, reference_outputs(folder, "BertModel", prompt))
        states = torch.tanh(F.linear(states, layer[2]["linear.weight"], layer[2]["linear.bias"]))
        wanted = F.normalize(states, dim=-1)
        torch.testing.assert_close(numbers(lines), wanted, atol=TOLERANCE, rtol=TOLERANCE)
        both = torch.cat([states.amax(0), states.mean(0)])
        torch.testing.assert_close(numbers(result), both, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_model_of_late_interaction_has_vectors_of_tokens_alone(tmp_path: Path) -> None:
    folder = make_tiny("BertModel", tmp_path)
    size = json.loads((tmp_path / "config.json").read_text())["hidden_size"]
    write(tmp_path, [dense(size, 6, "Identity", **TOKENS), ("Normalize", TOKENS, {}), ("MultiVectorMask", {}, {})])
    with open_pooled(folder) as engine:
        assert engine.tasks == ["token_embed"]
        lines = numbers(engine.encode(input_ids=[5, 6, 7], task="token_embed"))
    assert lines.shape == (3, 6)
    torch.testing.assert_close(lines.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([("Pooling", {}, {}), dense(5, 4, "Tanh")], "takes vectors of 5 components, but gets"),
        (
            [("Pooling", {}, {}), ("LayerNorm", {"dimension": 64}, {"norm.weight": torch.ones(64)})],
            r"must have the weights norm.bias \[64\], norm.weight \[64\] .* not norm.weight \[64\]",
        ),
    ],
)
def test_layers_that_do_not_fit(tmp_path: Path, modules: Any, message: str) -> None:
    folder = make_tiny("BertModel", tmp_path, hidden_size=64)
    write(tmp_path, modules)
    with pytest.raises(ModelBuildError, match=message):
        open_pooled(folder)


# With a tokenizer, which puts nothing around texts


def with_tokenizer(architecture: str, folder: Path, **config: Any) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_checkpoint(folder / "with-tokenizer"))
    make_tiny(architecture, folder, **{"vocab_size": len(tokenizer), "max_position_embeddings": 64} | config)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken", "max"])
def test_the_text_before_an_input_is_left_out_of_the_pooling(tmp_path: Path, mode: str) -> None:
    folder = with_tokenizer("BertModel", tmp_path)
    prompts = {"query": "the cat ", "none": ""}
    pooling = {"pooling_mode": mode, "include_prompt": False}
    write(tmp_path, [("Pooling", pooling, {})], prompts=prompts, default_prompt_name="query")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    skip, ids = len(tokenizer("the cat ")["input_ids"]), tokenizer("the cat hello world")["input_ids"]
    with Engine(model_path=folder, device="cpu", dtype="float32") as engine:
        found = numbers(engine.encode("hello world"))
        several = [numbers(result) for result in engine.encode(["the dog sat", "hello world", "a mat hello"])]
        torch.testing.assert_close(several[1], found)
        whole = numbers(engine.encode("hello world", prompt_name="none"))
        alone = numbers(engine.encode(input_ids=ids))
        with pytest.raises(InvalidRequest, match=f"has {skip} tokens, and the vector is made of those behind them"):
            engine.encode("", add_special_tokens=False)
    states = hidden(None, reference_outputs(folder, "BertModel", ids))

    def pooled(states: torch.Tensor) -> torch.Tensor:
        by_mode = {"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1], "max": states.amax(0)}
        return by_mode[mode]

    torch.testing.assert_close(found, pooled(states[skip:]), atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(alone, pooled(states), atol=TOLERANCE, rtol=TOLERANCE)  # ids are as they are
    states = hidden(None, reference_outputs(folder, "BertModel", tokenizer("hello world")["input_ids"]))
    torch.testing.assert_close(whole, pooled(states), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["Identity", "Sigmoid", "Tanh"])
def test_the_last_function_of_a_cross_encoder(tmp_path: Path, name: str) -> None:
    folder = with_tokenizer("BertForSequenceClassification", tmp_path, num_labels=1)
    with Engine(model_path=folder, device="cpu", dtype="float32") as engine:
        raw = torch.tensor(engine.score(*PAIR, normalize=False))
    write(tmp_path, [], activation_fn=f"torch.nn.modules.activation.{name}", model_type="CrossEncoder")
    with Engine(model_path=folder, device="cpu", dtype="float32") as engine:
        assert engine.tasks == ["classify", "score"]
        found = torch.tensor(engine.score(*PAIR))
    torch.testing.assert_close(found, {"Identity": raw, "Sigmoid": raw.sigmoid(), "Tanh": raw.tanh()}[name])
    write(tmp_path, [], activation_fn="own.Function")
    with pytest.raises(ModelBuildError, match=r"the last function must be one of .*, not 'own.Function'"):
        Engine(model_path=folder, device="cpu")


def test_the_text_before_a_pair_stands_before_its_first_text(tmp_path: Path) -> None:
    folder = with_tokenizer("BertForSequenceClassification", tmp_path, num_labels=1)
    firsts, seconds = PAIR
    with Engine(model_path=folder, device="cpu", dtype="float32") as engine:
        plain = engine.score(firsts, seconds)
        wanted = engine.score([f"a dog {text}" for text in firsts], seconds)
    write(tmp_path, [], prompts={"query": "a dog "}, default_prompt_name="query")
    with Engine(model_path=folder, device="cpu", dtype="float32") as engine:
        assert engine.score(firsts, seconds) == pytest.approx(wanted, abs=1e-6) != pytest.approx(plain, abs=1e-6)
        assert engine.score(firsts, seconds, prompt_name="") == pytest.approx(plain, abs=1e-6)


def test_texts_that_are_messages_are_not_taken_as_texts(tmp_path: Path) -> None:
    folder = with_tokenizer("BertModel", tmp_path)
    write(tmp_path, [("Pooling", {}, {})])
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"modality_config": {"text": {}, "message": {}}}))
    with Engine(model_path=folder, device="cpu") as engine:
        for texts in ("hello world", ["hello world", "the cat"]):
            with pytest.raises(InvalidRequest, match=r"are messages of a conversation .* give `messages`"):
                engine.encode(texts)
        assert engine.encode(input_ids=[5, 6])["embedding"] is not None
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"modality_config": {"text": {}}}))
    with Engine(model_path=folder, device="cpu") as engine:
        assert engine.encode("hello world")["embedding"] is not None


def words_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """BERT's form, of a few words."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = [*special.values(), *["the", "a", "cat", "dog", "sat", "on", "mat", "hello", "world"]]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_checkpoints_as_sentence_transformers_saves_them(tmp_path: Path) -> None:
    sentences = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    make_tiny("BertModel", tmp_path, pad_token_id=0)
    words_tokenizer().save_pretrained(tmp_path)
    size = json.loads((tmp_path / "config.json").read_text())["hidden_size"]
    torch.manual_seed(0)
    modules = [
        Transformer(str(tmp_path), max_seq_length=5),
        Pooling(size, ("mean", "cls"), include_prompt=False),
        Dense(2 * size, 6, use_residual=True),
        Normalize(),
    ]
    theirs = sentences.SentenceTransformer(modules=modules, device="cpu", prompts={"query": "a "}, truncate_dim=5)
    theirs.save(str(tmp_path / "saved"))
    texts = ["hello world", "the cat sat on the mat", "a dog"]
    with Engine(model_path=str(tmp_path / "saved"), device="cpu", dtype="float32") as engine:
        for name, given in (("", {}), ("query", {"prompt_name": "query"})):
            found = engine.encode(texts, prompt_name=name, truncate_prompt_tokens=-1)
            wanted = theirs.encode(texts, convert_to_tensor=True, **given)
            for line, result in zip(wanted, found, strict=True):
                torch.testing.assert_close(numbers(result), line, atol=TOLERANCE, rtol=TOLERANCE)
