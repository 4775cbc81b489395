"""From logits to token ids: penalties, masks, filters, and one counter-based draw per row."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.layers.logits_processor import Logprobs, token_logprobs
from rtp_llm.srt.plan import Admission, TokenMasks
from rtp_llm.srt.request_spec import LogprobSpec
from rtp_llm.srt.sampling_params import SamplingParams
from rtp_llm.srt.worker.adjust_table import Adjustment
from rtp_llm.srt.worker.draw_table import DRAWN_AT_ONCE
from rtp_llm.srt.worker.philox import as_int64, exponential
from rtp_llm.srt.worker.sampling_tables import SamplingTables, masked_lines
from rtp_llm.srt.worker.token_bans import TokenBans, has_bans
from rtp_llm.srt.worker.token_counts import TokenCounts

_USUAL_NUCLEUS = 1024  # this many of the most probable tokens usually reach top_p
_LARGEST = torch.finfo(torch.float32).max


@dataclass(slots=True, eq=False)
class _Row:
    """The sampler's state of the request in a row."""

    params: SamplingParams
    prompt_len: int
    stop_ids: list[int]
    seed: int  # as int64
    bias_ids: list[int]
    bias_values: list[float]
    logprobs: LogprobSpec | None
    counted: bool  # has penalties, which need counts of its tokens

    def bans_stops_at(self, position: int) -> bool:
        return position - self.prompt_len < self.params.min_new_tokens


