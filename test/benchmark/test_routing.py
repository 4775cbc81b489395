"""Two replicas behind routers of others: by their caches, and at random. Slow but for the arithmetic."""

import json
from pathlib import Path

import pytest
from programs import check_installed

from benchmark.fleet import MODULES
from benchmark.routing import Outcome, best_hit_rate, measure, prompts_of
from tiny_server import make_checkpoint

NUM_REQUESTS = 120


def test_prompts_share_what_their_requests_share(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"hash_ids": ids} for ids in ([0, 1, 2, 3], [0, 1, 7], [8], [0, 1, 7])]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    prompts = prompts_of(trace, 3, 3)
    assert prompts == ["000000;000001;000002;", "000000;000001;000007;", "000008;"]
    assert best_hit_rate(prompts) == 2 / 7
    assert best_hit_rate([*prompts, prompts[1]]) == 5 / 10
    assert len(prompts_of(trace, 9, 3, min_turns=3)) == 3, "the conversation that begins with 0 and 1"


def played(router: str, policy: str, data_dir: Path, folder: Path) -> tuple[Outcome, float]:
    check_installed(MODULES[router])
    prompts = prompts_of(data_dir / "traces/mooncake/conversation_trace.jsonl", NUM_REQUESTS, 12, min_turns=6)
    flags = ["--model-path", make_checkpoint(folder / "model"), "--device", "cpu", "--max-total-tokens", "16384"]
    (folder / "f").mkdir()
    return measure(folder / "f", router, policy, prompts, arguments=flags), best_hit_rate(prompts)


@pytest.fixture(scope="module")
def at_random(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    return played("vllm-router", "random", data_dir, tmp_path_factory.mktemp("r"))[0].hit_rate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "policy"), [("vllm-router", "cache_aware"), ("vllm-router", "kv_aware"), ("smg", "cache_aware")]
)
def test_who_knows_the_caches_finds_more(
    router: str, policy: str, data_dir: Path, tmp_path_factory: pytest.TempPathFactory, at_random: float
) -> None:
    outcome, best = played(router, policy, data_dir, tmp_path_factory.mktemp("r"))
    assert min(outcome.by_replica) > 0, "a replica was left out"
    assert at_random + 0.1 < outcome.hit_rate <= best + 0.02, (at_random, outcome, best)
