"""Recorded steps and recurrent states."""

import torch
from dense_forward import DenseAttention, make_batch
from recurrent_rows import pool_of, rows_of

from rtp_llm.srt.devices.cpu.graphs import RECORD_AT, CpuGraphs
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.layers.causal_conv import CausalConv1d
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput


class NoAttention(DenseAttention):
    def step_tensors(self) -> list[torch.Tensor]:
        return []


def run_steps(reads_values: bool) -> tuple[list[float], CpuGraphs]:
    """Steps of one row through a convolution that sums the last two inputs; the model may read a value after it."""
    layer = CausalConv1d([1], 2, 0)
    layer.weight.data.fill_(1.0)
    pool = pool_of(layer)

    def forward(batch: ForwardBatch) -> LogitsProcessorOutput:
        y = layer(batch.input_ids[:, None].float(), batch)
        if reads_values:
            y = y + 0 * y.sum().item()
        return LogitsProcessorOutput(y, [])

    graphs, results = CpuGraphs(forward, NoAttention(), []), []
    for token in range(1, RECORD_AT + 4):
        batch = make_batch([token], token, 1)
        batch.state_pool, batch.state_waves = pool, [rows_of([1], [min(token - 1, 1)], [1])]
        results.append(graphs.run(batch).next_token_logits.item())
    return results, graphs


@torch.inference_mode()
def test_states_go_on_through_recorded_steps() -> None:
    results, graphs = run_steps(reads_values=False)
    assert results == [2.0 * token - 1 for token in range(1, RECORD_AT + 4)]
    assert graphs._works


@torch.inference_mode()
def test_a_recording_that_fails_leaves_states_as_they_were() -> None:
    """Else the step, which is then computed again, would count its token twice."""
    results, graphs = run_steps(reads_values=True)
    assert results == [2.0 * token - 1 for token in range(1, RECORD_AT + 4)]
    assert not graphs._works["decode"]


@torch.inference_mode()
def test_graphs_share_the_memory_of_their_results() -> None:
    """Results are valid until the next step: each number of rows with memory of its own would take too much."""

    def forward(batch: ForwardBatch) -> LogitsProcessorOutput:
        return LogitsProcessorOutput(batch.input_ids[:, None] * torch.ones(1024), [])

    graphs = CpuGraphs(forward, NoAttention(), [])
    for num_rows in [*range(8, 4, -1)] * (RECORD_AT + 1):
        batch = make_batch(list(range(num_rows)), 1, 1)
        batch.batch_size, batch.sample_rows, batch.prompt_logprobs = num_rows, torch.arange(num_rows), []
        results = graphs.run(batch).next_token_logits
        assert torch.equal(results, torch.arange(num_rows)[:, None].expand(-1, 1024).float())
    assert sum(len(pieces) for size, pieces in graphs._memory._pieces.items() if size >= 5 * 4096) == 1
