"""Steps of an encoder with dummies: few sizes, and the answers of steps without."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from rtp_llm import Engine
from rtp_llm.srt.devices.cpu import encoder_sizes
from rtp_llm.srt.devices.cpu.build import kernels_work
from rtp_llm.srt.forward_batch import ForwardBatch, ForwardMode
from tiny_models import make_tiny

needs_kernels = pytest.mark.skipif(not kernels_work(), reason="there is no C++ compiler")


def batch_of(counts: list[int], pooled: torch.Tensor) -> ForwardBatch:
    lens = torch.tensor(counts)
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(counts),
        input_ids=torch.arange(1, sum(counts) + 1),
        positions=torch.cat([torch.arange(count) for count in counts]),
        req_pool_indices=torch.arange(len(counts)),
        seq_lens=lens,
        extend_prefix_lens=torch.zeros_like(lens),
        extend_seq_lens=lens,
        extend_start_loc=lens.cumsum(0) - lens,
        seq_lens_cpu=counts,
        extend_prefix_lens_cpu=[0] * len(counts),
        extend_seq_lens_cpu=counts,
        prompt_lens_cpu=counts,
        page_tables=[],
        out_cache_locs=[],
        kv_pool=None,  # type: ignore[arg-type]
        attn_backend=None,  # type: ignore[arg-type]
        sample_rows=torch.empty(0, dtype=torch.int64),
        pooled_tokens=pooled,
    )


@pytest.mark.parametrize("seed", range(10))
def test_dummies_follow_the_inputs(seed: int) -> None:
    draw, sizes = random.Random(seed), set()
    for _ in range(200):
        counts = [draw.randint(1, 24) for _ in range(draw.randint(24, 40))]
        num_tokens, all_of_them = sum(counts), draw.random() < 0.5
        pooled = torch.arange(num_tokens) if all_of_them else torch.tensor(counts).cumsum(0) - 1
        batch = encoder_sizes.with_dummies(batch_of(counts, pooled))
        rows, tokens = batch.batch_size - len(counts), batch.num_tokens - num_tokens
        sizes.add((batch.batch_size, batch.num_tokens))
        assert tokens <= num_tokens / 32 + encoder_sizes.ROWS and (rows > 0) == (tokens > 0)
        assert batch.extend_seq_lens_cpu[: len(counts)] == counts and sum(batch.extend_seq_lens_cpu) == batch.num_tokens
        assert min(batch.extend_seq_lens_cpu) > 0
        assert batch.extend_seq_lens.tolist() == batch.seq_lens_cpu == batch.extend_seq_lens_cpu
        ends = batch.extend_start_loc + batch.extend_seq_lens
        assert ends.tolist() == torch.tensor(batch.extend_seq_lens_cpu).cumsum(0).tolist()
        assert batch.input_ids.tolist() == [*range(1, num_tokens + 1), *[0] * tokens]
        wanted = torch.arange(batch.num_tokens) if all_of_them else pooled
        assert batch.pooled_tokens is not None and batch.pooled_tokens.tolist() == wanted.tolist()
        assert batch.batch_size % encoder_sizes.ROWS == 0 and batch.num_tokens % 4 == 0
    assert len(sizes) < 100


def test_few_tokens_are_left_as_they_are() -> None:
    batch = batch_of([20, 30], torch.tensor([0, 20]))
    assert encoder_sizes.with_dummies(batch) is batch


@needs_kernels
@pytest.mark.parametrize(
    ("architecture", "task", "options"),
    [
        ("BertModel", "embed", {"hidden_size": 64}),
        ("BertModel", "token_embed", {}),
        ("ModernBertModel", "embed", {}),
        ("XLMRobertaForSequenceClassification", "classify", {}),
    ],
)
def test_answers_are_equal(architecture: str, task: str, options: dict[str, Any], tmp_path: Path) -> None:
    model_dir = make_tiny(architecture, tmp_path, **options)
    draw, vocab_size = random.Random(0), AutoConfig.from_pretrained(model_dir).vocab_size
    counts = [[draw.randint(2, 30) for _ in range(draw.randint(5, 9))] for _ in range(40)]
    calls = [[[draw.randrange(5, vocab_size) for _ in range(count)] for count in some] for some in counts]
    outputs: list[Any] = []
    for disabled in (False, True):
        with Engine(
            model_path=model_dir, dtype="float32", device="cpu", skip_tokenizer_init=True, inline=True,
            disable_cpu_graph=disabled,
        ) as engine:  # fmt: skip
            results = [engine.encode(input_ids=prompts, task=task) for prompts in calls]
            outputs.append([result["embedding"] for some in results for result in some])
            recorder = engine._runner.core.executor.worker.runner.recorder
        if not disabled:
            assert any(not isinstance(graph, int) for graph in recorder._graphs.values())
            assert len(recorder._graphs) < len({(len(some), sum(some)) for some in counts})
    assert outputs[0] == outputs[1]
