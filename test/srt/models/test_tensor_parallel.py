"""Two ranks over gloo give what one gives, for each architecture; vocabulary and key-value heads split unevenly."""

from typing import Any

import pytest
from stepped_core import Core, mixed_requests

from rtp_llm import Engine
from rtp_llm.srt.distributed.parallel_state import SplitError
from rtp_llm.srt.engine import executor
from tiny_models import TINY_MODELS, assert_same_ids, random_prompts, reference, tiny_model

pytestmark = [pytest.mark.xdist_group("tensor-parallel"), pytest.mark.usefixtures("warm_processes")]

NEW_TOKENS = 12
MODELS = [name for name in TINY_MODELS if name.endswith("-tp")]


def answers(model_dir: str, prompts: list[list[int]], tp_size: int) -> list[dict[str, Any]]:
    """Prompts in one batch, in chunks of 16, with all logprobs; then once more from the cache."""
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    with Engine(
        model_path=model_dir,
        dtype="float32",
        device="cpu",
        tp_size=tp_size,
        skip_tokenizer_init=True,
        context_length=256,
        max_total_tokens=1024,
        chunked_prefill_size=16,
    ) as engine:
        cold = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True, logprob_start_len=0)
        return cold + engine.generate(input_ids=prompts, sampling_params=params)


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_agree_with_one(name: str) -> None:
    model_dir, vocab_size = tiny_model(name), TINY_MODELS[name].vocab_size
    prompts = random_prompts(vocab_size, (3, 40, 90))
    expected = [reference(model_dir, tuple(prompt), NEW_TOKENS) for prompt in prompts]
    one, two = answers(model_dir, prompts, tp_size=1), answers(model_dir, prompts, tp_size=2)
    for ours, theirs, truth in zip(two, one, expected * 2, strict=True):
        assert_same_ids(ours["output_ids"], truth, f"{name}, two ranks")
        assert_same_ids(theirs["output_ids"], truth, f"{name}, one rank")
        assert ours["meta_info"]["cached_tokens"] == theirs["meta_info"]["cached_tokens"]
    for ours, truth in zip(two[: len(prompts)], expected, strict=True):
        logprobs = [entry[0] for entry in ours["meta_info"]["input_token_logprobs"][1:]]
        assert logprobs == pytest.approx(truth.prompt_logprobs, abs=1e-3)


def test_two_ranks_compute_while_the_next_step_is_planned() -> None:
    requests = mixed_requests(TINY_MODELS["llama-tp"].vocab_size)
    ids, logprobs = [], []
    for depth in (0, 1):
        core = Core("llama-tp", depth, processes=True, tp_size=2)
        try:
            ids.append(core.run(requests))
        finally:
            core.close()
        logprobs.append({rid: [(x.token_id, x.logprob) for x in told] for rid, told in core.logprobs().items()})
    assert ids[0] == ids[1] and all(ids[0].values())
    for rid, told in logprobs[0].items():  # prompts are cut elsewhere, which last digits show
        assert told == [(token_id, pytest.approx(logprob, abs=1e-5)) for token_id, logprob in logprobs[1][rid]]


def test_the_models_split_unevenly() -> None:
    """What makes these models worth testing on two ranks."""
    configs = [TINY_MODELS[name].config for name in MODELS]
    assert all(config["vocab_size"] % 2 for config in configs)
    assert any(config["num_key_value_heads"] == 1 for config in configs)  # one head, on both ranks
    assert len({TINY_MODELS[name].architecture for name in MODELS}) == 4


def test_other_sizes_are_refused_by_name_before_any_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "start_python", lambda module: pytest.fail("a worker was started"))
    with pytest.raises(SplitError, match=r"LlamaForCausalLM cannot run on 3 ranks: model.layers.0.*heads 4 is not"):
        Engine(model_path=tiny_model("llama-tp"), tp_size=3)
    with pytest.raises(SplitError, match="run through transformers cannot be shared by ranks"):
        Engine(model_path=tiny_model("llama-tp"), tp_size=2, model_impl="transformers")
