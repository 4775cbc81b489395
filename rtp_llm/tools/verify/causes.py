"""Causes of a difference: experiments on the reference's tensors, until one reproduces ours.

Each cause is a computation on the reference's tensors that reproduced ours, never a guess from names. If none does,
the finding names only the place.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from rtp_llm.srt.layers.linear import LinearBase
from rtp_llm.srt.layers.rotary import RotaryEmbedding
from rtp_llm.tools.verify.activation_causes import activation_name, explain_activation
from rtp_llm.tools.verify.attention_causes import AttentionTrials
from rtp_llm.tools.verify.evidence import Evidence, Finding
from rtp_llm.tools.verify.expert_causes import explain_experts, explain_routing, given_to_experts
from rtp_llm.tools.verify.gated_norm_causes import explain_gated_norm
from rtp_llm.tools.verify.latent import PLAIN, ROTATED
from rtp_llm.tools.verify.latent_causes import explain_scores
from rtp_llm.tools.verify.locate import Difference, layer_of, relative_error
from rtp_llm.tools.verify.logits_causes import missing_scale, scaled_logits
from rtp_llm.tools.verify.mutations import find_mutation, without_effect
from rtp_llm.tools.verify.number_names import factor_reason
from rtp_llm.tools.verify.order_causes import order_text, paired_rows
from rtp_llm.tools.verify.own_rotation import explain_own_rotation, fused_sources
from rtp_llm.tools.verify.parameter_causes import held_otherwise
from rtp_llm.tools.verify.product_causes import explain_product
from rtp_llm.tools.verify.recurrent_calls import CONVOLVED, DECAYS, SCANNED, SHARES, STEPS
from rtp_llm.tools.verify.recurrent_causes import explain_boundary, explain_recurrent
from rtp_llm.tools.verify.relation_causes import describe_relation, explain_relation
from rtp_llm.tools.verify.replay import NOT_REPEATED
from rtp_llm.tools.verify.rope_causes import UNKNOWN_ROTATION, Rotated, RotationTrials
from rtp_llm.tools.verify.rotation_of_place import RotationOfPlace, first_layer_text, unrotated_here
from rtp_llm.tools.verify.rounding_causes import explain_rounded_norm
from rtp_llm.tools.verify.routing_causes import FACTOR_ALONE
from rtp_llm.tools.verify.row_causes import explain_added, origin_of, other_columns
from rtp_llm.tools.verify.source_mutations import find_source_edit
from rtp_llm.tools.verify.sum_causes import (
    ELSEWHERE,
    combination,
    early_rotation,
    elsewhere,
    module_of_sum,
    multiple,
    named_multiple,
    own_order,
)
from rtp_llm.tools.verify.trace import (
    ATTENDED,
    EMBEDDINGS,
    INPUT,
    KEYS,
    OUTPUT,
    QUERIES,
    ROUTING,
    VALUES,
    Place,
)
from rtp_llm.tools.verify.vision_causes import VisionTrials, explain_rows_of_tower
from rtp_llm.tools.verify.weight_causes import OTHER_ROWS, explain_linear, explain_norm, explain_norms, weight_of

WINDOW = "attention window"
UNSEEN_ATTENTION = (
    ". That is right if our attention takes its rows so: the reference's attention was not recorded, and what follows "
    "the projection, its queries, keys, values and biases by distance, is compared nowhere"
)


def explain(evidence: Evidence, place: Place, error: float) -> Finding:
    """Return what is wrong at the first place that differs."""
    finding = _by_experiments(evidence, place, error)
    return finding if finding.is_explained else _by_source(evidence, place, finding)


def _by_source(evidence: Evidence, place: Place, finding: Finding) -> Finding:
    """Return an edit of the reference's code that gives ours, if there is one: it explains all, and descriptions of the
    difference say no more."""
    edit = find_source_edit(evidence, place)
    if edit is None and not finding.causes:
        theirs = evidence.theirs.tensors[place]
        is_repeated = evidence.replay.repeats(place, theirs, evidence.tolerance)
        return finding if is_repeated else replace(finding, causes=[NOT_REPEATED], is_description=True)
    if edit is None:
        return finding
    return Finding(place.module, place.part, finding.error, [edit.cause], look=edit.module)


def _by_experiments(evidence: Evidence, place: Place, error: float) -> Finding:
    of_tower = explain_rows_of_tower(evidence, place, error)
    if of_tower is not None:
        return of_tower
    uncalled = without_effect(evidence, place, _uncalled(evidence, place))
    if uncalled:
        return Finding(uncalled[0], OUTPUT, error, [f"{', '.join(uncalled)}: never called by our model file"])
    explanations: dict[str, Callable[[Evidence, Place, float], Finding]] = {
        QUERIES: _explain_rotation,
        KEYS: _explain_rotation,
        VALUES: _explain_values,
        ATTENDED: _explain_attention,
        EMBEDDINGS: _explain_embeddings,
        INPUT: _explain_input,
        OUTPUT: _explain_output,
        ROUTING: _explain_weights,
        **dict.fromkeys((CONVOLVED, SCANNED, SHARES, STEPS, DECAYS), _explain_recurrent),
        PLAIN: explain_scores,
        ROTATED: explain_scores,
    }
    if _is_of_vision_attention(evidence, place):
        return _explain_vision_attention(evidence, place, error)
    return explanations.get(place.part, _explain_input)(evidence, place, error)


def pass_over_layout(evidence: Evidence, differences: list[Difference], index: int) -> int:
    """Return the index of the first difference behind a fused projection at ``index`` whose rows are in another order,
    if that order is right: if some of queries, keys and values agree, or differ by their rotation alone. Else return
    ``index``."""
    place = differences[index].place
    attention = next((name for name in evidence.theirs.calls if place.module.startswith(f"{name}.")), None)
    if attention is None:
        return index
    later = [(i, d) for i, d in enumerate(differences) if i > index and d.place.module == attention]
    states = [(i, d) for i, d in later if d.place.part in (QUERIES, KEYS, VALUES)]
    wrong = [(i, d) for i, d in later if d.error > evidence.tolerance]
    if place.part == OUTPUT and wrong and any(d.error <= evidence.tolerance / 10 for _, d in states):
        cause = _explain_output(evidence, place, differences[index].error).causes
        return wrong[0][0] if cause and cause[0].startswith(OTHER_ROWS) else index
    rotated = [(i, d) for i, d in wrong if d.place.part in (QUERIES, KEYS)]
    return rotated[0][0] if rotated and _is_rotation_alone(evidence, rotated[0][1].place) else index


def _uncalled(evidence: Evidence, place: Place) -> list[str]:
    """Return modules of this layer with weights that the reference used before this place and ours never uses."""
    names = set(evidence.our_modules)
    used = {p.module for p in evidence.ours.tensors}
    before = list(evidence.theirs.tensors)
    before = before[: before.index(place)]
    found = [
        p.module
        for p in before
        if p.part == OUTPUT and p.module in names - used and layer_of(p.module) == layer_of(place.module)
    ]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


# Attention


def _is_rotation_alone(evidence: Evidence, place: Place) -> bool:
    rotation = RotationOfPlace.of(evidence, place)
    return rotation is not None and rotation.cause(evidence, place) is not None


def _explain_rotation(evidence: Evidence, place: Place, error: float) -> Finding:
    rotation = RotationOfPlace.of(evidence, place)
    if rotation is None:
        own = explain_own_rotation(evidence, place)
        if own is not None:
            return Finding(place.module, place.part, error, [own])
        unrotated = unrotated_here(evidence, place)
        if unrotated is not None:
            return Finding(place.module, place.part, error, [unrotated])
        finding = _explain_input(evidence, place, error)
        hint = "no rotary embedding is called here that verify knows"
        if not _rotates(evidence):
            return finding
        if not finding.is_explained:
            return Finding(place.module, place.part, error, [hint], is_description=True)
        texts = [f"{cause}; {hint}" if cause.startswith(ELSEWHERE) else cause for cause in finding.causes]
        return replace(finding, causes=texts)
    cause, name = rotation.cause(evidence, place), rotation.name_at(evidence, place)
    if cause is None or cause.startswith(UNKNOWN_ROTATION):
        before = _explain_before_rotation(evidence, place, error, rotation.rope, rotation.rotated)
        if before is not None:
            return before
        own = explain_own_rotation(evidence, place)
        if own is not None:
            return Finding(name, place.part, error, [own], look=rotation.name)
        finding = _explain_input(evidence, place, error)
        if finding.is_explained or cause is None:
            return finding
        return Finding(name, place.part, error, [cause], is_description=True, look=rotation.name)
    cause += first_layer_text(evidence, place)
    return Finding(name, place.part, error, [cause], look=rotation.name)


def _rotates(evidence: Evidence) -> bool:
    """Return whether the reference has rotary positions, by the names of its modules and of its configuration."""
    names = (*evidence.their_modules, *(key for key, value in vars(evidence.config).items() if value))
    return any("rotary" in name or "rope_" in name for name in names)


def _explain_before_rotation(
    evidence: Evidence, place: Place, error: float, rope: RotaryEmbedding, rotated: Rotated
) -> Finding | None:
    """Explain what ours rotates, if it is not what the reference rotates: an output before, which ours has not."""
    theirs, unrotated = evidence.theirs.tensors[place], rotated.before
    for p, tensor in reversed(evidence.theirs.tensors.items()):
        if p.part != OUTPUT or not p.module.startswith(f"{place.module}.") or tensor.shape != unrotated.shape:
            continue
        if evidence.same(unrotated, tensor):
            return None  # it is the same, and what follows is wrong
        if p in evidence.ours.tensors:
            continue
        if RotationTrials(evidence.config, rope, replace(rotated, before=tensor)).gives(theirs, evidence.tolerance):
            evidence.ours.tensors[p] = unrotated
            finding = _explain_output(evidence, p, error)
            return finding if finding.causes else None
    columns = other_columns(evidence, place, unrotated)
    if columns is None:
        return None
    sources = ((text, x) for text, x in fused_sources(evidence, place) if x.shape == theirs.shape)
    trials = ((text, RotationTrials(evidence.config, rope, replace(rotated, before=x))) for text, x in sources)
    right = next((f", which has them {text}" for text, t in trials if t.gives(theirs, evidence.tolerance)), "")
    cause = f"it rotates {columns}: other parts of a projection than the reference{right}"
    return Finding(place.module, place.part, error, [cause])


def _explain_values(evidence: Evidence, place: Place, error: float) -> Finding:
    """Explain other values; they may be rotated."""
    ours, theirs = evidence.pair(place)
    rope = evidence.our_modules.get(evidence.ours.ropes.get(place.module, ""))
    call, num_tokens = evidence.theirs.calls[place.module], evidence.theirs.num_tokens
    if isinstance(rope, RotaryEmbedding) and theirs.shape[1] % call.num_kv_heads == 0:
        rotated = Rotated(theirs, num_tokens - len(theirs), num_tokens, theirs.shape[1] // call.num_kv_heads)
        if RotationTrials(evidence.config, rope, rotated).gives(ours, evidence.tolerance):
            return Finding(place.module, place.part, error, ["they are rotated, which only queries and keys are"])
    return _explain_input(evidence, place, error)


def _explain_attention(evidence: Evidence, place: Place, error: float) -> Finding:
    cause = AttentionTrials(place.module, evidence.ours, evidence.theirs, evidence.config).explain(evidence.tolerance)
    if cause and cause.startswith(WINDOW):
        cause += _layer_type(evidence, place)
    return Finding(place.module, place.part, error, [cause] if cause else [])


def _layer_type(evidence: Evidence, place: Place) -> str:
    """Return what the configuration says of the layer's kind of attention; empty: nothing."""
    kinds, number = getattr(evidence.config, "layer_types", None), layer_of(place.module).rpartition(".")[2]
    if not kinds or not number.isdigit() or int(number) >= len(kinds):
        return ""
    return f"; layer_types of the configuration has {kinds[int(number)]} for layer {number}"


