"""Encoders, and decoders made into embedders and classifiers, against transformers in float32."""

import json
from pathlib import Path

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
    reference_model,
    reference_outputs,
)
from safetensors.torch import load_file, save_file

from rtp_llm.models_py.qwen3 import Qwen3ForCausalLM
from rtp_llm.srt.gguf.form import declared_forms
from rtp_llm.srt.layers.pooled_decoder import as_pooled
from rtp_llm.srt.sampling_params import InvalidRequest
from tiny_models import make_tiny

EMBEDS = {"embed": lambda model, outputs: hidden(model, outputs)[0], "token_embed": hidden}
CLASSIFIES = {"classify": lambda model, outputs: outputs.logits[0]}
SCORES = CLASSIFIES | {"score": CLASSIFIES["classify"]}
LABELS_OF_TOKENS = {"token_classify": lambda model, outputs: outputs.logits[0]}
LAST = {"embed": lambda model, outputs: hidden(model, outputs)[-1], "token_embed": hidden}
ONE, THREE = {"num_labels": 1}, {"num_labels": 3}
ROBERTA = {"pad_token_id": 1, "max_position_embeddings": 202}


def from_masked(model: object, outputs: object) -> torch.Tensor:
    return hidden(model, outputs)[0]


CASES = [
    PooledCase("bert", "BertModel", EMBEDS),
    PooledCase("bert-masked", "BertForMaskedLM", {"embed": from_masked}, slow=True),
    PooledCase("bert-labels", "BertForSequenceClassification", CLASSIFIES, THREE),
    PooledCase(
        "bert-pairs", "BertForSequenceClassification", CLASSIFIES | {"score": CLASSIFIES["classify"]}, ONE, slow=True
    ),
    PooledCase("bert-tokens", "BertForTokenClassification", LABELS_OF_TOKENS, THREE, slow=True),
    PooledCase("roberta", "RobertaModel", EMBEDS, ROBERTA, slow=True),
    PooledCase("xlm-roberta", "XLMRobertaModel", EMBEDS, ROBERTA),
    PooledCase("xlm-roberta-labels", "XLMRobertaForSequenceClassification", CLASSIFIES, ROBERTA | THREE),
    PooledCase("roberta-masked", "RobertaForMaskedLM", {"embed": from_masked}, ROBERTA, slow=True),
    PooledCase("xlm-roberta-masked", "XLMRobertaForMaskedLM", {"embed": from_masked}, ROBERTA, slow=True),
    PooledCase("roberta-labels", "RobertaForSequenceClassification", CLASSIFIES, ROBERTA | THREE, slow=True),
    PooledCase("xlm-roberta-tokens", "XLMRobertaForTokenClassification", LABELS_OF_TOKENS, ROBERTA | THREE, slow=True),
    PooledCase("roberta-tokens", "RobertaForTokenClassification", LABELS_OF_TOKENS, ROBERTA | THREE, slow=True),
    PooledCase("bert-torch", "BertModel", EMBEDS, options={"attention_backend": "torch_native"}),
    PooledCase("qwen3-embeds", "Qwen3ForCausalLM", LAST, options={"convert": "embed"}),
    PooledCase("qwen3-labels", "Qwen3ForSequenceClassification", CLASSIFIES, THREE),
    PooledCase("gpt2-labels", "GPT2ForSequenceClassification", CLASSIFIES, THREE | {"pad_token_id": 0}, slow=True),
    PooledCase("gemma2-labels", "Gemma2ForSequenceClassification", CLASSIFIES, THREE, slow=True),
]


@pytest.mark.parametrize("case", params_of(CASES))
def test_outputs_are_those_of_transformers(case: PooledCase, tmp_path: Path) -> None:
    check_parity(case, tmp_path)


def test_token_types_of_pairs(tmp_path: Path) -> None:
    model_dir = make_tiny("BertForSequenceClassification", tmp_path, num_labels=1)
    from rtp_llm.srt.managers.pooled import PoolingPrompt

    [prompt] = prompts_for(model_dir, (23,))
    types = torch.tensor([[0] * 9 + [1] * 14])
    with open_pooled(model_dir) as engine:
        completion = engine._pooled.completion(
            PoolingPrompt("score", input_ids=prompt, pair_start=9, options={"normalize": False})
        )
        assert completion.request.spec.pooling is not None and completion.request.spec.pooling.pair_start == 9
        from rtp_llm.srt.entrypoints.frontend import Call

        result = engine._collect(Call(engine._client, [completion], False))
    expected = reference_outputs(model_dir, "BertForSequenceClassification", prompt, token_type_ids=types).logits[0]
    torch.testing.assert_close(numbers(result), expected, atol=TOLERANCE, rtol=TOLERANCE)


