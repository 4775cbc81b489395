"""Causes of differences in layers with a state: what the reference's convolutions, gates and scans were given is
computed with anew, in ways that people get wrong, until one gives what ours has."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from rtp_llm.srt.layers.activation import get_act_fn
from rtp_llm.tools.verify.boundary_states import CONVOLUTION, StatePair
from rtp_llm.tools.verify.evidence import Evidence, Finding
from rtp_llm.tools.verify.order_causes import order_text
from rtp_llm.tools.verify.recurrent_calls import (
    CONVOLVED,
    DECAYS,
    L2_EPS,
    SCAN_KEYS,
    SCAN_QUERIES,
    SCAN_VALUES,
    SCANNED,
    SHARES,
    STEPS,
    TO_CONVOLVE,
    ConvolutionCall,
    ScanCall,
    convolve,
)
from rtp_llm.tools.verify.trace import Place

MAX_GROWTH = 1e3  # of ours, to the largest number of the reference
Trials = Iterator[tuple[str, torch.Tensor]]  # (a cause, what ours would be)


def explain_recurrent(evidence: Evidence, place: Place) -> str | None:
    """Return the cause of another convolution, gate or scan; None: no trial gives ours."""
    trials = {
        CONVOLVED: _convolutions,
        SCANNED: _scans,
        SHARES: _shares,
        STEPS: _step_sizes,
        DECAYS: _decays,
    }[place.part]
    ours, theirs = evidence.pair(place)
    num = _num_sound(ours, theirs)
    if evidence.same(ours[:num], theirs[:num]):  # none is left, or what is left is right
        return None
    found = (
        text
        for text, tensor in trials(evidence, place)
        if evidence.same(ours[:num], tensor[len(tensor) - len(ours) :][:num])
    )
    return next(found, None)


def _num_sound(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Return the number of tokens before ours has outgrown the reference: a wrong state may grow beyond all numbers."""
    limit = MAX_GROWTH * float(theirs.abs().max())
    wild = ~(ours.abs() < limit).all(dim=-1)
    return int(wild.int().argmax()) if bool(wild.any()) else len(ours)


# Boundaries


def explain_boundary(evidence: Evidence, place: Place, error: float) -> Finding | None:
    """Explain a convolution or a scan that is right up to the end of a piece: by the state that ours has there, if that
    is wrong, or by its not being used. None: it is wrong before, too, or nothing is found."""
    if place.part not in (CONVOLVED, SCANNED):
        return None
    first = _first_wrong(evidence, place)
    boundary = max((pair.position for pair in evidence.states if pair.position <= first), default=0)
    if not boundary:
        return None
    kind = place.part == CONVOLVED
    wrong = [pair for pair in evidence.wrong_states(place.module) if (pair.kind == CONVOLUTION) == kind]
    at_boundary = [pair for pair in wrong if pair.position == boundary]
    if at_boundary:
        return explain_state(evidence, at_boundary[0])
    ours = evidence.ours.tensors[place]
    anew = _from_nothing(evidence, place, boundary)
    if anew is None or not evidence.same(ours, anew[-len(ours) :]):
        return None
    cause = (
        f"tokens from number {boundary} on are computed as if none came before: the state after the first {boundary} "
        "is right, but what follows does not begin with it"
    )
    return Finding(place.module, place.part, error, [cause])


def _first_wrong(evidence: Evidence, place: Place) -> int:
    """Return the position of the first token that differs."""
    ours, theirs = evidence.pair(place)
    sizes = theirs.norm(dim=-1)
    wrong = (ours - theirs).norm(dim=-1) > evidence.tolerance * sizes.clamp(min=0.1 * float(sizes.mean()) + 1e-30)
    return evidence.ours.first_position(place) + int(wrong.int().argmax())


