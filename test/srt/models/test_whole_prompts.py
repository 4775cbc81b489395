"""Attention in which a prompt's tokens see all of it, in the engine, against transformers' Llama with such a mask."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers

from rtp_llm import Engine, ModelRegistry
from rtp_llm.models_py.llama import LlamaForCausalLM
from rtp_llm.srt.layers.attention import PrefillPrefixLMAttention
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.worker.layout import sees_whole_prompts
from tiny_models import random_prompts, tiny_model

PROMPTS = random_prompts(99, (1, 37, 20, 41))
NEW_TOKENS = 12


class WholePromptsForCausalLM(LlamaForCausalLM):
    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix)
        for layer in (module for module in self.modules() if isinstance(module, RadixAttention)):
            layer.sees_whole_prompts = True


@torch.inference_mode()
def expected(model: Any, prompt: Sequence[int], output_ids: Sequence[int]) -> torch.Tensor:
    """Return log-probabilities of each token after the first, where tokens of the prompt see all of it."""
    ids = torch.tensor([*prompt, *output_ids])
    visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    visible[: len(prompt), : len(prompt)] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    logits = model(input_ids=ids[None], attention_mask=mask[None, None], use_cache=False).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"chunked_prefill_size": 16}, id="chunks-are-not-cut"),
        pytest.param({"chunked_prefill_size": 16, "max_total_tokens": 80}, id="retracted"),
    ],
)
def test_prompts_see_all_of_themselves(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ModelRegistry.models.layers[0], "LlamaForCausalLM", WholePromptsForCausalLM)
    path = tiny_model("llama-default")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    args = {"dtype": "float32", "device": "cpu", "skip_tokenizer_init": True, "max_total_tokens": 512, "inline": True}
    with Engine(model_path=path, **args | options) as engine:
        call = {"sampling_params": params, "return_logprob": True, "logprob_start_len": 0}
        answers = engine.generate(input_ids=PROMPTS, **call)
        again = engine.generate(input_ids=PROMPTS[3], sampling_params=params)
    assert again["output_ids"] == answers[3]["output_ids"] and again["meta_info"]["cached_tokens"] == 0
    retractions = sum(answer["meta_info"]["num_retractions"] for answer in answers)
    assert bool(retractions) == ("max_total_tokens" in options)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        meta, output_ids = answer["meta_info"], answer["output_ids"]
        entries = [*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"]]
        ours = torch.tensor([entry[0] for entry in entries])
        torch.testing.assert_close(ours, expected(model, prompt, output_ids), atol=1e-3, rtol=0)


def test_layers_of_both_kinds_are_refused() -> None:
    both = torch.nn.ModuleList([RadixAttention(2, 8, 1.0, 2, 0), PrefillPrefixLMAttention(2, 8, 1.0, layer_id=1)])
    assert sees_whole_prompts(both[1:]) and not sees_whole_prompts(both[:1])
    with pytest.raises(ValueError, match="all attention layers must have sees_whole_prompts, or none"):
        sees_whole_prompts(both)