def _is_of_vision_attention(evidence: Evidence, place: Place) -> bool:
    """Return whether this is the output of a tower's attention: its projection's input, used after the queries."""
    attention = _vision_attention_of(evidence, place)
    if place.part != INPUT or not attention:
        return False
    places = list(evidence.theirs.tensors)
    queries = Place(attention, QUERIES)
    return queries in places and places.index(queries) < places.index(place)


def _vision_attention_of(evidence: Evidence, place: Place) -> str:
    """Return the attention of a tower around a module, which both sides have; empty: there is none."""
    both = evidence.theirs.vision_calls.keys() & evidence.ours.vision_calls.keys()
    return next((name for name in both if place.module.startswith(f"{name}.")), "")


def explain_segments(evidence: Evidence, place: Place, error: float) -> Finding | None:
    """Explain the output of a tower's attention; None: it is none, or nothing is found."""
    if not _is_of_vision_attention(evidence, place):
        return None
    finding = _explain_vision_attention(evidence, place, error)
    return finding if finding.part == ATTENDED else None


def _explain_vision_attention(evidence: Evidence, place: Place, error: float) -> Finding:
    name = _vision_attention_of(evidence, place)
    trials = VisionTrials(name, evidence.ours, evidence.theirs, evidence.ours.tensors[place])
    cause = trials.explain(evidence.theirs.tensors[place], evidence.tolerance)
    if cause is None:
        return _explain_input(evidence, place, error)
    return Finding(name, ATTENDED, error, [cause])


