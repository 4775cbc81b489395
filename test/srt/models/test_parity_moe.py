"""Mixtral, Qwen2-MoE, Qwen3-MoE and gpt-oss, MXFP4 included, in our engine against transformers, in float32.

Each checkpoint is asked in chunks, batched, from a warm cache, and for a second turn, with prompts past every window.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rtp_llm import Engine
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.layers.quantization import mxfp4
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.models.weight_loading import WeightLoadError
from tiny_models import Reference, assert_same_ids, make_tiny, random_prompts, reference

LENGTHS = (1, 18, 40, 100)
NEW_TOKENS = 10
LOGPROB_TOLERANCE = 1e-3
FULL, WINDOW = "full_attention", "sliding_attention"
CHUNKS = {"chunked_prefill_size": 16}
PAGES = CHUNKS | {"page_size": 4}


@dataclass(frozen=True)
class Case:
    name: str
    architecture: str
    config: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)  # of the engine
    is_quantized: bool = False
    slow: bool = False

    @property
    def page_size(self) -> int:
        return self.options.get("page_size", 1)

    @property
    def has_windows(self) -> bool:
        return bool(self.config.get("sliding_window")) and self.config.get("use_sliding_window", True)


THREE_LAYERS = dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=3)
CASES = (
    Case(
        "mixtral",
        "MixtralForCausalLM",
        THREE_LAYERS | dict(head_dim=16, intermediate_size=44, num_local_experts=5, sliding_window=7),
        PAGES,
    ),
    Case(
        "mixtral-full-tied-gelu",
        "MixtralForCausalLM",
        dict(sliding_window=None, tie_word_embeddings=True, hidden_act="gelu", num_experts_per_tok=3),
        CHUNKS,
        slow=True,
    ),
    Case(
        "qwen2-moe",
        "Qwen2MoeForCausalLM",
        dict(hidden_size=60, num_attention_heads=6, num_hidden_layers=4, mlp_only_layers=[1], num_experts=5)
        | dict(moe_intermediate_size=36, shared_expert_intermediate_size=52, norm_topk_prob=False)
        | dict(use_sliding_window=True, sliding_window=7, max_window_layers=2),
        CHUNKS,
    ),
    Case(
        "qwen2-moe-normed-tied-no-bias",
        "Qwen2MoeForCausalLM",
        dict(decoder_sparse_step=2, norm_topk_prob=True, tie_word_embeddings=True, qkv_bias=False, hidden_act="gelu")
        | dict(use_sliding_window=True, sliding_window=16, layer_types=[FULL, WINDOW, WINDOW, FULL]),
        PAGES,
        slow=True,
    ),
    Case(
        "qwen3-moe",
        "Qwen3MoeForCausalLM",
        THREE_LAYERS
        | dict(head_dim=24, num_local_experts=5, num_experts_per_tok=3, moe_intermediate_size=36)
        | dict(decoder_sparse_step=1, mlp_only_layers=[0], norm_topk_prob=True, use_sliding_window=False),
        PAGES,
    ),
    Case(
        "qwen3-moe-window-tied-bias",
        "Qwen3MoeForCausalLM",
        dict(decoder_sparse_step=2, mlp_only_layers=[3], num_hidden_layers=6, norm_topk_prob=False)
        | dict(use_sliding_window=True, sliding_window=11, attention_bias=True, tie_word_embeddings=True),
        CHUNKS,
        slow=True,
    ),
    Case(
        "gpt-oss",
        "GptOssForCausalLM",
        THREE_LAYERS
        | dict(intermediate_size=44, num_local_experts=5, num_experts_per_tok=3, sliding_window=7)
        | dict(swiglu_alpha=1.3, swiglu_limit=0.6),  # a limit that is met
        PAGES,
    ),
    Case(
        "gpt-oss-other-layers-tied-no-bias",
        "GptOssForCausalLM",
        dict(layer_types=[FULL, WINDOW, WINDOW, FULL], sliding_window=16, num_key_value_heads=1, head_dim=24)
        | dict(attention_bias=False, tie_word_embeddings=True, rope_parameters={"rope_type": "default"}),
        CHUNKS,
        slow=True,
    ),
    Case(
        "gpt-oss-mxfp4",
        "GptOssForCausalLM",
        dict(num_hidden_layers=2, hidden_size=64, intermediate_size=96, sliding_window=16),
        CHUNKS,
        is_quantized=True,
    ),
)


@dataclass(frozen=True)
class Served:
    """An engine, the prompts it is asked, and what transformers answers to them."""

    case: Case
    engine: Engine
    reference_dir: str
    prompts: list[list[int]]
    references: list[Reference]

    def generate(self, input_ids: Any, **options: Any) -> Any:
        params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        return self.engine.generate(input_ids=input_ids, sampling_params=params, **options)


def make_case(case: Case, directory: Path) -> str:
    torch.manual_seed(0)  # sinks and router biases are what they were initialised with, and some noise
    return make_tiny(case.architecture, directory, **case.config)


def open_engine(model_dir: str, **options: Any) -> Engine:
    return Engine(
        model_path=model_dir,
        dtype="float32",
        device="cpu",
        skip_tokenizer_init=True,
        context_length=512,
        max_total_tokens=2048,
        **options,
    )


def prompts_and_references(model_dir: str) -> tuple[list[list[int]], list[Reference]]:
    vocab_size = json.loads(Path(model_dir, "config.json").read_text())["vocab_size"]
    prompts = random_prompts(vocab_size, LENGTHS)
    return prompts, [reference(model_dir, tuple(prompt), NEW_TOKENS) for prompt in prompts]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            case,
            id=case.name,
            marks=[pytest.mark.xdist_group(case.name), *([pytest.mark.slow] if case.slow else [])],
        )
        for case in CASES
    ],
)
def engine_of_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    case: Case = request.param
    model_dir = reference_dir = make_case(case, tmp_path_factory.mktemp(case.name))
    if case.is_quantized:
        model_dir = quantize(Path(reference_dir), tmp_path_factory.mktemp("quantized"))
    with open_engine(model_dir, **case.options) as engine:
        yield Served(case, engine, reference_dir, *prompts_and_references(reference_dir))


@pytest.fixture
def served(engine_of_case: Served) -> Served:
    flushed, message = engine_of_case.engine.flush_cache()
    assert flushed, message
    return engine_of_case


def check(served: Served, results: list[dict[str, Any]], what: str) -> None:
    for result, prompt, expected in zip(results, served.prompts, served.references, strict=True):
        assert_same_ids(result["output_ids"], expected, f"{served.case.name}, {what}, prompt of {len(prompt)}")


def check_logprobs(result: dict[str, Any], expected: Reference) -> None:
    prompt_logprobs = [entry[0] for entry in result["meta_info"]["input_token_logprobs"][1:]]
    assert prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=LOGPROB_TOLERANCE)
    if result["output_ids"] == expected.output_ids:
        output_logprobs = [entry[0] for entry in result["meta_info"]["output_token_logprobs"]]
        assert output_logprobs == pytest.approx(expected.output_logprobs, abs=LOGPROB_TOLERANCE)


def test_one_by_one(served: Served) -> None:
    check(served, [served.generate(prompt) for prompt in served.prompts], "one by one")


def test_batched_with_logprobs(served: Served) -> None:
    results = served.generate(served.prompts, return_logprob=True, logprob_start_len=0)
    check(served, results, "batched")
    for result, expected in zip(results, served.references, strict=True):
        check_logprobs(result, expected)


def test_from_a_warm_cache(served: Served) -> None:
    served.generate(served.prompts)
    results = [served.generate(prompt) for prompt in served.prompts]
    check(served, results, "warm")
    for result, prompt in zip(results, served.prompts, strict=True):
        cached = result["meta_info"]["cached_tokens"]
        most = (len(prompt) - 1) // served.case.page_size * served.case.page_size
        # With windows, the page that one reaches back into may be gone.
        assert cached <= most if served.case.has_windows and served.case.page_size > 1 else cached == most


def test_a_second_turn(served: Served) -> None:
    first = served.prompts[1]
    prompt = [*first, *served.generate(first)["output_ids"], 3, 1, 4]
    expected = reference(served.reference_dir, tuple(prompt), NEW_TOKENS)
    assert_same_ids(served.generate(prompt)["output_ids"], expected, f"{served.case.name}, second turn")


@pytest.mark.slow
@pytest.mark.xdist_group("tensor-parallel")
@pytest.mark.parametrize("name", ["gpt-oss", "qwen2-moe"])
def test_two_ranks(name: str, tmp_path: Path) -> None:
    """Sinks, biases of experts, and a shared expert, each counted once."""
    case = next(case for case in CASES if case.name == name)
    model_dir = make_case(case, tmp_path)
    prompts, references = prompts_and_references(model_dir)
    with open_engine(model_dir, tp_size=2, **case.options) as engine:
        params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        results = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True, logprob_start_len=0)
    for result, expected in zip(results, references, strict=True):
        assert_same_ids(result["output_ids"], expected, name)
        check_logprobs(result, expected)


# Other layouts of a checkpoint


def load(model_dir: Path | str) -> dict[str, torch.Tensor]:
    return load_model(ModelConfig.from_pretrained(str(model_dir)), str(model_dir)).state_dict()


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_in_one_tensor_load_alike(architecture: str, tmp_path: Path) -> None:
    """As transformers 5 keeps them in memory, and may save them."""
    config = dict(num_hidden_layers=2, mlp_only_layers=[1]) if architecture.startswith("Qwen") else {}
    separate, fused = tmp_path / "separate", tmp_path / "fused"
    model = transformers.AutoModelForCausalLM.from_pretrained(make_tiny(architecture, separate, **config))
    model.save_pretrained(fused, save_original_format=False)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in load_file(fused / "model.safetensors"))
    expected, ours = load(separate), load(fused)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


# MXFP4


def random_mxfp4(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales that stand for [experts, outputs, inputs] values of the usual size of weights."""
    *rows, inputs = shape
    generator = torch.Generator().manual_seed(inputs)
    blocks = torch.randint(256, (*rows, inputs // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 125, (*rows, inputs // 32), dtype=torch.uint8, generator=generator)
    return blocks, scales


def quantize(model_dir: Path, quantized_dir: Path) -> str:
    """Writes a twin with random MXFP4 experts in gpt-oss's own layout, and their values into ``model_dir``."""
    tensors = load_file(model_dir / "model.safetensors")
    halves: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = {}, {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        blocks, scales = random_mxfp4(experts, outputs, inputs)
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        halves[0][f"{name}_blocks"], halves[1][f"{name}_scales"] = blocks, scales
    others = {name: tensor for name, tensor in tensors.items() if f"{name}_blocks" not in halves[0]}
    save_file(tensors, model_dir / "model.safetensors")
    save_file(others | halves[0], quantized_dir / "model-00001-of-00002.safetensors")
    save_file(halves[1], quantized_dir / "model-00002-of-00002.safetensors")
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (quantized_dir / "config.json").write_text(json.dumps(config))
    return str(quantized_dir)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mxfp4_dequantizes_as_in_transformers(dtype: torch.dtype) -> None:
    blocks, scales = random_mxfp4(3, 10, 96)
    if dtype != torch.float16:
        scales = torch.arange(90).reshape(3, 10, 3).to(torch.uint8) * 2 + 60  # 2 ** -67 to 2 ** 111
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    weights = [("x_scales", scales), ("y_bias", torch.ones(2)), ("x_blocks", blocks)]
    ours = dict(mxfp4.dequantize_experts(weights, dtype, "cpu"))
    assert ours.keys() == {"x", "y_bias"}
    assert ours["x"].dtype == dtype and torch.equal(ours["x"], expected)


def test_an_mxfp4_scale_of_255_is_not_a_number() -> None:
    blocks, scales = random_mxfp4(1, 2, 64)
    scales[0, 1, 0] = 255
    values = mxfp4.dequantize(blocks, scales, torch.bfloat16)
    assert values[0, 1, :32].isnan().all() and values.isnan().sum() == 32


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (torch.zeros(2, 3, 4, 8, dtype=torch.uint8), torch.zeros(2, 3, 4, dtype=torch.uint8), r"\[2, 3, 4, 8\]"),
        (torch.zeros(2, 3, 4, 16, dtype=torch.uint8), torch.zeros(2, 3, 5, dtype=torch.uint8), r"\[2, 3, 5\]"),
        (torch.zeros(2, 3, 4, 16, dtype=torch.uint8), torch.zeros(2, 3, 4), r"torch\.float32"),
    ],
)
def test_mxfp4_of_other_shapes_or_dtypes_is_refused(blocks: torch.Tensor, scales: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"x_blocks and x_scales: .*{message}"):
        list(mxfp4.dequantize_experts([("x_blocks", blocks), ("x_scales", scales)], torch.float32, "cpu"))


def test_mxfp4_blocks_without_scales_are_named(tmp_path: Path) -> None:
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    quantized.mkdir()
    quantize(Path(make_tiny("GptOssForCausalLM", plain, num_hidden_layers=1)), quantized)
    (quantized / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightLoadError, match=r"(?s)experts\.down_proj_blocks .*parameters were not set.*w2_weight"):
        load(quantized)


def test_packed_weights_do_not_decide_the_dtype(tmp_path: Path) -> None:
    """gpt-oss's config.json does not name one."""
    make_tiny("GptOssForCausalLM", tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"x_blocks": torch.zeros(99, dtype=torch.uint8), "y": torch.zeros(3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert ModelConfig.from_pretrained(str(tmp_path)).dtype == "bfloat16"


def test_other_quantization_is_refused(tmp_path: Path) -> None:
    make_tiny("MixtralForCausalLM", tmp_path, num_hidden_layers=1, quantization_config={"quant_method": "hqq"})
    with pytest.raises(ValueError, match=r"is quantized by 'hqq', which is not supported; have .*mxfp4"):
        load(tmp_path)
