"""Where ours begins to have another number of rows than the reference, if ours fails for that: an image's rows that are
pooled otherwise do not fit its placeholders."""

from contextlib import suppress

from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.locate import MODULE_TOLERANCE
from rtp_llm.tools.verify.names import aligned_names
from rtp_llm.tools.verify.pooling_causes import explain_pooling
from rtp_llm.tools.verify.prompts import Prompt
from rtp_llm.tools.verify.recorders import OurRecorder, TheirRecorder
from rtp_llm.tools.verify.replay import Replay
from rtp_llm.tools.verify.sides import ForwardError, OurModel, TheirModel
from rtp_llm.tools.verify.trace import INPUT, OUTPUT, Parts, Trace


def other_number_of_rows(dtype: str, ours: OurModel, theirs: TheirModel, prompt: Prompt) -> str:
    """Return the first place in the tower at which numbers of rows differ, of a prompt with media that ours cannot
    compute, and why; empty: there is none."""
    evidence = _recorded(dtype, ours, theirs, prompt)
    mine, yours = evidence.ours.tensors, evidence.theirs.tensors
    for place in (p for p in mine if p.part in (INPUT, OUTPUT) and evidence.ours.parts.is_tower(p.module)):
        if place in yours and mine[place].shape[1] == yours[place].shape[1] and len(mine[place]) != len(yours[place]):
            cause = explain_pooling(evidence, place)
            numbers = f"{len(mine[place])} rows, the reference's {len(yours[place])}"
            return f"First: {place.module}, its {place.part}: {numbers}{f': {cause}' if cause else ''}"
    return ""


def _recorded(dtype: str, ours: OurModel, theirs: TheirModel, prompt: Prompt) -> Evidence:
    num_tokens, parts = len(prompt.ids), Parts.of(theirs.model)
    our_trace, their_trace = (Trace(num_tokens, parts=parts) for _ in range(2))
    with suppress(ForwardError), OurRecorder(ours.model, our_trace):
        ours.run(prompt, 0, 1, our_trace)
    names = aligned_names(ours.model, theirs.model)
    recorder = TheirRecorder(theirs.model, their_trace, names)
    with recorder:
        theirs.run(prompt, 0, prompt.ids[:1], their_trace)
    for trace, other in ((our_trace, their_trace), (their_trace, our_trace)):
        trace.join_uses(other)
    replay = Replay(recorder, lambda trace: theirs.run(prompt, 0, prompt.ids[:1], trace)[-1:])
    config = theirs.model.config.get_text_config()
    return Evidence(config, ours.model, theirs.model, our_trace, their_trace, MODULE_TOLERANCE[dtype], names, replay)