def _explain_recurrent(evidence: Evidence, place: Place, error: float) -> Finding:
    """Explain a convolution, a gate or a scan: by the state that it begins with, where only that can be wrong."""
    boundary = explain_boundary(evidence, place, error)
    if boundary is not None:
        return boundary
    cause = explain_recurrent(evidence, place)
    return Finding(place.module, place.part, error, [cause]) if cause else _explain_input(evidence, place, error)


def _explain_embeddings(evidence: Evidence, place: Place, error: float) -> Finding:
    """Explain a difference of embeddings, in rows of media or of text."""
    ours, theirs = evidence.ours.tensors[place], evidence.theirs.tensors[place]
    scale = theirs.norm(dim=-1).mean()
    wrong = (ours - theirs).norm(dim=-1) > evidence.tolerance * scale
    rows = wrong.nonzero()[:, 0].tolist()
    first = evidence.ours.first_position(place)
    where = f"{len(rows)} of {len(ours)} tokens' are wrong, the first of them token {first + rows[0]}'s" if rows else ""
    origin = origin_of(evidence, place, theirs[wrong]) if rows else None
    where += f" (the reference has {origin} there)" if origin else ""
    cause = _rows_elsewhere(ours[wrong], theirs[wrong], evidence.config) if rows else None
    if cause is None and rows:  # rows that are equal by chance, as separators, are among them
        order = paired_rows(ours[rows[0] : rows[-1] + 1], theirs[rows[0] : rows[-1] + 1], 1e-3)
        cause = f"from there to the last wrong one they are in another order: {order_text(order)}" if order else None
    if cause is None:
        finding = _explain_input(evidence, place, error)
        named = "" if finding.module == place.module else f"{finding.module}: "
        cause = next((f"{named}{cause}" for cause in finding.causes), "they are not what the reference puts there")
    look = origin.partition(" of ")[2] if origin else ""
    return Finding(place.module, place.part, error, [f"{where}: {cause}" if where else cause], look=look)


