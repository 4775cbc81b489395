"""The model files against transformers: same weights, one sequence, no engine."""

import pytest
import torch
import transformers
from dense_forward import DenseAttention, build_model, make_batch, run_step

from rtp_llm.models_py.llama import LlamaAttention
from rtp_llm.srt.kernels import reference as kernels
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.rotary import RotaryEmbedding
from tiny_models import TINY_MODELS, Reference, assert_same_ids, random_prompts, reference, tiny_model

NUM_NEW = 24


def generate(model: torch.nn.Module, prompt: list[int], num_new: int, chunk: int) -> tuple[list[int], list[float]]:
    """Greedy ids and their logprobs, the prompt computed in chunks."""
    backend = DenseAttention()
    for start in range(0, len(prompt), chunk):
        output = run_step(model, make_batch(prompt[start : start + chunk], start, len(prompt), backend))
    ids: list[int] = []
    logprobs: list[float] = []
    while True:
        best = output.next_token_logits[0].argmax().item()
        logprobs.append(output.next_token_logits[0].log_softmax(-1)[best].item())
        ids.append(best)
        if len(ids) == num_new:
            return ids, logprobs
        output = run_step(model, make_batch([best], len(prompt) + len(ids) - 1, len(prompt), backend))


@pytest.mark.parametrize("name", TINY_MODELS)
# Below, across and past the original length of 64; test_engine_parity.py asks all models short prompts, too.
@pytest.mark.parametrize("prompt_len", [pytest.param(3, marks=pytest.mark.slow), 50, 141])
def test_same_answers_as_transformers(name: str, prompt_len: int) -> None:
    model_dir = tiny_model(name)
    model = build_model(model_dir)
    [prompt] = random_prompts(TINY_MODELS[name].vocab_size, [prompt_len], seed=prompt_len)
    expected: Reference = reference(model_dir, tuple(prompt), NUM_NEW)

    whole = run_step(model, make_batch(prompt, 0, prompt_len))
    prompt_logprobs = [logprob.logprob for logprob in whole.prompt_logprobs[0].read()]
    assert prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=1e-4)

    for chunk in (prompt_len, 16):
        ids, logprobs = generate(model, prompt, NUM_NEW, chunk)
        assert_same_ids(ids, expected, f"{name}, chunk {chunk}")
        if ids == expected.output_ids:
            assert logprobs == pytest.approx(expected.output_logprobs, abs=1e-4)


def test_windows_reach_the_cache_spec() -> None:
    def windows(name: str) -> list[int | None]:
        layers = [m for m in build_model(tiny_model(name)).modules() if isinstance(m, RadixAttention)]
        assert [layer.layer_id for layer in layers] == list(range(len(layers)))
        return [layer.cache_spec().window for layer in layers]

    assert windows("llama-default") == [None, None, None]
    assert windows("mistral-full-tied") == [None, None, None]
    assert windows("mistral-window7") == [7, 7, 7]
    assert windows("qwen2-mixed-window16") == [None, 16, 16]
    assert windows("qwen3-mixed-window7-tied") == [7, None, 7]
    config = transformers.Qwen2Config(use_sliding_window=False, sliding_window=8, num_hidden_layers=1)
    assert config.layer_types == ["full_attention"]


def test_layers_share_one_rotary_embedding_within_a_build() -> None:
    ropes = {id(m) for m in build_model(tiny_model("llama-default")).modules() if isinstance(m, RotaryEmbedding)}
    others = {id(m) for m in build_model(tiny_model("llama-default")).modules() if isinstance(m, RotaryEmbedding)}
    assert len(ropes) == len(others) == 1


def test_module_paths_and_prefixes_are_the_checkpoints() -> None:
    model = build_model(tiny_model("llama-default"))
    for path, module in model.named_modules():
        if hasattr(module, "prefix"):
            assert module.prefix == path


def test_tied_head_is_the_embedding() -> None:
    model = build_model(tiny_model("qwen2-default-tied"))
    assert model.lm_head is model.get_input_embeddings() is model.model.get_input_embeddings()
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_input_embeds_stand_in_for_ids() -> None:
    model = build_model(tiny_model("qwen3-default"))
    ids = [4, 8, 15, 16, 23]
    by_ids = run_step(model, make_batch(ids, 0, 5)).next_token_logits
    batch = make_batch(ids, 0, 5)
    with torch.inference_mode():
        embeds = model.get_input_embeddings()(batch.input_ids)
        by_embeds = model(batch.input_ids, batch.positions, batch, input_embeds=embeds).next_token_logits
    torch.testing.assert_close(by_embeds, by_ids)


@pytest.mark.parametrize("name", ["llama-yarn", "qwen3-default"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(name: str) -> None:
    model_dir = tiny_model(name)
    [prompt] = random_prompts(TINY_MODELS[name].vocab_size, [30])

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager")
        with torch.inference_mode():
            return model(torch.tensor([prompt])).logits[0, -1:].float()

    ours = run_step(build_model(model_dir, torch.bfloat16), make_batch(prompt, 0, 30)).next_token_logits
    exact = theirs(torch.float32)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() < 1.5 * (theirs(torch.bfloat16) - exact).norm()


class BlendedValues(LlamaAttention):
    def prepare_values(self, v: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * v + hidden_states[:, : self.kv_size]


def test_values_have_a_hook_beside_queries_and_keys() -> None:
    sizes = dict(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    attention = BlendedValues(transformers.LlamaConfig(**sizes), 0)
    for parameter in attention.parameters():
        parameter.data.normal_()
    batch, x = make_batch([7, 8, 9, 10, 11], 0, 5), torch.randn(5, 16)
    q, k, v = attention.qkv_proj(x)[0].split([16, 8, 8], dim=-1)
    q, k = attention.rotary_emb(batch.positions, q, k)
    values = (2 * v + x[:, :8]).view(5, 2, 4)
    attended = kernels.attention(q.view(5, 4, 4), k.view(5, 2, 4), values, 0.5, 0).flatten(1)
    expected, _ = attention.o_proj(attended)
    torch.testing.assert_close(attention(batch.positions, x, batch), expected)