# Decoders


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny("Qwen3ForCausalLM", tmp_path_factory.mktemp("qwen3"))


def last_states(model_dir: str, prompt: list[int]) -> torch.Tensor:
    outputs = reference_outputs(model_dir, "Qwen3ForCausalLM", prompt)
    return hidden(reference_model(model_dir, "Qwen3ForCausalLM"), outputs)


def test_decoders_embed_in_chunks_and_from_a_warm_cache(qwen3: str) -> None:
    prompts = prompts_for(qwen3, (50, 33, 1))
    prompts.append([*prompts[0][:41], *prompts[1][:7]])
    with open_pooled(qwen3, convert="embed", chunked_prefill_size=16) as engine:
        for result, prompt in zip(engine.encode(input_ids=prompts), prompts, strict=True):
            expected = F.normalize(last_states(qwen3, prompt)[-1], dim=0)
            torch.testing.assert_close(numbers(result), expected, atol=TOLERANCE, rtol=TOLERANCE)
        again = engine.encode(input_ids=prompts[3], normalize=False)
        assert again["meta_info"]["cached_tokens"] == 47  # all but the last, whose state is wanted
        expected = last_states(qwen3, prompts[3])[-1]
        torch.testing.assert_close(numbers(again), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "max", "mean_sqrt", "cls"])
def test_decoders_that_read_all_tokens_take_none_from_the_cache(qwen3: str, pooling: str) -> None:
    [prompt] = prompts_for(qwen3, (45,))
    states = last_states(qwen3, prompt)
    weights = torch.arange(1, 46.0)[:, None]
    expected = {
        "mean": states.mean(0),
        "weighted_mean": (states * weights).sum(0) / weights.sum(),
        "max": states.amax(0),
        "mean_sqrt": states.sum(0) / 45**0.5,
        "cls": states[0],
    }[pooling]
    with open_pooled(qwen3, convert="embed", pooling=pooling, chunked_prefill_size=16) as engine:
        for _ in range(2):
            result = engine.encode(input_ids=prompt, normalize=False)
            assert result["meta_info"]["cached_tokens"] == 0
            torch.testing.assert_close(numbers(result), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_one_model_generates_and_embeds_in_one_batch(qwen3: str) -> None:
    import asyncio

    prompts = prompts_for(qwen3, (20, 31))
    params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    with open_pooled(qwen3) as plain:
        expected = [result["output_ids"] for result in plain.generate(input_ids=prompts, sampling_params=params)]
        with pytest.raises(InvalidRequest, match=r"no output 'embed'.*--convert"):
            plain.encode(input_ids=prompts[0])

    async def both(engine: object) -> tuple[object, object]:
        generating = engine.async_generate(input_ids=prompts, sampling_params=params)
        return await asyncio.gather(generating, engine.async_encode(input_ids=prompts, normalize=False))

    with open_pooled(qwen3, convert="embed") as engine:
        texts, vectors = asyncio.run(both(engine))
    assert [result["output_ids"] for result in texts] == expected
    for vector, prompt in zip(vectors, prompts, strict=True):
        torch.testing.assert_close(numbers(vector), last_states(qwen3, prompt)[-1], atol=TOLERANCE, rtol=TOLERANCE)


def test_checkpoints_of_bare_models_embed_without_a_head(tmp_path: Path) -> None:
    """As sentence-transformers' checkpoints of decoders are: an untied head is not there."""
    whole = make_tiny("Qwen3ForCausalLM", tmp_path, tie_word_embeddings=False)
    [prompt] = prompts_for(whole, (17,))
    expected = F.normalize(last_states(whole, prompt)[-1], dim=0)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["Qwen3Model"]}))
    write_modules(tmp_path, {"pooling_mode_lasttoken": True}, normalizes=True)
    with open_pooled(str(tmp_path)) as engine:
        assert engine.tasks == ["embed", "token_embed"]
        torch.testing.assert_close(numbers(engine.encode(input_ids=prompt)), expected, atol=TOLERANCE, rtol=TOLERANCE)
        with pytest.raises(InvalidRequest, match="makes no text: its outputs are embed, token_embed"):
            engine.generate(input_ids=prompt)