def _rows_elsewhere(ours: torch.Tensor, theirs: torch.Tensor, config: Any) -> str | None:
    """Return a cause that concerns only the differing rows."""
    if not bool(ours.any()):
        return "they are zero: nothing is put there"
    order = paired_rows(ours, theirs, 1e-3)
    if order is not None:
        return f"they are the reference's in another order: {order_text(order)}"
    factor = float((ours * theirs).sum() / theirs.square().sum().clamp(min=1e-30))
    if torch.allclose(ours, factor * theirs, rtol=1e-3, atol=1e-4):
        return f"they are the reference's times {factor:.6g}: {factor_reason(factor, config)}"
    return None


# Modules with weights


def _explain_output(evidence: Evidence, place: Place, error: float) -> Finding:
    given = evidence.theirs.tensors.get(Place(place.module, INPUT))
    theirs = evidence.their_modules.get(place.module)
    cause: str | None = None
    if place.module in evidence.theirs.experts and given_to_experts(evidence, place):
        finding = explain_experts(evidence, place, error)
        if finding:
            return finding
    if given is not None and theirs is not None:
        ours = evidence.ours.tensors[place]
        module, weight, bias = weight_of(evidence.our_model, place.module)
        if isinstance(module, LinearBase):
            cause = explain_linear(weight, bias, place.module, evidence)
            if cause is not None and cause.startswith(OTHER_ROWS) and _is_of_unseen_attention(evidence, place):
                cause += UNSEEN_ATTENTION
        elif weight.dim() == 1:
            cause = explain_gated_norm(evidence, place) or explain_norm(given, ours, place.module, evidence)
            cause = cause or explain_rounded_norm(evidence, place)
    elif given is None and theirs is not None:
        cause = explain_norms(evidence, place)
    if cause is None:
        return _explain_input(evidence, place, error)
    return Finding(place.module, place.part, error, [cause])


