"""How tokens come to experts that other ranks have, where ranks have requests of their own (``--moe-a2a-backend``)."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from rtp_llm.srt.device.choice import pick
from rtp_llm.srt.distributed.parallel_state import DATA, World, get_world

# Takes tokens [T, hidden_size], and weights and experts [T, top_k]. Returns, for each token, the weighted sum of those
# of its experts that this rank has, [T, hidden_size] in the tokens' dtype.
ComputeOwn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class TokenExchange(Protocol):
    """Computes a rank's tokens by the experts of all ranks. All of them call it for a layer, in the same order."""

    def compute(
        self, tokens: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, compute_own: ComputeOwn
    ) -> torch.Tensor:
        """Return each token's weighted sum of all of its experts.

        Args:
            tokens: [T, hidden_size], as many as ``World.step_tokens`` says of this rank; topk_weights, topk_ids:
                [T, top_k], of all ranks' experts.
            compute_own: is called once, on every rank, with tokens of any rank.
        """


class CollectedTokens:
    """Every rank gets the tokens of all ranks; sums are added up for all tokens, on all ranks."""

    def __init__(self, world: World) -> None:
        self._world, self._group = world, world.group(DATA)

    def compute(
        self, tokens: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, compute_own: ComputeOwn
    ) -> torch.Tensor:
        tokens, weights, ids = (of_all_ranks(x, self._world) for x in (tokens, topk_weights, topk_ids))
        summands = compute_own(tokens, weights, ids)
        return self._group.all_reduce(summands).split(self._world.step_tokens)[self._group.rank]


class SentTokens:
    """A token is sent once to each rank that has one of its experts, and that rank's sum for it comes back.

    A device may have its own way between ranks (``SharedMemory.send_tokens``). Otherwise, all ranks first tell each
    other the weights and experts of their tokens, some bytes for each, so that they know who sends how much to whom.
    The host reads how many rows these are, and so waits for the device; then they are exchanged.
    """

    def __init__(self, world: World, num_own_experts: int, dtype: torch.dtype) -> None:
        self._world, self._group = world, world.group(DATA)
        self._num_own_experts = num_own_experts
        self._sum_rows = pick("sum_rows", dtype)

    def compute(
        self, tokens: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, compute_own: ComputeOwn
    ) -> torch.Tensor:
        group, counts_of_tokens = self._group, self._world.step_tokens
        if group.shared is not None:
            routing = topk_weights, topk_ids
            arrived = group.shared.send_tokens(tokens, *routing, counts_of_tokens, self._num_own_experts)
            if arrived is not None:
                given = arrived.tokens, arrived.topk_weights, arrived.topk_ids
                return arrived.sums(compute_own(*given) if len(arrived.tokens) else arrived.tokens)
        return self._send(tokens, topk_weights, topk_ids, compute_own)

    def _send(
        self, tokens: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, compute_own: ComputeOwn
    ) -> torch.Tensor:
        group = self._group
        weights, ids = self._routing_of_all(topk_weights, topk_ids)
        goes = goes_to(ids, self._num_own_experts, group.world_size)
        by_source = goes.split(self._world.step_tokens)
        counts: list[list[int]] = torch.stack([of_rank.sum(dim=0) for of_rank in by_source]).tolist()
        num_sent, num_received = sum(counts[group.rank]), sum(of_rank[group.rank] for of_rank in counts)
        by_destination = by_source[group.rank].T.flatten()
        places, sent = places_of(by_destination, num_sent)
        received = group.all_to_all(tokens[sent % len(tokens)], counts)
        _, chosen = places_of(goes[:, group.rank], num_received)
        summands = compute_own(received, weights[chosen], ids[chosen]) if num_received else received
        returned = group.all_to_all(summands, [list(of_rank) for of_rank in zip(*counts, strict=True)])
        by_token = places.view(group.world_size, -1).T
        ones = (by_token < num_sent).to(topk_weights.dtype)
        # A row of zeros is in the place of sums that do not come.
        return self._sum_rows(F.pad(returned, (0, 0, 0, 1)), by_token.flatten(), ones)

    def _routing_of_all(self, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and experts of all ranks' tokens, [T of all ranks, top_k]."""
        bits = torch.cat([topk_weights.float().view(torch.int32), topk_ids.int()], dim=1)
        weights, ids = of_all_ranks(bits, self._world).chunk(2, dim=1)
        return weights.view(torch.float32).to(topk_weights.dtype), ids.to(topk_ids.dtype)


def token_exchange(num_own_experts: int, dtype: torch.dtype) -> TokenExchange:
    """Return the exchange for a layer of this rank's world. ``num_own_experts``: of each rank; ``dtype``: of tokens."""
    world = get_world()
    if world.moe_a2a_backend == "none":
        return CollectedTokens(world)
    return SentTokens(world, num_own_experts, dtype)


def of_all_ranks(x: torch.Tensor, world: World) -> torch.Tensor:
    """[T of this rank, n] -> [T of all ranks, n], in their order."""
    counts: Sequence[int] = world.step_tokens
    longest = max(counts)
    parts = world.group(DATA).all_gather(F.pad(x, (0, 0, 0, longest - len(x))), dim=0).split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def goes_to(topk_ids: torch.Tensor, num_own_experts: int, num_ranks: int) -> torch.Tensor:
    """Return [T, num_ranks] bool: which ranks have an expert of a token. Each has as many, neighbours."""
    goes = torch.zeros(len(topk_ids), num_ranks, dtype=torch.bool, device=topk_ids.device)
    return goes.scatter_(1, topk_ids // num_own_experts, True)


def places_of(chosen: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the place of each chosen element, [n] bool, among the chosen ones, and the element in each place.

    ``count``: of the chosen ones, which is not read from the device. It is the place of those that are not chosen.
    """
    places = torch.where(chosen, chosen.cumsum(dim=0) - 1, count)
    elements = places.new_empty(count + 1)  # the last one is of no use: all that are not chosen write it
    elements.scatter_(0, places, torch.arange(len(places), device=places.device))
    return places, elements[:count]
