"""What a table on the device changes in logits is what the sampler changes by lists of the host, also when recorded."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda, registered
from made_requests import request_spec
from token_masks import masks_of

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.devices.cuda.graphs import CudaGraphs
from rtp_llm.srt.plan import Admission, TokenMasks
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker import adjust_table
from rtp_llm.srt.worker.recorded_draws import RecordedDraws
from rtp_llm.srt.worker.sampler import Sampler
from rtp_llm.srt.worker.sampling_tables import masked_lines

VOCAB, NUM_ROWS = 70, 6


@pytest.fixture
def device() -> Iterator[None]:
    with registered(), fake_cuda():
        yield


def drawn_admission(draw: random.Random, row: int) -> Admission:
    """Few of 12 ids are drawn, so that bans and words meet."""
    params: dict[str, Any] = {"temperature": draw.choice((0, 1.0)), "top_p": draw.choice((1.0, 0.9))}
    if draw.random() < 0.6:
        params |= {"repetition_penalty": draw.choice((0.7, 1.4)), "frequency_penalty": draw.choice((0, 0.3))}
    if draw.random() < 0.4:
        params["presence_penalty"] = 0.7
    if draw.random() < 0.4:
        params["logit_bias"] = {str(i): draw.uniform(-3, 3) for i in draw.sample(range(12), 5)}
    if draw.random() < 0.5:
        words = [[draw.randrange(12) for _ in range(draw.choice((1, 2, 2, 3, 4)))] for _ in range(4)]
        params["bad_words_ids"] = words
    if draw.random() < 0.3:
        params["allowed_token_ids"] = [*range(13)]
    if draw.random() < 0.5:
        params["min_new_tokens"] = draw.randrange(1, 9)
    spec = request_spec(SamplingParams(**params), draw.randrange(1 << 40), eos_token_ids=(3, 5, 7))
    prompt = [draw.randrange(12) for _ in range(draw.randrange(1, 6))] + [10**6]
    return Admission(row, f"r{row}", prompt, [draw.randrange(12) for _ in range(draw.randrange(4))], spec)


def drawn_logits(num_rows: int) -> torch.Tensor:
    logits = torch.randn(num_rows, VOCAB) * 2
    logits[:, :12] += 3
    return logits.round(decimals=1)


@pytest.mark.parametrize("seed", range(4))
def test_random_rows_are_adjusted_as_by_the_host(device: None, seed: int) -> None:
    """Rows come, go and draw, of any kind; some wide words do not fit, and are adjusted by the host's lists."""
    draw, ours, theirs = random.Random(seed), Sampler(NUM_ROWS, VOCAB, "fake_cuda"), Sampler(NUM_ROWS, VOCAB, "cpu")
    torch.manual_seed(seed)
    positions: dict[int, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adjust_table.Adjustment, "fits", lambda adjustment: len(adjustment.prompt_ids) % 4 > 0)
        for _ in range(25):
            row = draw.randrange(NUM_ROWS)
            if row in positions and draw.random() < 0.3:
                for sampler in (ours, theirs):
                    sampler.release(row)
                del positions[row]
            elif row not in positions or draw.random() < 0.2:
                admission = drawn_admission(draw, row)
                for sampler in (ours, theirs):
                    sampler.admit(admission)
                positions[row] = len(admission.prompt_ids) + len(admission.output_ids)
            rows = draw.sample(sorted(positions), draw.randint(0, len(positions)))
            logits, at, masks = drawn_logits(len(rows)), [positions[row] for row in rows], drawn_masks(draw, rows)
            tokens = theirs.sample(logits, rows, at, masks)
            assert torch.equal(ours.sample(logits, rows, at, masks), tokens)
            for sampler in (ours, theirs):
                sampler.observe(rows, tokens)
            positions |= {row: positions[row] + 1 for row in rows}


def drawn_masks(draw: random.Random, rows: list[int]) -> TokenMasks | None:
    masked = [row for row in rows if draw.random() < 0.3]
    return masks_of(masked, [draw.sample(range(12), 5) for _ in masked], VOCAB) if masked else None


def test_what_follows_a_step_is_recorded_for_any_rows(device: None) -> None:
    """One recording of four lines, the last of them dummies, repeated for other rows, with masks and without."""
    draw, theirs = random.Random(3), Sampler(NUM_ROWS, VOCAB, "cpu")
    ours = Sampler(NUM_ROWS, VOCAB, "fake_cuda")
    torch.manual_seed(3)
    logits, tokens = torch.zeros(4, VOCAB), torch.zeros(4, dtype=torch.int64)
    place, last_tokens = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(NUM_ROWS + 1, dtype=torch.int64)
    assert ours.tables is not None
    with torch.inference_mode():
        draws = RecordedDraws(logits, tokens, last_tokens, ours.tables, provider_named("fake_cuda"))
        place[0] = NUM_ROWS
        graphs = draws.record(CudaGraphs(), *place)
        positions = {}
        for row in range(NUM_ROWS):
            admission = drawn_admission(draw, row)
            ours.admit(admission)
            theirs.admit(admission)
            positions[row] = len(admission.prompt_ids) + len(admission.output_ids)
        for step in range(12):
            rows = draw.sample(range(NUM_ROWS), 3)
            at, masks = [positions[row] for row in rows], drawn_masks(draw, rows) if step % 2 else None
            logits[:3] = drawn_logits(3)
            before = logits.clone()
            expected = theirs.sample(logits[:3], rows, at, masks)
            theirs.observe(rows, expected)
            ours.tables.fill()
            place[0, :3], place[1, :3] = torch.tensor(rows), torch.tensor(at)
            lines = [] if masks is None else masked_lines(rows, masks, VOCAB)
            draws.run(graphs, not ours.are_greedy(rows), True, ours.tables.adjusts(rows), masks, lines)
            assert torch.equal(tokens[:3], expected) and torch.equal(last_tokens[rows], expected)
            assert torch.equal(logits, before), "the model's own logits stay: log-probabilities are of them"
            positions |= {row: positions[row] + 1 for row in rows}


def test_what_a_line_has_no_room_for() -> None:
    def fits(stop_ids: range = range(1), **params: Any) -> bool:
        return adjust_table.Adjustment(SamplingParams(**params), [0], [], stop_ids, 1).fits()

    assert fits(range(adjust_table.MOST_STOPS)) and not fits(range(adjust_table.MOST_STOPS + 1))
    most = adjust_table.MOST_BIASES
    assert fits(logit_bias={str(i): 1.0 for i in range(most)})
    assert not fits(logit_bias={str(i): 1.0 for i in range(most + 1)})
    length = adjust_table.MOST_LENGTH
    assert fits(bad_words_ids=[[1] * (length + 1)]) and not fits(bad_words_ids=[[1] * (length + 2)])
    assert not fits(bad_words_ids=[[1, 2]] * (adjust_table.MOST_WORDS + 1))