def _is_of_unseen_attention(evidence: Evidence, place: Place) -> bool:
    """Return whether this is a part of attention that the reference computes in a way that is not recorded."""
    return any(
        place.module.startswith(f"{name}.") for name in evidence.ours.calls.keys() - evidence.theirs.calls.keys()
    )


def _explain_weights(evidence: Evidence, place: Place, error: float) -> Finding:
    """Explain experts' weights. A factor may be applied after the experts as well: then the block's output tells what
    is wrong with it, unless that differs by what the experts' output does."""
    finding = explain_routing(evidence, place, error)
    if not finding.is_explained or not finding.causes[0].startswith(FACTOR_ALONE):
        return finding
    block = Place(place.module.rpartition(".")[0], OUTPUT)
    experts = Place(place.module, OUTPUT)
    if any(p not in trace.tensors for p in (block, experts) for trace in (evidence.ours, evidence.theirs)):
        return finding
    (ours, theirs), (mine, yours) = evidence.pair(block), evidence.pair(experts)
    if evidence.same(ours, theirs + mine - yours):
        return finding
    found = _explain_input(evidence, block, relative_error(ours, theirs))
    if not found.is_explained:
        return finding
    note = f". The {finding.causes[0]}, which is no mistake by itself: it may be applied to the experts' output"
    return replace(found, causes=[f"{found.causes[0]}{note}", *found.causes[1:]])


# Inputs of modules


def _explain_input(evidence: Evidence, place: Place, error: float) -> Finding:
    """Try whether ours is the reference's tensor of another place, an activation, a multiple, or a sum of others."""
    activation = explain_activation(evidence, place)
    if activation:
        return Finding(activation_name(evidence, place), INPUT, error, [activation])
    searches = (
        *(
            named_multiple,
            elsewhere,
            early_rotation,
            multiple,
            own_order,
            explain_product,
            explain_relation,
            combination,
        ),
        explain_added,
    )
    for search in (*searches, module_of_sum):
        cause = search(evidence, place)
        if cause:
            return Finding(place.module, place.part, error, [cause])
    held = held_otherwise(evidence, place)
    if held is not None:
        return Finding(held[0], OUTPUT, error, [held[1]])
    mutation = find_mutation(evidence, place)
    if mutation is not None:
        if mutation.module not in evidence.their_modules:  # of the configuration, or an argument
            return Finding(place.module, place.part, error, [mutation.text])
        part = place.part if mutation.module == place.module else OUTPUT
        return Finding(mutation.module, part, error, [mutation.text])
    cause = describe_relation(evidence, place)
    return Finding(place.module, place.part, error, [cause] if cause else [], is_description=True)


# Logits


def explain_logits(evidence: Evidence, place: Place, error: float) -> Finding:
    """Explain other logits [1, vocab_size] after the prompt's last token, where all modules agree."""
    ours, theirs = evidence.pair(place)
    uncalled = without_effect(evidence, place, _uncalled(evidence, place))
    if uncalled:
        return Finding(uncalled[0], OUTPUT, error, [f"{', '.join(uncalled)}: never called by our model file"])
    head: Any = evidence.their_model.get_output_embeddings()  # type: ignore[operator]
    hidden = evidence.theirs.tensors[Place(place.module, INPUT)][-1:]
    raw = evidence.theirs.tensors[Place(place.module, OUTPUT)][-1:]
    embedding: Any = evidence.their_model.get_input_embeddings()  # type: ignore[operator]
    trials = {
        missing_scale(evidence, theirs, raw[:, : theirs.shape[1]]): raw,
        "they are made with the embedding's weights, but the head has its own": F.linear(
            hidden, embedding.weight.detach().float().cpu()
        ),
        "the head's bias is missing": F.linear(hidden, head.weight.detach().float().cpu()),
    }
    factor = float((ours * theirs).sum() / theirs.square().sum())
    trials[scaled_logits(evidence, ours, theirs, raw[:, : ours.shape[1]])] = factor * theirs
    causes = [text for text, tensor in trials.items() if evidence.same(ours, tensor[:, : ours.shape[1]])]
    if not causes:
        finding = _explain_input(evidence, place, error)
        finding = Finding(place.module, place.part, error, finding.causes, finding.is_description)
        return finding if finding.is_explained else _by_source(evidence, place, finding)
    return Finding(place.module, place.part, error, causes[:1])
