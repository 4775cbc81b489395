"""Both sides' traces of a prompt, and where they differ."""

from rtp_llm.tools.verify.boundary_states import StateLog
from rtp_llm.tools.verify.evidence import Evidence
from rtp_llm.tools.verify.latent import add_latent_scores
from rtp_llm.tools.verify.locate import (
    MODULE_TOLERANCE,
    Difference,
    compare,
    first_difference,
    logits_error,
    pass_over_embedding,
)
from rtp_llm.tools.verify.names import aligned_names
from rtp_llm.tools.verify.prompts import Cuts, Prompt
from rtp_llm.tools.verify.recorders import OurRecorder, TheirRecorder
from rtp_llm.tools.verify.replay import Replay
from rtp_llm.tools.verify.sides import OurModel, TheirModel
from rtp_llm.tools.verify.trace import HEAD, INPUT, LOGITS, Parts, Place, Trace

MAX_KEPT_TOKENS = 256  # most tokens at a prompt's end that are recorded (and all keys and values)


def record(dtype: str, ours: OurModel, theirs: TheirModel, prompt: Prompt, cut_len: Cuts) -> Evidence:
    """Return both sides' traces of a prompt, the last logits among them."""
    num_tokens, log = len(prompt.ids), StateLog()
    cut_len = ours.cut_of(prompt, cut_len)
    parts = Parts() if prompt.media is None else Parts.of(theirs.model)
    our_trace, their_trace = (Trace(num_tokens, max(0, num_tokens - MAX_KEPT_TOKENS), parts) for _ in range(2))
    with OurRecorder(ours.model, our_trace):
        output_ids, our_logits = ours.run(prompt, cut_len, 1, our_trace, log)
    names = aligned_names(ours.model, theirs.model)
    heads = {name: call.num_kv_heads for name, call in our_trace.calls.items()}
    recorder = TheirRecorder(theirs.model, their_trace, names, heads)
    with recorder:
        their_logits = theirs.run(prompt, cut_len, output_ids, their_trace, log)
    theirs.add_states_at_cut(prompt, cut_len, log)
    for trace, other in ((our_trace, their_trace), (their_trace, our_trace)):
        trace.join_uses(other)
    add_latent_scores(our_trace, their_trace)
    logits = Place(names.get(theirs.model.get_output_embeddings(), "lm_head"), LOGITS)
    our_trace.rename(Place(HEAD, INPUT), Place(logits.module, INPUT))
    num_logits = our_logits.shape[1]
    our_trace.tensors[logits], their_trace.tensors[logits] = our_logits[-1:], their_logits[-1:, :num_logits]
    config, tolerance = theirs.model.config.get_text_config(), MODULE_TOLERANCE[dtype]
    replay = Replay(recorder, lambda trace: theirs.run(prompt, cut_len, output_ids, trace)[-1:, :num_logits])
    return Evidence(config, ours.model, theirs.model, our_trace, their_trace, tolerance, names, replay, log.pairs())


def compared(evidence: Evidence) -> list[Difference]:
    """Return the differences at all places but the logits. What the head is given may be written in another way, such
    as a scale before it or after it: where the logits agree, that is passed over."""
    logits, error = logits_of(evidence)
    passed_over = {logits, *([Place(logits.module, INPUT)] if error <= evidence.tolerance else [])}
    differences = [d for d in compare(evidence.ours, evidence.theirs) if d.place not in passed_over]
    return pass_over_embedding(differences, evidence.ours, evidence.theirs, evidence.tolerance)


def logits_of(evidence: Evidence) -> tuple[Place, float]:
    """Return the place of the logits, and their difference."""
    place = next(place for place in evidence.ours.tensors if place.part == LOGITS)
    return place, logits_error(*evidence.pair(place))


def agrees(evidence: Evidence, logits_tolerance: float) -> bool:
    """Return whether all places agree, and the logits."""
    return (
        first_difference(compared(evidence), evidence.tolerance) is None and logits_of(evidence)[1] <= logits_tolerance
    )
