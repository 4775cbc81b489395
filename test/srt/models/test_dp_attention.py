"""Ranks with requests of their own (``--enable-dp-attention``) answer as one rank does, whatever is asked."""

from pathlib import Path
from typing import Any

import pytest
from stepped_core import Core, greedy_requests, mixed_requests

from rtp_llm import Engine
from rtp_llm.srt.configs.server_args import ServerArgs, ServerArgsError
from rtp_llm.srt.layers.moe import Experts
from rtp_llm.srt.layers.token_exchange import CollectedTokens, SentTokens
from rtp_llm.srt.worker.replayable import NotReplayable
from tiny_models import make_tiny, random_prompts

VOCAB_SIZE = 90  # ids of prompts lie below it
NEW_TOKENS = 8


def answered(model_dir: str, **options: Any) -> tuple[dict[str, list[int]], dict[str, list[Any]]]:
    """Return ids and logprobs of requests of every kind."""
    core = Core(model_path=model_dir, **options)
    try:
        ids = core.run(mixed_requests(VOCAB_SIZE))
    finally:
        core.close()
    told = {rid: [(x.token_id, x.logprob) for x in parts] for rid, parts in core.logprobs().items()}
    return ids, told


def check_same(model_dir: str, **options: Any) -> None:
    ids, told = answered(model_dir)
    other_ids, other_told = answered(model_dir, tp_size=2, enable_dp_attention=True, **options)
    assert other_ids == ids and all(ids.values())
    for rid, expected in told.items():
        assert other_told[rid] == [(token_id, pytest.approx(logprob, abs=1e-4)) for token_id, logprob in expected]


@pytest.mark.parametrize(("depth", "backend"), [(0, "none"), (1, "all_to_all")])
def test_requests_of_every_kind(depth: int, backend: str, tmp_path: Path) -> None:
    check_same(make_tiny("DeepseekV3ForCausalLM", tmp_path), threads=True, depth=depth, moe_a2a_backend=backend)


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
@pytest.mark.parametrize("backend", ["all_to_all", "none"])
@pytest.mark.parametrize("architecture", ["DeepseekV2ForCausalLM", "Qwen3NextForCausalLM"])
def test_in_processes(architecture: str, backend: str, tmp_path: Path) -> None:
    check_same(make_tiny(architecture, tmp_path), processes=True, moe_a2a_backend=backend)


def test_each_rank_has_its_requests_and_its_cache(tmp_path: Path) -> None:
    core = Core(
        model_path=make_tiny("DeepseekV3ForCausalLM", tmp_path), threads=True, tp_size=2, enable_dp_attention=True
    )
    try:
        prompts = random_prompts(VOCAB_SIZE, (70, 50, 60, 40))
        core.run(greedy_requests(prompts, NEW_TOKENS))
        info, parts = core.core.info, core.core.scheduler.memories
        assert info.max_total_tokens == 2 * 2000 and info.max_running_requests == 32
        assert all(memory.cache.num_pages(0) >= 100 for memory in parts), "a rank had one request or none"
        report = core.core._meter.report()
        assert report.num_free_tokens + report.num_evictable_tokens == 4000 and report.prompt_tokens == 220
        heads = {worker.runner.model.model.layers[0].self_attn.num_heads for worker in core.executor.workers}
        assert heads == {4}, "all heads on each rank"
        for worker in core.executor.workers:
            assert worker.runner.recorder is None
            with pytest.raises(NotReplayable, match="exchange as many tokens as each has"):
                worker.runner.decode_step()
    finally:
        core.close()


@pytest.mark.parametrize(("backend", "kind"), [("auto", SentTokens), ("none", CollectedTokens)])
def test_how_tokens_come_to_experts(backend: str, kind: type, tmp_path: Path) -> None:
    options = {"tp_size": 2, "enable_dp_attention": True, "moe_a2a_backend": backend}
    core = Core(model_path=make_tiny("DeepseekV3ForCausalLM", tmp_path), threads=True, **options)
    try:
        layers = [m for w in core.executor.workers for m in w.runner.model.modules() if isinstance(m, Experts)]
        assert layers and all(isinstance(layer.exchange, kind) for layer in layers)
    finally:
        core.close()


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
def test_an_engine(tmp_path: Path) -> None:
    """Through the offline API: twice, and the second time from the caches."""
    model_dir = make_tiny("DeepseekV3ForCausalLM", tmp_path)
    prompts = random_prompts(VOCAB_SIZE, (40, 90, 55))
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    given: dict[str, Any] = {"model_path": model_dir, "dtype": "float32", "device": "cpu", "skip_tokenizer_init": True}
    given |= {"context_length": 256, "max_total_tokens": 512}
    told = []
    for options in ({}, {"tp_size": 2, "enable_dp_attention": True}):
        with Engine(**given, **options) as engine:
            answers = [engine.generate(input_ids=prompts, sampling_params=params) for _ in range(2)]
        told.append([(x["output_ids"], x["meta_info"]["cached_tokens"]) for turn in answers for x in turn])
    assert told[0] == told[1] and told[0][-1][1] > 0


@pytest.mark.parametrize("options", [{}, {"tp_size": 4, "ep_size": 2}, {"tp_size": 2, "pp_size": 2}], ids=str)
def test_what_does_not_go_with_it_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ServerArgsError, match="enable_dp_attention divides requests and experts"):
        ServerArgs(enable_dp_attention=True, **options)
    with pytest.raises(ServerArgsError, match="kv_events_config tells of one cache"):
        ServerArgs(enable_dp_attention=True, tp_size=2, kv_events_config='{"enable_kv_cache_events": true}')
    with pytest.raises(ServerArgsError, match="without enable_dp_attention all ranks have all tokens"):
        ServerArgs(tp_size=2, ep_size=2, moe_a2a_backend="all_to_all")