class Sampler:
    """Draws tokens for the rows of a step. Keeps, per admitted row, its parameters and, if penalised, token counts.

    A row's token depends on its own logits, parameters, seed and position only. Nothing here waits for the device.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: str, generates: bool = True) -> None:
        """``generates``: whether the model makes tokens; if not, nothing is kept on the device for drawing them."""
        self._rows: list[_Row | None] = [None] * max_rows
        self._vocab_size = vocab_size
        self._provider = provider_named(device)
        self._device = torch.device(self._provider.torch_device)
        self._counts = TokenCounts(vocab_size, self._provider)
        self._bans = TokenBans(vocab_size, self._provider)
        self._argmax = self._provider.pick("argmax", torch.float32)
        self._mask_tokens = self._provider.pick("mask_tokens", torch.float32)
        self._draw_kernel = self._provider.find("draw", torch.float32)
        has_tables = generates and self._provider.records_graphs
        self.tables = SamplingTables(max_rows, vocab_size, self._provider) if has_tables else None
        # Rows that need more than an argmax; a step with none of them is not examined row by row.
        self._adjusted: set[int] = set()  # logits are changed by penalties, biases or bans, not those of ``tables``
        self._drawing: set[int] = set()  # not greedy
        self._with_logprobs: set[int] = set()  # log-probabilities are wanted

    def admit(self, admission: Admission) -> None:
        """Add a request; ``output_ids``, which it generated before, count as generated."""
        params = admission.spec.params
        penalised = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
        self.release(admission.row)
        self._rows[admission.row] = row = _Row(
            params=params,
            prompt_len=len(admission.prompt_ids),
            stop_ids=[i for i in admission.spec.stop_ids if 0 <= i < self._vocab_size],  # others cannot be drawn anyway
            seed=as_int64(admission.spec.seed),
            bias_ids=list(params.logit_bias),
            # a larger value than float32 has would make NaN of a logit that is -inf
            bias_values=[min(max(value, -_LARGEST), _LARGEST) for value in params.logit_bias.values()],
            logprobs=admission.spec.logprobs,
            counted=bool(penalised),
        )
        is_adjusted = bool(penalised or params.logit_bias or params.min_new_tokens or has_bans(params))
        if not self._in_tables(admission, row, is_adjusted) and is_adjusted:
            if penalised:
                self._counts.add(admission.row, admission.prompt_ids, admission.output_ids)
            self._bans.add(admission.row, params, admission.output_ids)
            self._adjusted.add(admission.row)
        if not params.is_greedy:
            self._drawing.add(admission.row)
        if admission.spec.logprobs is not None:
            self._with_logprobs.add(admission.row)

    def _in_tables(self, admission: Admission, row: _Row, is_adjusted: bool) -> bool:
        """Enter a request into the tables of the device, if it has any; return whether they adjust its logits."""
        if self.tables is None:
            return False
        first_end = row.prompt_len + row.params.min_new_tokens
        adjustment = Adjustment(row.params, admission.prompt_ids, admission.output_ids, row.stop_ids, first_end)
        fits = is_adjusted and adjustment.fits()
        self.tables.enter(admission.row, row.params, row.seed, adjustment if fits else None)
        return fits

    def are_in_tables(self, rows: Sequence[int]) -> bool:
        """Whether the tables tell all that changes these rows' logits, but for masks."""
        return self.tables is not None and self._adjusted.isdisjoint(rows)

    def are_greedy(self, rows: Sequence[int]) -> bool:
        return self._drawing.isdisjoint(rows)

    def release(self, row: int) -> None:
        """Forget a row; harmless if it is empty."""
        self._rows[row] = None
        self._counts.remove(row)
        self._bans.remove(row)
        if self.tables is not None:
            self.tables.leave(row)
        for kind in (self._adjusted, self._drawing, self._with_logprobs):
            kind.discard(row)

    def observe(self, rows: Sequence[int], token_ids: torch.Tensor) -> None:
        """Count ``token_ids[i]`` ([S] int64, on the device) as generated in ``rows[i]``."""
        if self.tables is not None and self.tables.adjusts(rows):
            self.tables.fill()
            self.tables.adjustments.count(self._tensor(list(rows)), token_ids)
        if self._adjusted.isdisjoint(rows):
            return
        self._bans.observe(rows, token_ids)
        counted = [i for i, row in enumerate(rows) if row in self._adjusted and self._row(row).counted]
        if len(counted) < len(rows):
            token_ids = token_ids[self._tensor(counted)] if counted else token_ids[:0]
        self._counts.count([rows[i] for i in counted], token_ids)

    def sample(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        masks: TokenMasks | None = None,
    ) -> torch.Tensor:
        """Return one token per row.

        Logits are changed in this order: frequency and presence penalties (over generated tokens), repetition penalty
        (over all), mask, logit_bias, bans of tokens (see TokenBans), ban of the ids that would end the request too
        early. A ban that would leave no token is lifted. A greedy row then takes its largest logit, any other row a
        draw (see ``draw``).

        Args:
            logits: [S, vocab_size] float32, not changed.
            rows: the row of each line of logits.
            positions: index in its sequence of the token that is drawn.
            masks: of some of the rows; only what they allow is drawn.

        Returns:
            [S] int64 on the device.
        """
        return self.sample_and_check(logits, rows, positions, masks)[0]

    def sample_and_check(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        positions: Sequence[int],
        masks: TokenMasks | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``sample``; also return [S] bool: rows whose ``logits`` are bad, and whose tokens are meaningless.

        Bad logits, from which no token can be drawn, have a NaN, a +inf, or only -inf.
        """
        self._check_shape(logits, rows, positions)
        states = self._states(rows)
        adjusted = logits
        if masks is not None or not self._adjusted.isdisjoint(rows):
            adjusted = self._adjust(logits, states, rows, positions, masks)
        if self.tables is not None and self.tables.adjusts(rows):
            self.tables.fill()
            adjusted = self.tables.adjustments.adjust(adjusted, self._tensor(list(rows)), self._tensor(list(positions)))
        tokens, bad = self._argmax(adjusted)
        if adjusted is not logits:
            bad = self._argmax(logits)[1]
        if not self._drawing.isdisjoint(rows):
            drawn = [i for i, row in enumerate(rows) if row in self._drawing]
            tokens[self._tensor(drawn)] = self._draw(adjusted, drawn, states, positions)
        return tokens, bad

    def _draw(
        self, logits: torch.Tensor, lines: list[int], states: list[_Row], positions: Sequence[int]
    ) -> torch.Tensor:
        """Draw the tokens of these lines of logits."""
        params = [states[i].params for i in lines]
        seeds, at = self._tensor([states[i].seed for i in lines]), self._tensor([positions[i] for i in lines])
        if self._draw_kernel is not None:
            return self._draw_kernel(logits, params, seeds, at, lines)
        tokens = torch.empty(len(lines), dtype=torch.int64, device=self._device)
        for start in range(0, len(lines), DRAWN_AT_ONCE):
            part = slice(start, start + DRAWN_AT_ONCE)
            tokens[part] = draw(logits[self._tensor(lines[part])], params[part], seeds[part], at[part], self._provider)
        return tokens

    def logprobs(
        self, raw_logits: torch.Tensor, token_ids: torch.Tensor, rows: Sequence[int]
    ) -> tuple[list[int], Logprobs | None]:
        """Return the lines whose requests want log-probabilities, and these (None if there are no such lines).

        Args:
            raw_logits: [S, vocab_size], the model's; token_ids: [S], the drawn tokens.
        """
        if self._with_logprobs.isdisjoint(rows):
            return [], None
        asked = {i: spec for i, state in enumerate(self._states(rows)) if (spec := state.logprobs) is not None}
        specs, index = list(asked.values()), self._tensor(list(asked))
        chosen_nums = [len(spec.token_ids_logprob) for spec in specs]
        chosen = None
        if most := max(chosen_nums):
            chosen = self._tensor([([*spec.token_ids_logprob] + [0] * most)[:most] for spec in specs])
        top_nums = [spec.top_logprobs_num for spec in specs]
        return list(asked), token_logprobs(raw_logits[index], token_ids[index], top_nums, chosen, chosen_nums)

    def _states(self, rows: Sequence[int]) -> list[_Row]:
        return [self._rows[row] or self._row(row) for row in rows]

    def _row(self, row: int) -> _Row:
        state = self._rows[row]
        if state is None:
            raise ValueError(f"row {row} was not admitted to the sampler")
        return state

    def _check_shape(self, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int]) -> None:
        if tuple(logits.shape) != (len(rows), self._vocab_size) or len(positions) != len(rows):
            raise ValueError(
                f"logits must be [rows, vocab_size] = {[len(rows), self._vocab_size]} with a position per row, not "
                f"{list(logits.shape)} with {len(positions)} positions"
            )

    def _tensor(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return self._provider.to_device(values, torch.int64)

    def _adjust(
        self,
        logits: torch.Tensor,
        states: list[_Row],
        rows: Sequence[int],
        positions: Sequence[int],
        masks: TokenMasks | None,
    ) -> torch.Tensor:
        """Return logits after penalties, masks, biases and bans: a copy, or the same tensor if there are none."""
        by_hand = [(i, state) for i, state in enumerate(states) if rows[i] in self._adjusted]
        counted = [i for i, state in by_hand if state.counted]
        biased, banned = _Cells(), _Cells()
        for i, state in by_hand:
            biased.add(i, state.bias_ids, state.bias_values)
            if state.bans_stops_at(positions[i]):
                banned.add(i, state.stop_ids)
        restricted = any(row in self._bans for row in rows)
        if not (counted or masks is not None or biased.lines or banned.lines or restricted):
            return logits
        logits = logits.clone()
        if counted:
            self._penalise(logits, counted, [rows[i] for i in counted], [states[i].params for i in counted])
        if masks is not None:
            self._mask(logits, rows, masks)
        if biased.lines:
            cells = (self._tensor(biased.lines), self._tensor(biased.ids))
            logits.index_put_(cells, self._provider.to_device(biased.values, torch.float32), accumulate=True)
        if restricted:
            self._bans.apply(logits, rows)
        logits.clamp_(max=_LARGEST)  # a penalty or a bias may have overflowed, and a draw cannot weigh +inf
        if banned.lines:
            _ban(logits, self._tensor(banned.lines), self._tensor(banned.ids))
        return logits

    def _penalise(self, logits: torch.Tensor, lines: list[int], rows: list[int], params: list[SamplingParams]) -> None:
        index = self._tensor(lines)
        scores = logits[index]
        counts, seen = self._counts.of(rows)
        table = [[p.frequency_penalty, p.presence_penalty, p.repetition_penalty] for p in params]
        frequency, presence, repetition = self._provider.to_device(table, torch.float32).split(1, dim=1)
        scores -= counts * frequency
        scores -= (counts > 0) * presence
        scores = torch.where(seen, torch.where(scores > 0, scores / repetition, scores * repetition), scores)
        logits[index] = scores

    def _mask(self, logits: torch.Tensor, rows: Sequence[int], masks: TokenMasks) -> None:
        lines = masked_lines(rows, masks, self._vocab_size)
        words = torch.empty(masks.words.shape, dtype=torch.int32, device=self._device)
        self._provider.copy_to_device(words, masks.words)
        self._mask_tokens(logits, self._tensor(lines), words)


@dataclass(slots=True)
class _Cells:
    """Places in a [S, vocab_size] tensor, as parallel lists."""

    lines: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, line: int, ids: list[int], values: Sequence[float] = ()) -> None:
        self.lines += [line] * len(ids)
        self.ids += ids
        self.values += values


def draw(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    seeds: torch.Tensor,
    positions: torch.Tensor,
    provider: DeviceProvider,
) -> torch.Tensor:
    """Draw one token per row from softmax(logits / temperature), cut to the tokens that ``kept_weights`` keeps.

    This is an exponential race, equal to the Gumbel-max trick (Gumbel 1954): every token has an exponentially
    distributed number, and the token with the smallest number divided by weight is drawn. So a small change of the
    logits changes the draw only where two tokens are close, whatever the other tokens are. A token of probability zero
    is never drawn.

    Args:
        logits: [D, vocab_size] float32; each row has a finite maximum.
        params: of each row, not greedy; seeds, positions: [D] int64, see ``philox.exponential``.
        provider: of the device that all of these are on.

    Returns:
        [D] int64.
    """
    weights = kept_weights(logits, params, provider)
    return (exponential(seeds, positions, logits.shape[-1]) / weights).argmin(dim=-1)


def kept_weights(logits: torch.Tensor, params: Sequence[SamplingParams], provider: DeviceProvider) -> torch.Tensor:
    """Return exp((logit - largest) / temperature) of every token, zero for those that top_k, top_p and min_p drop.

    As transformers does it: top_k keeps the k largest and all that equal the k-th; top_p keeps, of what top_k left and
    with its probabilities scaled to one, the fewest tokens that reach p (of equal ones the lowest ids), at least one;
    min_p drops what is less probable than min_p times the most probable token.

    Args:
        logits: [D, vocab_size] float32.

    Returns:
        [D, vocab_size] float64, not normalised.
    """
    vocab_size = logits.shape[-1]
    table = [[p.temperature, p.min_p] for p in params]
    temperature, min_p = provider.to_device(table, torch.float64).split(1, dim=1)
    weights = logits.double().sub_(logits.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
    by_top_k = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size]
    by_top_p = [i for i, p in enumerate(params) if p.top_p < 1 and not 0 < p.top_k < vocab_size]
    for lines in (by_top_k, by_top_p):
        if lines:
            index = provider.to_device(lines, torch.int64)
            chosen = [params[i] for i in lines]
            weights[index] = _cut(weights[index], chosen, provider)
    if any(p.min_p for p in params):
        weights.masked_fill_(weights < min_p, 0)
    return weights


def _cut(weights: torch.Tensor, params: list[SamplingParams], provider: DeviceProvider) -> torch.Tensor:
    """Apply top_k and top_p to rows that all have a top_k or all have none (only the latter may need a full sort).

    All weights above a cutoff are kept, and the first few that equal it. Cutoff and number come from the largest
    weights, sorted; applying them needs no mapping from sorted to vocabulary order.
    """
    vocab_size, device = weights.shape[-1], weights.device
    top_ks = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    top_k = provider.to_device([[k] for k in top_ks], torch.int64)
    top_p = provider.to_device([[p.top_p if p.top_p < 1 else torch.inf] for p in params], torch.float64)
    if max(top_ks) < vocab_size:
        largest = weights.topk(max(top_ks), dim=-1).values
        weights = weights.masked_fill(weights < largest.gather(1, top_k - 1), 0)
        largest = largest.masked_fill(torch.arange(largest.shape[1], device=device) >= top_k, 0)
    if all(p.top_p >= 1 for p in params):
        return weights
    total = weights.cumsum(dim=-1)[:, -1:]  # a sum whose rounding does not depend on the number of rows
    if max(top_ks) == vocab_size:
        largest = _largest(weights, top_p * total, may_wait=not provider.overlaps_steps)
    before = (largest.cumsum(dim=-1) - largest) / total
    num_kept = ((before < top_p) & (largest > 0)).sum(dim=-1, keepdim=True).clamp_(min=1)
    cutoff = largest.gather(1, num_kept - 1)
    first_equal = (largest > cutoff).sum(dim=-1, keepdim=True)
    num_equal = ((top_p - before.gather(1, first_equal)) * total / cutoff).ceil().clamp_(min=1)
    equal = weights == cutoff
    keep = (weights > cutoff) | (equal & (equal.cumsum(dim=-1) <= num_equal))
    return weights.masked_fill(~keep, 0)


def _largest(weights: torch.Tensor, mass: torch.Tensor, may_wait: bool) -> torch.Tensor:
    """Return each row's largest weights in descending order: enough to sum to more than ``mass`` ([rows, 1]).

    ``may_wait``: the host may check whether a few of them are enough, which is faster than sorting all.
    """
    if may_wait and weights.shape[-1] > _USUAL_NUCLEUS:
        largest = weights.topk(_USUAL_NUCLEUS, dim=-1).values
        if bool((largest.sum(dim=-1, keepdim=True) > mass * (1 + 1e-9)).all()):
            return largest
    return weights.sort(dim=-1, descending=True).values


def _ban(logits: torch.Tensor, lines: torch.Tensor, ids: torch.Tensor) -> None:
    """Set the cells to -inf, except in a row that would have no other value left."""
    values = logits[lines, ids]
    logits.index_put_((lines, ids), logits.new_full((), -torch.inf))  # a host number would need a copy to the device
    empty = logits.amax(dim=-1) == -torch.inf
    logits[lines, ids] = torch.where(empty[lines], values, -torch.inf)
