"""Which core a request goes to, by the prefixes that each core holds."""

import random

from made_requests import request_spec

from rtp_llm.srt.managers.prefix_routes import BLOCK_TOKENS, MORE, PrefixRoutes, block_hashes
from rtp_llm.srt.request_spec import PromptMedia

SPEC = request_spec()


def prompt(blocks: int, first: int = 0) -> list[int]:
    return list(range(first, first + blocks * BLOCK_TOKENS))


def test_hashes_are_equal_as_far_as_prefixes_are() -> None:
    ids, other = prompt(4), prompt(4)
    other[2 * BLOCK_TOKENS + 5] += 1
    hashes, others = block_hashes(ids, SPEC), block_hashes(other, SPEC)
    assert len(hashes) == 4 and hashes[:2] == others[:2]
    assert not set(hashes[2:]) & set(others[2:])  # what follows a difference differs
    assert block_hashes([*ids, 1, 2], SPEC) == hashes  # a block that is not whole has none
    assert block_hashes(ids[: BLOCK_TOKENS - 1], SPEC) == []


def test_hashes_go_by_what_the_cache_goes_by() -> None:
    ids = prompt(2)
    salted = block_hashes(ids, request_spec(cache_salt="x"))
    media = PromptMedia(b"", [*prompt(1, 7), *ids[BLOCK_TOKENS:]], [])
    with_media = block_hashes([*ids, *prompt(1)], request_spec(media=media))
    plain = block_hashes([*ids, *prompt(1)], SPEC)
    assert not set(salted) & set(plain) and not set(with_media) & set(plain)
    assert len(with_media) == 3  # outputs follow the prompt's keys


def test_a_request_goes_where_its_prefix_is() -> None:
    routes = PrefixRoutes([1000, 1000, 1000])
    routes.note(1, block_hashes(prompt(3), SPEC))
    routes.note(2, block_hashes([*prompt(2), *prompt(2, 500)], SPEC))
    hashes = block_hashes([*prompt(3), *prompt(2, 900)], SPEC)
    assert [routes.matched_tokens(core, hashes) for core in range(3)] == [0, 3 * BLOCK_TOKENS, 2 * BLOCK_TOKENS]
    routes.num_requests = [0, 2, 1]
    assert routes.choose(hashes, range(3)) == 1
    assert routes.choose(hashes, [0, 2]) == 2  # the best one is not ready
    routes.num_requests = [0, MORE + 1, 0]
    assert routes.choose(hashes, range(3)) == 2  # the best one has too much to do
    routes.forget(1)
    routes.num_requests = [0, 0, 1]
    assert routes.choose(hashes, range(3)) == 2
    assert routes.choose(block_hashes(prompt(3, 77), SPEC), range(3)) == 0  # nobody has it: the least loaded


def test_a_core_holds_no_more_than_its_cache() -> None:
    routes = PrefixRoutes([4 * BLOCK_TOKENS])
    first, second = block_hashes(prompt(3), SPEC), block_hashes(prompt(3, 1000), SPEC)
    routes.note(0, first)
    routes.note(0, second)
    assert routes.matched_tokens(0, second) == 3 * BLOCK_TOKENS
    assert routes.matched_tokens(0, first) == BLOCK_TOKENS  # ends are dropped before beginnings


def test_random_operations_keep_prefixes_closed() -> None:
    """Whatever was noted and dropped, a held block's predecessors are held."""
    draw = random.Random(4)
    routes = PrefixRoutes([10 * BLOCK_TOKENS])
    prompts = [[*prompt(2, draw.randrange(3)), *prompt(draw.randrange(5), 100 * i)] for i in range(20)]
    chains = [block_hashes(ids, SPEC) for ids in prompts]
    for _ in range(300):
        chain = draw.choice(chains)
        routes.note(0, chain[: draw.randrange(len(chain) + 1)])
        for each in chains:
            held = [block in routes._held[0] for block in each]
            assert held == sorted(held, reverse=True)
        assert len(routes._held[0]) <= 10
