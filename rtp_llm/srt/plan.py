"""The contract between core and worker: a StepPlan goes down, a StepResult comes back. Host values only.

A plan is a delta. A worker keeps, per *row* (a slot for one running request), everything that an admission told it and
every page it was given; a step then names rows and token counts only. Every tensor-parallel rank gets the same plan.

Order within one plan: ``releases``, ``admissions``, ``page_writes``, ``new_pages``, then ``work``.
"""

from dataclasses import dataclass, field

from rtp_llm.srt.request_spec import RequestSpec


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability (natural log, of the model's own distribution, before any sampling parameter) of one token."""

    token_id: int
    logprob: float
    top: list[tuple[float, int]] = field(default_factory=list)  # (logprob, token id), best first
    chosen: list[tuple[float, int]] = field(default_factory=list)  # the ids asked for, in their order


@dataclass(slots=True)
class Admission:
    """A request enters row ``row``. ``output_ids`` is not empty when it resumes (retraction, core restart)."""

    row: int
    rid: str
    prompt_ids: list[int]
    output_ids: list[int]
    spec: RequestSpec
    logprob_from: int | None = None  # prompt logprobs are wanted from the logits of this position on; None: none


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
    """One further page for each of several rows, which decode: ``page_ids[i]`` is entry ``places[i]`` of ``rows[i]``.

    The same as a PageWrite each, told together: there are hundreds in a step.
    """

    group: int
    rows: list[int]
    places: list[int]
    page_ids: list[int]


@dataclass(slots=True)
class RowWork:
    """Compute tokens ``[start, start + num_tokens)`` of a row.

    Ids come from the admission; the id just past what the host knew then is in the worker's last-token buffer.
    """

    row: int
    start: int
    num_tokens: int
    sample: bool  # the last of these tokens is the request's last: draw the next one


@dataclass(slots=True)
class SharedPrefix:
    """The first ``num_tokens`` tokens of these rows lie in the same pages: attention may read them once.

    Each of these rows computes one token in this step, which comes later. A plan names prefixes before those that go
    on from them: rows of the longer one are then all rows of the shorter, or none is.
    """

    num_tokens: int
    rows: list[int]


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


@dataclass(slots=True)
class RowResult:
    """What one RowWork gave. ``token_ids`` holds 0 (a chunk), 1, or more (accepted drafts) new tokens."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one per token id, if asked
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of the chunk's following tokens, if asked
    error: str | None = None  # this row alone failed (its logits are not numbers)


@dataclass(slots=True)
class StepResult:
    step_id: int
    rows: list[RowResult]  # parallel to StepPlan.work
