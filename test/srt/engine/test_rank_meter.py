"""How tokens of experts are put together from what ranks have counted."""

from rtp_llm.srt.engine.rank_meter import imbalance, loads_of_layers
from rtp_llm.srt.worker.worker import RankStats


def test_a_rank_that_counts_has_all_tokens_of_its_layers() -> None:
    ranks = [RankStats([[1, 2], [3, 0]], 0.0), RankStats([], 0.0), RankStats([[0, 3]], 0.0), RankStats([], 0.0)]
    assert loads_of_layers(ranks, of_own_requests=False) == [[1, 2], [3, 0], [0, 3]]


def test_ranks_with_requests_of_their_own_add_up() -> None:
    ranks = [RankStats([[1, 2, 0, 0], [3, 0, 0, 0]], 0.0), RankStats([[0, 0, 1, 0], [0, 0, 0, 1]], 0.0)]
    loads = loads_of_layers(ranks, of_own_requests=True)
    assert loads == [[1, 2, 1, 0], [3, 0, 0, 1]]
    assert imbalance(loads, 2) == 1.5, "three of four tokens in one of two parts"