def _from_nothing(evidence: Evidence, place: Place, boundary: int) -> torch.Tensor | None:
    """Return the reference's result if the tokens from ``boundary`` on had no state to begin with."""
    if place.part == CONVOLVED:
        given = _to_convolve(evidence, place.module)
        if given is None:
            return None
        x, call = given
        return torch.cat([convolve(x[:boundary], call), convolve(x[boundary:], call)])
    scan = _Scan.of(evidence, place.module)
    if scan is None:
        return None
    return torch.cat([scan.part(0, boundary).run()[0], scan.part(boundary, scan.num_tokens).run()[0]])


def explain_state(evidence: Evidence, pair: StatePair) -> Finding:
    """Explain another state."""
    trials = _convolution_states if pair.kind == CONVOLUTION else _recurrent_states
    found = [text for text, state in trials(evidence, pair) if evidence.same(pair.ours.flatten(1), state.flatten(1))]
    if found:
        return Finding(pair.module, pair.part, pair.error, found[:1])
    text = "the state is not the reference's, in none of the ways that were tried"
    return Finding(pair.module, pair.part, pair.error, [text], is_description=True)


def _convolution_states(evidence: Evidence, pair: StatePair) -> Trials:
    right = pair.theirs
    yield "nothing is kept: it is zero", torch.zeros_like(right)
    yield "its tokens are in the other order: the newest comes first", right.flip(0)
    given, size = _to_convolve(evidence, pair.module), len(right)
    if given is None:
        return
    x, call = given
    seen = torch.cat([x.new_zeros(size + 1, x.shape[1]), x[: pair.position]])
    yield "it ends a token too early: the last one is missing", seen[-size - 1 : -1]
    yield "its tokens are moved by one: the newest comes first, then the oldest", right.roll(1, 0)
    yield "its tokens are moved by one: the oldest comes last", right.roll(-1, 0)
    outputs = torch.cat([x.new_zeros(size, x.shape[1]), convolve(x, call)[: pair.position]])
    yield "it has what the convolution makes of its inputs, and not these", outputs[-size:]
    yield "its tokens went through silu first", F.silu(right)
    last = torch.zeros_like(right)
    last[-1] = right[-1]
    yield "it has the last token alone", last


def _recurrent_states(evidence: Evidence, pair: StatePair) -> Trials:
    yield "nothing is kept: it is zero", torch.zeros_like(pair.theirs)
    scan = _Scan.of(evidence, pair.module)
    if scan is None:
        return
    upto = scan.part(0, pair.position)
    yield "it is the state before the last token", scan.part(0, pair.position - 1).run()[1]
    boundaries = {other.position for other in evidence.states if other.position < pair.position}
    for start in sorted(boundaries):
        anew = scan.part(start, pair.position).run()[1]
        yield f"it has the tokens from number {start} on alone: what came before is not carried on", anew
    yield "only the last token is in it", scan.part(pair.position - 1, pair.position).run()[1]
    yield "it is decayed once more than it should be", _decayed(pair.theirs, upto.decays[-1])
    for text, changes in _changes_of_scan(scan):
        yield text, upto.run(**changes)[1]


def _decayed(state: torch.Tensor, decays: torch.Tensor) -> torch.Tensor:
    """``decays``: [heads] or [heads, k_dim], logarithms."""
    factor = decays.exp()
    return state * (factor[:, None, None] if factor.dim() == 1 else factor[..., None])


# Convolutions


def _to_convolve(evidence: Evidence, module: str) -> tuple[torch.Tensor, ConvolutionCall] | None:
    x, call = evidence.theirs.tensors.get(Place(module, TO_CONVOLVE)), evidence.theirs.convolutions.get(module)
    if x is None or call is None or len(x) != evidence.theirs.num_tokens:
        return None
    return x, call


