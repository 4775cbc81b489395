"""The contract between core and worker: the core sends a StepPlan, the worker returns a StepResult. Host values only.

A plan is a delta. A worker keeps, per *row* (the place of one running request), its admission and its pages; a step's
work then consists of rows and token counts only. Every rank gets the same plan.

Order within one plan: ``releases``, ``admissions``, ``known_tokens``, ``drawn_rows``, ``page_writes``, ``new_pages``,
then ``work``.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rtp_llm.srt.pooling import PooledOutput
from rtp_llm.srt.request_spec import RequestSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability (natural log, of the model's own distribution, before any sampling parameter) of one token."""

    token_id: int
    logprob: float
    top: list[tuple[float, int]] = field(default_factory=list)  # (logprob, token id), best first
    chosen: list[tuple[float, int]] = field(default_factory=list)  # the ids asked for, in their order


@dataclass(slots=True)
class Admission:
    """A request for row ``row``. ``output_ids`` is not empty if it resumes (after a retraction or a core's death)."""

    row: int
    rid: str
    prompt_ids: list[int]
    output_ids: list[int]
    spec: RequestSpec
    logprob_from: int | None = None  # prompt logprobs are wanted from the logits of this position on; None: none
    state_slot: int = 0  # where the row's states are kept while it runs, if the model has any


@dataclass(slots=True)
class PageWrite:
    """Entries ``[start, start + len(page_ids))`` of a row's page table in cache group ``group``.

    Page i of a row holds tokens ``[i * page_size, (i + 1) * page_size)``. Admission, growth by a chunk, and the
    exchange of a duplicate for the prefix cache's own page are all this one operation. Page 0 is the dummy: never read,
    never owned.
    """

    row: int
    group: int
    start: int
    page_ids: list[int]


@dataclass(slots=True)
class NewPages:
    """One further page for each of several decoding rows: ``page_ids[i]`` is entry ``places[i]`` of ``rows[i]``.

    The same as one PageWrite for each, in one object: there are hundreds in a step.
    """

    group: int
    rows: list[int]
    places: list[int]
    page_ids: list[int]


@dataclass(slots=True)
class KnownTokens:
    """Ids that nobody needs to draw, since a grammar forces them: those of a row's sequence from ``start`` on.

    ``start`` is at most the number of ids that the worker knew: of the admission, or of the KnownTokens before.
    """

    row: int
    start: int
    ids: list[int]


@dataclass(slots=True)
class RowWork:
    """Compute tokens ``[start, start + num_tokens)`` of a row.

    Ids come from the admission and from KnownTokens; the id after those is in the worker's last-token buffer.
    """

    row: int
    start: int
    num_tokens: int
    sample: bool  # the last of these tokens is the request's last: draw the next one


@dataclass(slots=True)
class StateAccess:
    """Slots that a row's work reads and writes besides its own (``Admission.state_slot``).

    Without one, the work reads the states of its sequence from the row's slot and writes them there. A slot is read and
    written in the order of plans: a slot that a plan frees may be given to another row by a later one.
    """

    row: int
    load: int  # the slot of the states after ``RowWork.start`` tokens; 0: the sequence begins here
    # (position, slot), ascending, ``start < position <= start + num_tokens``: the states after ``position`` tokens of
    # the sequence are also written to ``slot``. Those after the last token always go to the row's own slot.
    saves: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class SharedPrefix:
    """The first ``num_tokens`` tokens of these rows are in the same pages: attention may read them once.

    Each of these rows computes one token, after the prefix. A plan lists shorter prefixes before longer ones; either
    all rows of a longer prefix are rows of a given shorter one, or none is.
    """

    num_tokens: int
    rows: list[int]


@dataclass(slots=True)
class TokenMasks:
    """Which tokens may come next in some rows of a step: those whose bits are set.

    ``words`` is [len(rows), ceil(vocab_size / 32)] int32; token i is bit ``i % 32`` of word ``i // 32``. At least one
    token may come.
    """

    rows: list[int]
    words: "npt.NDArray[np.int32]"


@dataclass(slots=True)
class StepPlan:
    step_id: int
    releases: list[int] = field(default_factory=list)  # rows whose request has ended or was retracted
    admissions: list[Admission] = field(default_factory=list)
    page_writes: list[PageWrite] = field(default_factory=list)
    work: list[RowWork] = field(default_factory=list)
    masked_rows: list[int] = field(default_factory=list)  # rows whose token mask arrives with executor.sample()
    shared_prefixes: list[SharedPrefix] = field(default_factory=list)
    new_pages: list[NewPages] = field(default_factory=list)  # of rows that decode, at most one per cache group
    known_tokens: list[KnownTokens] = field(default_factory=list)
    states: list[StateAccess] = field(default_factory=list)  # at most one for each row of ``work``
    # Tokens that were drawn for rows since the last plan, where the ranks that compute a row's next token did not draw
    # its last one: stages of a pipeline. The executor fills these in.
    drawn_rows: list[int] = field(default_factory=list)
    drawn_ids: list[int] = field(default_factory=list)
    # Tokens that each rank computes, where ranks have requests of their own: rank r's are ``work`` of the rows
    # [r * rows, (r + 1) * rows), for as many rows as it has; a rank without any computes a dummy. Empty: no rank has.
    rank_tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class RowResult:
    """The result of one RowWork. ``token_ids``: no new token (a chunk), one, or more (accepted drafts)."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one per token id, if asked
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of the chunk's following tokens, if wanted
    error: str | None = None  # only this row failed: its logits are not finite, or its media cannot be encoded
    # Of the work with the last token of a request that asks for a pooled output. Its hidden states of earlier chunks
    # are kept by the worker until then.
    pooled: PooledOutput | None = None


@dataclass(slots=True)
class StepResult:
    step_id: int
    rows: list[RowResult]  # parallel to StepPlan.work