def test_ggufs_of_a_decoder_hold_the_embedder_too() -> None:
    embedder = as_pooled(Qwen3ForCausalLM, "embed")
    assert declared_forms(embedder) == declared_forms(Qwen3ForCausalLM) != ()


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "Qwen3ForSequenceClassification"])
def test_on_two_ranks(architecture: str, tmp_path: Path) -> None:
    model_dir = make_tiny(architecture, tmp_path, num_labels=3)
    prompts = prompts_for(model_dir)
    with open_pooled(model_dir, tp_size=2) as engine:
        results = engine.encode(input_ids=prompts, task="classify", normalize=False)
    for result, prompt in zip(results, prompts, strict=True):
        expected = reference_outputs(model_dir, architecture, prompt).logits[0]
        torch.testing.assert_close(numbers(result), expected, atol=TOLERANCE, rtol=TOLERANCE)


# Sentence-transformers


def write_modules(folder: Path, pooling: dict[str, object], normalizes: bool = False, num_dense: int = 0) -> None:
    kinds = ["Transformer", "Pooling", *["Dense"] * num_dense, *["Normalize"] * normalizes]
    modules = [
        {"idx": i, "path": "" if i == 0 else f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_poolings_dense_layers_and_lengths_of_sentence_transformers(tmp_path: Path) -> None:
    model_dir = make_tiny("BertModel", tmp_path)
    size = json.loads((tmp_path / "config.json").read_text())["hidden_size"]
    write_modules(tmp_path, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, num_dense=1)
    (tmp_path / "2_Dense").mkdir()
    settings = {"in_features": 2 * size, "out_features": 5, "activation_function": "torch.nn.modules.activation.Tanh"}
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(3)
    dense = {"linear.weight": 0.1 * torch.randn(5, 2 * size, generator=generator), "linear.bias": torch.ones(5)}
    save_file(dense, tmp_path / "2_Dense" / "model.safetensors")
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 30, "do_lower_case": True}))
    prompts = prompts_for(model_dir, (11, 26))
    with open_pooled(model_dir) as engine:
        results = engine.encode(input_ids=prompts)
        for result, prompt in zip(results, prompts, strict=True):
            states = hidden(None, reference_outputs(model_dir, "BertModel", prompt))
            pooled = torch.cat([states[0], states.mean(0)])
            expected = torch.tanh(dense["linear.weight"] @ pooled + dense["linear.bias"])
            torch.testing.assert_close(numbers(result), expected, atol=TOLERANCE, rtol=TOLERANCE)
        short = numbers(engine.encode(input_ids=prompts[0], dimensions=2, normalize=True))
        torch.testing.assert_close(short, F.normalize(numbers(results[0])[:2], dim=0))
        with pytest.raises(InvalidRequest, match="from 1 to 5, the size of the model's vectors, not 6"):
            engine.encode(input_ids=prompts[0], dimensions=6)
        with pytest.raises(InvalidRequest, match="maximum context length is 30 tokens"):
            engine.encode(input_ids=prompts[1] * 2)
        cut = numbers(engine.encode(input_ids=prompts[1] * 2, truncate_prompt_tokens=-1))
        torch.testing.assert_close(cut, numbers(engine.encode(input_ids=(prompts[1] * 2)[:30])))


# Limits and errors


def test_encoders_run_without_a_cache_and_batch_by_tokens(tmp_path: Path) -> None:
    model_dir = make_tiny("BertModel", tmp_path)
    prompts = prompts_for(model_dir, (60, 7, 90, 64, 3))
    with open_pooled(model_dir, max_prefill_tokens=64, inline=True) as engine:
        core = engine._runner.core
        assert core.cache_bytes == 0 and core.info.outputs.generates is False
        results = engine.encode(input_ids=prompts, normalize=False)
        # 60 alone (7 does not fit... in order of arrival), then as many whole inputs as fit; 90 alone.
        assert core.scheduler.stats.computed_tokens == sum(map(len, prompts))
        for result, prompt in zip(results, prompts, strict=True):
            states = hidden(None, reference_outputs(model_dir, "BertModel", prompt))
            torch.testing.assert_close(numbers(result), states[0], atol=TOLERANCE, rtol=TOLERANCE)
        with pytest.raises(InvalidRequest, match="this model makes no text"):
            engine.generate(input_ids=prompts[0])


def test_numbers_that_are_not_finite_fail_their_request_alone(tmp_path: Path) -> None:
    model_dir = make_tiny("BertModel", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7] = float("inf")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_pooled(model_dir) as engine:
        good, bad = engine.encode(input_ids=[[5, 6, 8], [5, 7, 8]])
    assert good["embedding"] is not None
    assert bad["embedding"] is None and bad["meta_info"]["finish_reason"]["status_code"] == 500


def test_conversions_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    model_dir = make_tiny("BertModel", tmp_path)
    with pytest.raises(ValueError, match="BertModel has outputs of its own: leave out --convert classify"):
        open_pooled(model_dir, convert="classify")