def _convolutions(evidence: Evidence, place: Place) -> Trials:
    given = _to_convolve(evidence, place.module)
    if given is None:
        return
    x, call = given
    yield "its filter is turned round: a token's own factor comes first", convolve(x, call, weight=call.weight.flip(0))
    if call.bias is not None:
        yield "its bias is missing", convolve(x, call, bias=None)
        yield "its bias is added twice", convolve(x, call, bias=2 * call.bias)
    for name in (None, "silu", "sigmoid", "gelu", "relu"):
        if name != call.activation:
            yield _activation_text(name, call.activation), convolve(x, call, activation=name)
    shifted = torch.cat([x[1:], x.new_zeros(1, x.shape[1])])
    yield "it sees the next token: its inputs are one token ahead", convolve(shifted, call)
    late = torch.cat([x.new_zeros(1, x.shape[1]), x[:-1]])
    yield "it does not see the token itself: its inputs are one token late", convolve(late, call)
    for row, what in ((-1, "a token's own input"), (0, "the oldest input")):
        weight = call.weight.clone()
        weight[row] = 0
        yield f"{what} is left out", convolve(x, call, weight=weight)
    yield "each channel has the next one's filter", convolve(x, call, weight=call.weight.roll(1, 1))
    for name, other in evidence.theirs.convolutions.items():
        if name != place.module and other.weight.shape == call.weight.shape:
            yield f"its filter is that of {name}", convolve(x, call, weight=other.weight)


def _activation_text(ours: str | None, theirs: str | None) -> str:
    if ours is None:
        return f"its activation, {theirs}, is missing"
    return f"it ends in {ours}, " + (f"in the reference in {theirs}" if theirs else "which the reference has not")


# Gates


def _shares(evidence: Evidence, place: Place) -> Trials:
    right = evidence.theirs.tensors[place]
    raw = right.double().logit().float()
    yield "the sigmoid is missing", raw
    yield "the sigmoid is applied twice", right.sigmoid()
    for name in ("tanh", "silu", "relu"):
        yield f"{name} stands in the place of the sigmoid", get_act_fn(name)(raw)
    for factor, text in ((0.5, "half of"), (2.0, "twice")):
        yield f"they are {text} the reference's: another bound of how much is written", factor * right
    yield "they are one minus the reference's", 1 - right
    yield "they are all one: the gate is missing", torch.ones_like(right)


def _step_sizes(evidence: Evidence, place: Place) -> Trials:
    call = evidence.theirs.scans[place.module]
    if call.raw_steps is None:
        return
    dt, bias = call.raw_steps, call.step_bias
    if bias is not None:
        for text, other in _other_biases(bias, ()):
            yield f"dt_bias {text}", F.softplus(dt + other).clamp(*call.step_limit)
        dt = dt + bias
    yield "softplus is missing", dt.clamp(*call.step_limit)
    yield "they are not kept within their limits", F.softplus(dt)
    yield "the limits bound what softplus is given, not what it gives", F.softplus(dt.clamp(*call.step_limit))
    yield "a sigmoid stands in the place of softplus", dt.sigmoid().clamp(*call.step_limit)


