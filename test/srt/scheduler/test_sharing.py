"""Which prefixes attention reads once, by hand."""

from rtp_llm.srt.cache.allocator import PageAllocator
from rtp_llm.srt.cache.prefix_cache import Lock, NoPrefixCache
from rtp_llm.srt.cache.radix_cache import RadixCache
from rtp_llm.srt.cache.spec import CacheGroup, CacheSpec
from rtp_llm.srt.cache.tree_node import TreeNode
from rtp_llm.srt.plan import SharedPrefix
from rtp_llm.srt.scheduler.sharing import saved_tokens, worth_reading_once

GROUP = CacheGroup(CacheSpec(1, 8, 8, "float32"), (0,), 1)


def root() -> TreeNode:
    return TreeNode(None, [], 0, [])


def child(parent: TreeNode, num_tokens: int) -> TreeNode:
    return TreeNode(parent, [1] * num_tokens, parent.end + num_tokens, [])


def found(nodes: list[TreeNode | None], min_tokens: int = 10) -> list[tuple[int, list[int]]]:
    """Rows are 7, 8, 9, ..."""
    locks = [Lock(0 if node is None else node.end, node) for node in nodes]
    shared = RadixCache([GROUP], [PageAllocator(1)]).shared_prefixes(locks)
    prefixes = worth_reading_once(range(7, 7 + len(nodes)), shared, min_tokens)
    return [(prefix.num_tokens, prefix.rows) for prefix in prefixes]


def test_one_prefix() -> None:
    prefix = child(root(), 100)
    assert found([child(prefix, 5), None, child(prefix, 50), prefix]) == [(100, [7, 9, 10])]


def test_nothing_in_common() -> None:
    top = root()
    assert found([child(top, 100), child(top, 100), None, child(root(), 100)]) == []
    assert found([]) == []


def test_nodes_that_the_same_rows_hold_are_one_prefix() -> None:
    first = child(root(), 6)
    second = child(first, 6)
    third = child(second, 6)
    assert found([third, third]) == [(18, [7, 8])]
    assert found([third, third, second]) == [(12, [7, 8, 9])]  # six more tokens are not worth it
    assert found([third, third, second], min_tokens=6) == [(12, [7, 8, 9]), (18, [7, 8])]


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    cache = NoPrefixCache([GROUP])
    assert cache.shared_prefixes([Lock(0), Lock(0)]) == [] and cache.common_len([1, 2], [1, 2], 2) == 0


def test_prefixes_nest() -> None:
    all_of_them = child(root(), 100)
    left, right = child(all_of_them, 40), child(all_of_them, 60)
    prefixes = found([left, right, left, right, all_of_them])
    assert prefixes == [(100, [7, 8, 9, 10, 11]), (140, [7, 9]), (160, [8, 10])]


def test_what_is_too_short_alone_goes_with_what_follows() -> None:
    short = child(root(), 4)
    left, right = child(short, 9), child(short, 3)
    assert found([left, right, left, right]) == [(13, [7, 9])]


def test_saved_tokens() -> None:
    prefixes = [SharedPrefix(100, [1, 2, 3]), SharedPrefix(140, [1, 2]), SharedPrefix(50, [4, 5])]
    assert saved_tokens(prefixes) == 200 + 40 + 50
    assert saved_tokens([]) == 0
