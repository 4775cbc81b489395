"""Where a model differs under one of the engine's schedules: the first one that differs is computed again, recorded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.tools.schedules import (
    BATCHED,
    CHUNK_LEN,
    FOLLOW_UP,
    NEW_TOKENS,
    ONE_BY_ONE,
    SCHEDULES,
    SECOND_TURN,
    TWO_RANKS,
    WARM,
    ScheduleResult,
)
from rtp_llm.tools.verify.batch_causes import explain_batch
from rtp_llm.tools.verify.evidence import Finding
from rtp_llm.tools.verify.locate import LOGITS_TOLERANCE, MODULE_TOLERANCE, Difference, first_difference, relative_error
from rtp_llm.tools.verify.pointer import source_of
from rtp_llm.tools.verify.prompts import Cuts, Prompt
from rtp_llm.tools.verify.rank_causes import RankEvidence, explain_ranks
from rtp_llm.tools.verify.ranks import Ranks
from rtp_llm.tools.verify.recorders import OurRecorder
from rtp_llm.tools.verify.recording import agrees, record
from rtp_llm.tools.verify.run import NUM_SHOWN, Report, localise
from rtp_llm.tools.verify.sides import OurModel, TheirModel
from rtp_llm.tools.verify.trace import LOGITS, Parts, Place, Trace, kept

SECOND = ", second turn"  # ends the name of a question that follows another


@dataclass(frozen=True)
class Located:
    """What is found of the first schedule that differs; see ``Report``."""

    schedule: str
    finding: Finding | None = None
    around: list[Difference] = field(default_factory=list)
    source: str = ""
    note: str = ""


def locate(
    args: ServerArgs,
    config: ModelConfig,
    theirs: TheirModel,
    prompts: Mapping[str, Prompt],
    results: Sequence[ScheduleResult],
) -> Located | None:
    """Compute the first schedule that differs again, and find where and why; None: none differs, or it fails.

    Args:
        prompts: by the names of questions.
    """
    wrong = {result.schedule: result for result in results if not result.agrees}
    first = next((wrong[name] for name in SCHEDULES if name in wrong), None)
    if first is None or first.failure:
        return None
    prompt = prompts[first.question.removesuffix(SECOND)]
    longest = max(prompts.values(), key=lambda each: len(each.ids))
    recorded = replace(args, disable_cpu_graph=True)  # replayed steps call no modules
    ours = OurModel(recorded, config, len(longest.ids) + 2 * NEW_TOKENS + len(FOLLOW_UP), len(prompts))
    if first.schedule == TWO_RANKS:
        return _on_ranks(args, config, ours, theirs, prompt)
    if first.schedule == BATCHED:
        return _in_a_batch(config, ours, [each for each in prompts.values() if each.media is None])
    return _in_pieces(config, ours, theirs, [prompt, longest], first.schedule)


def _in_pieces(
    config: ModelConfig, ours: OurModel, theirs: TheirModel, prompts: Sequence[Prompt], schedule: str
) -> Located:
    """Compute prompts in the pieces of a schedule, until one differs."""
    report = Report(config.model_path, "", config.dtype, LOGITS_TOLERANCE[config.dtype], [])
    for prompt in prompts:
        for whole, cuts in _cut(ours, prompt, schedule):
            if not agrees(record(config.dtype, ours, theirs, whole, cuts), report.tolerance):
                found = localise(report, ours, theirs, whole, cuts)
                return Located(schedule, found.finding, found.around, found.source, found.note)
    note = (
        "The model alone agrees over these pieces: what differs depends on who else is in a step, on what the engine "
        "keeps from one request to the next, or on steps that are replayed (try --disable-cpu-graph)."
    )
    return Located(schedule, note=note)


def _cut(ours: OurModel, prompt: Prompt, schedule: str) -> Iterator[tuple[Prompt, Cuts]]:
    """Yield a prompt, perhaps with an answer, and where it is cut."""
    num = len(prompt.ids)
    chunks = tuple(range(CHUNK_LEN, num, CHUNK_LEN))
    if schedule == ONE_BY_ONE:
        yield prompt, 0
    elif schedule == SECOND_TURN:
        answer, _ = ours.run(prompt, 0, NEW_TOKENS)
        asked = replace(prompt, ids=[*prompt.ids, *answer, *FOLLOW_UP])
        yield asked, (*chunks, *range(num, num + NEW_TOKENS))
    else:
        yield prompt, chunks
        if schedule == WARM:
            yield prompt, (num - 1,) if num > 1 else 0
    if schedule != SECOND_TURN:  # tokens one by one
        answer, _ = ours.run(prompt, 0, NEW_TOKENS)
        yield replace(prompt, ids=[*prompt.ids, *answer]), tuple(range(num, num + NEW_TOKENS))


def _in_a_batch(config: ModelConfig, ours: OurModel, prompts: Sequence[Prompt]) -> Located:
    """Compute prompts in one step, and each alone."""
    alone = [_traced(ours, [prompt]) for prompt in prompts]
    together = _traced(ours, prompts)
    differences = [
        Difference(place, relative_error(tensor, torch.cat([trace.tensors[place] for trace in alone])))
        for place, tensor in together.tensors.items()
        if all(place in trace.tensors for trace in alone) and len(tensor) == together.num_tokens
    ]
    index = first_difference(differences, MODULE_TOLERANCE[config.dtype])
    if index is None:
        note = "In one step, the model computes these prompts as it does alone: what differs is who else is decoded."
        return Located(BATCHED, note=note)
    place, error = differences[index]
    cause = explain_batch(place, together, alone, MODULE_TOLERANCE[config.dtype])
    finding = Finding(place.module, place.part, error, [cause], is_description=True)
    around = differences[max(0, index - NUM_SHOWN) : index + NUM_SHOWN + 1]
    return Located(
        BATCHED, finding, around, source_of(ours.model, place.module, place.part, together, built=ours.built)
    )


def _traced(ours: OurModel, prompts: Sequence[Prompt]) -> Trace:
    trace = Trace(sum(len(prompt.ids) for prompt in prompts))
    with OurRecorder(ours.model, trace):
        ours.run_together(prompts, trace)
    return trace


def _on_ranks(args: ServerArgs, config: ModelConfig, ours: OurModel, theirs: TheirModel, prompt: Prompt) -> Located:
    parts = Parts() if prompt.media is None else Parts.of(theirs.model)
    whole = Trace(len(prompt.ids), 0, parts)
    with OurRecorder(ours.model, whole):
        _, logits = ours.run(prompt, 0, 1, whole)
    whole.tensors[Place("", LOGITS)] = kept(logits[-1:])
    with Ranks(args, config, len(prompt.ids) + 1) as ranks:
        traces = ranks.traces(prompt, Trace(len(prompt.ids), 0, parts))
        evidence = RankEvidence(ours.model, whole, traces, MODULE_TOLERANCE[config.dtype], ranks.tensors)
        found = explain_ranks(evidence)
    if found is None:
        note = "On two ranks, the prompt at once agrees at every place: only what follows from the cache differs."
        return Located(TWO_RANKS, note=note)
    index, finding = found
    around = evidence.differences[max(0, index - NUM_SHOWN) : index + NUM_SHOWN + 1]
    return Located(
        TWO_RANKS, finding, around, source_of(ours.model, finding.module, finding.part, whole, finding.look, ours.built)
    )