def _decays(evidence: Evidence, place: Place) -> Trials:
    """By what decays are made of: ``-exp(A_log) * step``, where a step is softplus(a + dt_bias)."""
    right = evidence.theirs.tensors[place].double()
    yield "their sign is turned: states grow where they should fade", -right.float()
    yield "they are the decays themselves, and not their logarithms", right.exp().float()
    yield "they are all zero: nothing fades", torch.zeros_like(right).float()
    a_log, bias = (_parameter(evidence, place.module, name) for name in ("A_log", "dt_bias"))
    if a_log is None or right.shape[1] % a_log.numel():
        return
    heads = a_log.numel()
    rates = a_log.double().flatten().exp()
    order = _order_of_rates(evidence, place, rates)
    if order is not None:
        made = (right.unflatten(1, (heads, -1)) / rates[:, None] * rates[order][:, None]).flatten(1)
        yield f"the rates exp(A_log) of heads are in another order: {order_text(order)}", made.float()
    a_log = a_log.double().flatten().repeat_interleave(right.shape[1] // heads)
    step = right / -a_log.exp()
    yield "A_log is taken for the rate itself: its exponential is missing", (a_log * step).float()
    yield "-A_log is taken for the rate: its exponential is missing", (-a_log * step).float()
    yield "the rate, exp(A_log), is missing", (-step).float()
    yield "the rate is -exp(-A_log)", (-(-a_log).exp() * step).float()
    if bias is None or bias.numel() != right.shape[1] or STEPS in _parts(evidence, place.module):
        return
    bias = bias.double().flatten()
    total = step + torch.log(-torch.expm1(-step))  # of which step is the softplus
    for text, other in _other_biases(bias, (heads, len(bias) // heads)):
        yield f"dt_bias {text}", (-a_log.exp() * F.softplus(total - bias + other)).float()
    yield "softplus is missing", (-a_log.exp() * total).float()
    yield "a sigmoid stands in the place of softplus", (-a_log.exp() * total.sigmoid()).float()


def _other_biases(bias: torch.Tensor, shape: tuple[int, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what may be added in the place of a bias; ``shape``: heads and channels of each, where it has both."""
    yield "is not added", torch.zeros_like(bias)
    yield "is added twice", 2 * bias
    yield "is subtracted", -bias
    yield "is in reverse order", bias.flip(0)
    if len(shape) == 2 and min(shape) > 1:
        yield "is read by channels first, and not by heads", bias.view(shape[1], shape[0]).t().flatten()
        yield "is read by heads where it is by channels first", bias.view(shape).t().flatten()


def _order_of_rates(evidence: Evidence, place: Place, rates: torch.Tensor) -> list[int] | None:
    """Return whose rate each head of ours has, if it is another head's; None: it is not so."""
    ours, right = (x.double().unflatten(1, (len(rates), -1)) for x in evidence.pair(place))
    own = rates * (ours * right).sum((0, 2)) / right.square().sum((0, 2)).clamp(min=1e-30)
    order = [int((rates - rate).abs().argmin()) for rate in own]
    is_other = len(set(order)) == len(order) and order != sorted(order)
    return order if is_other and torch.allclose(rates[order], own, rtol=1e-3) else None


def _parts(evidence: Evidence, module: str) -> set[str]:
    return {place.part for place in evidence.theirs.tensors if place.module == module}


def _parameter(evidence: Evidence, module: str, name: str) -> torch.Tensor | None:
    """Return a parameter of the reference's module, or of one within it."""
    found = (
        tensor
        for key, tensor in evidence.their_parameters.items()
        if key.startswith(f"{module}.") and key.rpartition(".")[2] == name
    )
    return next(found, None)


# Scans


@dataclass(frozen=True)
class _Scan:
    """A scan of the reference, of all tokens: queries and keys [T, key heads, k_dim], values [T, heads, v_dim], shares
    [T, heads], decays [T, heads] or [T, heads, k_dim]."""

    call: ScanCall
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    shares: torch.Tensor
    decays: torch.Tensor

    @classmethod
    def of(cls, evidence: Evidence, module: str) -> "_Scan | None":
        """Return it; None: not all of it was recorded."""
        call, tensors = evidence.theirs.scans.get(module), evidence.theirs.tensors
        if call is None:
            return None
        share = SHARES if call.kind == "delta rule" else STEPS
        parts = [tensors.get(Place(module, p)) for p in (SCAN_QUERIES, SCAN_KEYS, SCAN_VALUES, share, DECAYS)]
        found = [part for part in parts if part is not None and len(part) == evidence.theirs.num_tokens]
        if len(found) != len(parts):
            return None
        q, k, v, shares, decays = found
        by_channel = decays.shape[1] != call.num_heads
        return cls(
            call,
            q.unflatten(1, (call.num_k_heads, -1)),
            k.unflatten(1, (call.num_k_heads, -1)),
            v.unflatten(1, (call.num_heads, -1)),
            shares,
            decays.unflatten(1, (call.num_heads, -1)) if by_channel else decays,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.values)

    def part(self, start: int, end: int) -> "_Scan":
        names = ("queries", "keys", "values", "shares", "decays")
        return replace(self, **{name: getattr(self, name)[start:end] for name in names})

    def run(
        self,
        *,
        corrects: bool = True,
        normalizes: bool | None = None,
        scales: bool = True,
        takes_turns: bool = False,
        decay: float = 1.0,
        fades_last: bool = False,
        reads_first: bool = False,
        share: bool = True,
        exchanged: bool = False,
        skip: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the result [T, heads * v_dim], and the state [heads, k_dim, v_dim] after the last token.

        Args:
            corrects: by the delta rule; normalizes: None: as the reference.
            takes_turns: value head h reads key head ``h % num_k_heads``.
            decay: factor of the decays' logarithms; fades_last: after the token is written, not before.
            reads_first: before the token is written.
            share: False: all of a token is written; exchanged: keys for queries; skip: factor of D.
        """
        is_delta = self.call.kind == "delta rule"
        q, k = (self._heads(x, normalizes, takes_turns) for x in (self.queries, self.keys))
        q, k = (k, q) if exchanged else (q, k)
        q = q * k.shape[-1] ** -0.5 if is_delta and scales else q
        factors = (decay * self.decays).exp()
        factors = factors[..., None, None] if factors.dim() == 2 else factors[..., None]
        shares = self.shares if share else torch.ones_like(self.shares)
        state = q.new_zeros(q.shape[1], q.shape[2], self.values.shape[2])
        outputs = []
        for t, v in enumerate(self.values):
            if reads_first:
                outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
            state = state if fades_last else state * factors[t]
            if is_delta and corrects:
                v = v - torch.einsum("hkv,hk->hv", state, k[t])
            state = state + k[t][..., None] * (shares[t][:, None] * v)[:, None]
            state = state * factors[t] if fades_last else state
            if not reads_first:
                outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
        result = torch.stack(outputs) if outputs else torch.zeros_like(self.values)
        if self.call.skip is not None:
            result = result + skip * self.call.skip[:, None] * self.values
        return result.flatten(1), state

    def _heads(self, x: torch.Tensor, normalizes: bool | None, takes_turns: bool) -> torch.Tensor:
        if self.call.normalizes if normalizes is None else normalizes:
            x = x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + L2_EPS)
        repeats = self.call.num_heads // self.call.num_k_heads
        return x.repeat(1, repeats, 1) if takes_turns else x.repeat_interleave(repeats, dim=1)


def _scans(evidence: Evidence, place: Place) -> Trials:
    scan = _Scan.of(evidence, place.module)
    if scan is None or not evidence.same(
        scan.run()[0][-len(evidence.theirs.tensors[place]) :], evidence.theirs.tensors[place]
    ):
        return
    for text, changes in _changes_of_scan(scan):
        yield text, scan.run(**changes)[0]


def _changes_of_scan(scan: _Scan) -> Iterator[tuple[str, dict[str, Any]]]:
    call = scan.call
    if 1 < call.num_k_heads < call.num_heads:
        shared = call.num_heads // call.num_k_heads
        text = f"heads are mixed: value head h reads key head h % {call.num_k_heads}, in the reference h // {shared}"
        yield text, {"takes_turns": True}
    if call.kind == "delta rule":
        yield "values are not corrected by what the state has for their key: no delta rule", {"corrects": False}
        yield "queries are not divided by the root of their size", {"scales": False}
        text = "are not divided by" if call.normalizes else "are divided by"
        yield f"queries and keys {text} their lengths", {"normalizes": not call.normalizes}
    if call.skip is not None:
        yield "D times the values is not added", {"skip": 0.0}
        yield "D times the values is added twice", {"skip": 2.0}
    yield "the sign of the decays is turned", {"decay": -1.0}
    yield "nothing fades: decays are not used", {"decay": 0.0}
    yield "decays are applied twice", {"decay": 2.0}
    yield "the state fades after a token is written, and not before", {"fades_last": True}
    yield "a token reads the state before its own key and value are written", {"reads_first": True}
    yield "all of each token is written: the gate is not used", {"share": False}
    yield "queries and keys are exchanged", {"exchanged": True}
