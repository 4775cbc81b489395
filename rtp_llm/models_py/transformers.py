"""Any causal language model of the transformers library, with our paged attention in place of its own.

The model's own code runs, given all tokens of a step as one row. Two things let several sequences share that row: each
token's position is told, and attention, which transformers calls through its interface for attention functions, is
ours. What a layer needs of the cache is not declared in such a model, so it is found out after loading: one pass over a
few tokens records every call of attention, with its shapes, scaling, soft cap, sinks and mask. Then the same tokens go
through the plain model, and in pieces through ours; a model whose logits differ is refused, never served.
"""

import copy
import inspect
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from rtp_llm.srt.attention.torch import TorchAttention
from rtp_llm.srt.cache.spec import CacheGroup
from rtp_llm.srt.distributed.parallel_state import get_tp_group
from rtp_llm.srt.forward_batch import ForwardBatch, ForwardMode
from rtp_llm.srt.kv_pool import KVPool
from rtp_llm.srt.layers.logits_processor import ROWS_PER_PIECE, LogitsProcessorOutput, Logprobs, prompt_logprobs
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.layers.radix_attention import RadixAttention

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import LogprobRow

logger = logging.getLogger(__name__)

SERVING = "rtp_llm"  # name of our attention function; transformers makes no mask for it
PROBING = "rtp_llm_probe"  # the same function, but the mask of each layer is made and examined
CAUSAL_LM_NAMES = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
IMAGE_TEXT_NAMES = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())  # some are in both
SERVED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention", "mlp", "moe")
CROSS_ATTENTION = ("encoder_attn", "cross_attn", "crossattention")  # what such modules are named
LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")

# What is checked after loading: two sequences, and the ends of the pieces that they are computed in.
CHECKED_LENS = (11, 8)
CHECKED_PIECES = ((5, 3), (10, 6), (11, 8))
# Relative difference of a token's logits that is more than rounding. In 16 bits, near ties of a router may go either
# way, which changes a few tokens much: there it holds for the median of each piece.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
FAR = 1 << 20  # a position farther than any window


class UnservableModelError(ValueError):
    """The model cannot run with paged attention; the message says which part of it is missing here."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of attention in a forward pass of the model. ``shared_with``: an earlier call had the same keys."""

    module: nn.Module
    num_heads: int
    head_dim: int
    num_kv_heads: int
    v_head_dim: int
    scaling: float
    logit_cap: float
    window: int | None
    shared_with: int | None


@dataclass(slots=True)
class Mask:
    """What a mask lets a query see: itself and the ``window - 1`` tokens before it; None: all of them."""

    window: int | None


class Probe:
    """Records the calls of attention, and answers them so that the pass goes on."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.calls: list[AttentionCall] = []
        self._callers: dict[tuple[Any, ...], int] = {}  # by what they hand over: the first call that did
        self._kept: list[torch.Tensor] = []  # so that no later tensor lies where one of them did

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: Any,
        options: dict[str, Any],
    ) -> torch.Tensor:
        where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
        self._check_shapes(where, query, key, value)
        _check_options(where, options)
        if scaling is not None and not isinstance(scaling, (int, float)):
            raise UnservableModelError(f"{where}: its scores are scaled by a {type(scaling).__name__}, not by a number")
        window = _mask_of(where, attention_mask).window
        handed = key.data_ptr(), value.data_ptr(), key.shape, value.shape, window
        self.calls.append(
            AttentionCall(
                module,
                num_heads=query.shape[1],
                head_dim=query.shape[3],
                num_kv_heads=key.shape[1],
                v_head_dim=value.shape[3],
                scaling=query.shape[3] ** -0.5 if scaling is None else float(scaling),
                logit_cap=float(options.get("softcap") or 0.0),
                window=window,
                shared_with=self._callers.get(handed),
            )
        )
        self._callers.setdefault(handed, len(self.calls) - 1)
        self._kept += [key, value]
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)

    def _check_shapes(self, where: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        for name, tensor in (("queries", query), ("keys", key), ("values", value)):
            if tensor.dim() != 4 or tensor.shape[0] != 1 or tensor.shape[2] != self.num_tokens:
                raise UnservableModelError(
                    f"{where}: its {name} are of shape {list(tensor.shape)}, not [1, heads, {self.num_tokens}, size] "
                    f"for {self.num_tokens} tokens: it does not attend over the tokens themselves"
                )
        if key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
            raise UnservableModelError(
                f"{where}: {query.shape[1]} heads of queries of size {query.shape[3]}, {key.shape[1]} of keys of size "
                f"{key.shape[3]} and {value.shape[1]} of values do not fit together"
            )


class PagedAttention:
    """Answers the calls of attention in the order in which the probe saw them."""

    def __init__(self, calls: list[AttentionCall]) -> None:
        self.calls = calls
        self.layers = [_layer(call, layer_id) for call, layer_id in zip(calls, _layer_ids(calls), strict=True)]
        self._batch: ForwardBatch | None = None
        self._num_answered = 0

    @contextmanager
    def serving(self, batch: ForwardBatch) -> Iterator[None]:
        self._batch, self._num_answered = batch, 0
        try:
            yield
        finally:
            self._batch = None
        if self._num_answered != len(self.calls):
            raise RuntimeError(f"the model called attention {self._num_answered} times, not {len(self.calls)}")

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: Any,
        options: dict[str, Any],
    ) -> torch.Tensor:
        index = self._num_answered
        if self._batch is None or index >= len(self.calls) or self.calls[index].module is not module:
            raise RuntimeError(f"call {index} of attention, by {type(module).__name__}, is not the one seen at loading")
        self._num_answered += 1
        layer, is_shared = self.layers[index], self.calls[index].shared_with is not None
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        sinks = options.get("s_aux")
        out = layer(q, k, v, self._batch, save_kv_cache=not is_shared, sinks=None if sinks is None else sinks.view(-1))
        return out.view(1, -1, layer.spec.num_heads, layer.spec.v_head_dim)


def _layer(call: AttentionCall, layer_id: int) -> RadixAttention:
    return RadixAttention(
        call.num_heads,
        call.head_dim,
        call.scaling,
        call.num_kv_heads,
        layer_id,
        logit_cap=call.logit_cap,
        v_head_dim=call.v_head_dim,
        window=call.window,
    )


def _layer_ids(calls: list[AttentionCall]) -> list[int]:
    """Numbers in order; a call that shares the keys of another has its number."""
    ids: list[int] = []
    for call in calls:
        ids.append(len(set(ids)) if call.shared_with is None else ids[call.shared_with])
    return ids


def _attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: q, k, v [1, heads, T, size] -> [1, T, heads, size of v]."""
    handler: Any = module.rtp_llm_attention
    return handler.attend(module, query, key, value, attention_mask, scaling, options), None


def _probing_mask(q_length: int, kv_length: int, mask_function: Any, device: Any = None, **_: Any) -> torch.Tensor:
    """A plain causal mask, to be handed to the layers, that carries what ``mask_function`` would let them see."""
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device).tril()
    mask.rtp_llm_mask = _examine(mask_function, device)  # type: ignore[attr-defined]
    return mask


AttentionInterface.register(SERVING, _attention_function)
AttentionInterface.register(PROBING, _attention_function)
AttentionMaskInterface.register(PROBING, _probing_mask)


def _examine(mask_function: Any, device: Any) -> Mask | str:
    """The window of a mask function, or what is not causal about it.

    It says for indices (batch, head, query, key) whether the query sees the key; they are tried for queries near and
    far, since a window may be longer than any sequence that would be cheap to compute.
    """
    if any(tensor.numel() > 1 for tensor in _captured_tensors(mask_function)):
        return "what a token sees depends on what the tokens are (those of an image, say), not on positions alone"
    near, far = (_seen_by(mask_function, query, device) for query in (1000, FAR))
    if near is None or far is None:
        return "it lets tokens see later ones (bidirectional attention), or hides tokens from themselves"
    window = int(far.sum())
    if not all(torch.equal(seen, _windowed(len(seen), window, device)) for seen in (near, far)):
        return "what a token sees is not a window of the tokens before it (chunked or blockwise attention)"
    return Mask(None if window == len(far) else window)


def _captured_tensors(value: Any) -> Iterator[torch.Tensor]:
    """What a function, or the functions that it is made of, look at besides their arguments."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _captured_tensors(item)
    else:
        for cell in getattr(value, "__closure__", None) or ():
            yield from _captured_tensors(cell.cell_contents)


def _windowed(num_keys: int, window: int, device: Any) -> torch.Tensor:
    """[num_keys] bool: the last ``window`` of them."""
    return torch.arange(num_keys, device=device) >= num_keys - window


def _seen_by(mask_function: Any, query: int, device: Any) -> torch.Tensor | None:
    """[query + 1] bool: the keys up to its own that a query sees; None if it sees later ones or not its own."""
    keys = torch.arange(query + 65, device=device)
    zeros = torch.zeros_like(keys)
    seen = mask_function(zeros, zeros, torch.full_like(keys, query), keys).expand(len(keys))
    return seen[: query + 1] if bool(seen[query]) and not bool(seen[query + 1 :].any()) else None


def _mask_of(where: str, attention_mask: Any) -> Mask:
    """What the mask that arrives at a layer was made from; layers may cut it, which leaves a view."""
    found: Any = None
    if isinstance(attention_mask, torch.Tensor):
        found = getattr(attention_mask, "rtp_llm_mask", None) or getattr(attention_mask._base, "rtp_llm_mask", None)
    if attention_mask is None:
        found = "it has no mask: it lets tokens see later ones, or attends to something else (cross-attention)"
    elif found is None:
        found = "the model makes its own mask, or adds a bias by position to it (ALiBi, relative positions)"
    if isinstance(found, str):
        raise UnservableModelError(f"{where}: {found}")
    return found


# Tensors that attention is given and ours makes use of, or needs not: what they say, the batch says.
_KNOWN_OPTIONS = {"s_aux", "position_ids", "cache_position", "logits_to_keep"}


def _check_options(where: str, options: dict[str, Any]) -> None:
    tensors = [name for name, value in options.items() if isinstance(value, torch.Tensor)]
    unknown = [name for name in tensors if name not in _KNOWN_OPTIONS]
    if unknown:
        raise UnservableModelError(f"{where}: attention is given {', '.join(unknown)}, which ours does not know")
    if options.get("is_causal") is False:
        raise UnservableModelError(f"{where}: its attention is not causal")


class TransformersForCausalLM(nn.Module):
    """Transformers' own class for a configuration, served with our cache and batching.

    Raises:
        UnservableModelError: by the constructor where the configuration tells, by ``finish_load`` where only running
            the model does.
    """

    replays_steps = False  # what transformers' code keeps between steps is not known

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        if get_tp_group().world_size > 1:
            raise UnservableModelError(
                "models that run through transformers cannot be shared by ranks: use --tp-size 1"
            )
        if quant_config is not None:
            raise UnservableModelError(
                f"models that run through transformers are not quantized (by {quant_config.get_name()}) here"
            )
        self.vocab_size = config.get_text_config().vocab_size
        with no_init_weights():
            self.model = _build(copy.deepcopy(config))
        self.model.tie_weights()
        _refuse_unservable(self.model)
        self._takes_rows = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.attentions = nn.ModuleList()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Loads as transformers does: renamings, conversions and ties are its own. What is missing is an error."""
        model_class, config, device = type(self.model), self.model.config, self.model.device
        del self.model  # its tensors, which nobody has touched, before the next take their place
        with torch.device("cpu"), _without_progress_bar():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(weights),
                dtype=torch.get_default_dtype(),
                output_loading_info=True,
            )
        self.model = model.to(device)
        problems = [
            f"{len(info[kind])} {kind.replace('_', ' ')}:\n  " + "\n  ".join(sorted(map(str, info[kind])))
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
            if info.get(kind)
        ]
        if problems:
            raise ValueError(f"the checkpoint does not fit {model_class.__name__}:\n" + "\n".join(problems))

    def finish_load(self) -> None:
        """Finds out what attention needs, and makes sure that the model computes the same with it."""
        self.model.eval()
        sequences = _check_sequences(self.model.config, self.model.device)
        expected = self._run_plain(sequences)
        self._first_position = self._find_first_position(sequences[0], expected[0])
        self._attention = PagedAttention(self._probe(sequences[0]))
        self.attentions.extend(self._attention.layers)
        self._set(SERVING, self._attention)
        _compare(expected, self._run_in_pieces(sequences), self.model.dtype)

    def _set(self, name: str, handler: Probe | PagedAttention | None) -> None:
        self.model.set_attn_implementation(name)
        for module in self.model.modules():
            module.rtp_llm_attention = handler

    def _run_plain(self, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
        """[tokens, vocab_size] float32 of each sequence, by transformers alone."""
        self._set("eager", None)
        return [self.model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in sequences]

    def _find_first_position(self, ids: torch.Tensor, expected: torch.Tensor) -> int:
        """The position id of a sequence's first token: 0, but RoBERTa (2019) counts from the padding id + 1."""
        positions = torch.arange(len(ids), device=ids.device)
        logits = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0].float()
        if float(_errors(logits, expected).median()) < TOLERANCE[self.model.dtype] / 10:
            return 0
        return 1 + (getattr(self.model.config.get_text_config(), "pad_token_id", None) or 0)

    def _probe(self, ids: torch.Tensor) -> list[AttentionCall]:
        probe = Probe(len(ids))
        self._set(PROBING, probe)
        self._logits(ids, torch.arange(len(ids), device=ids.device), torch.tensor([0], device=ids.device))
        if not probe.calls:
            raise UnservableModelError(
                f"{type(self.model).__name__} computes attention by itself, not by transformers' interface for "
                "attention functions"
            )
        return probe.calls

    def _run_in_pieces(self, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
        """As ``_run_plain``, through the cache, both sequences in one batch."""
        specs = {layer.layer_id: layer.cache_spec() for layer in self._attention.layers}
        groups = [CacheGroup(spec, (layer_id,)) for layer_id, spec in specs.items()]
        pool = KVPool(groups, [sum(CHECKED_LENS)] * len(groups), str(sequences[0].device))
        attention = TorchAttention()
        logits: list[list[torch.Tensor]] = [[] for _ in sequences]
        starts = (0,) * len(sequences)
        for ends in CHECKED_PIECES:
            batch = _check_batch(sequences, starts, ends, pool, attention)
            attention.plan(batch)
            rows = torch.arange(batch.num_tokens, device=batch.input_ids.device)
            with self._attention.serving(batch):
                pieces = self._logits(batch.input_ids, batch.positions, rows).split(batch.extend_seq_lens_cpu)
            for kept, piece in zip(logits, pieces, strict=True):
                kept.append(piece)
            starts = ends
        return [torch.cat(pieces) for pieces in logits]

    def _logits(self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[rows, vocab_size] float32, of tokens ``rows`` [N] among [T]; the model's own head, with all it does."""
        options: dict[str, Any] = {"logits_to_keep": rows} if self._takes_rows else {}
        output = self.model(
            input_ids=input_ids[None], position_ids=positions[None] + self._first_position, use_cache=False, **options
        )
        logits = output.logits[0] if self._takes_rows else output.logits[0, rows]
        return logits[:, : self.vocab_size].float()

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        sample_rows, wanted = forward_batch.sample_rows, forward_batch.prompt_logprobs
        if not len(input_ids):
            return LogitsProcessorOutput(torch.empty(0, self.vocab_size, device=input_ids.device), [])
        rows = torch.cat((sample_rows, *(row.token_rows for row in wanted)))
        with self._attention.serving(forward_batch):
            logits = self._logits(input_ids, positions, rows)
        next_token_logits, *pieces = logits.split([len(sample_rows), *(len(row.token_rows) for row in wanted)])
        return LogitsProcessorOutput(
            next_token_logits, [_prompt_logprobs(row, piece) for row, piece in zip(wanted, pieces, strict=True)]
        )


def _prompt_logprobs(row: "LogprobRow", logits: torch.Tensor) -> Logprobs:
    """``logits``: [tokens of the row, vocab_size]."""
    pieces = iter(logits.split(ROWS_PER_PIECE))
    return prompt_logprobs(row, lambda token_rows: next(pieces))


def _build(config: "PretrainedConfig") -> PreTrainedModel:
    """On the default device, in the default dtype."""
    config.dtype = torch.get_default_dtype()
    config._attn_implementation = "eager"
    names = config.architectures or []
    known = next((name for name in names if name in CAUSAL_LM_NAMES), None)
    if known:
        if known in IMAGE_TEXT_NAMES:
            logger.warning("%s takes images, but by transformers' code only text: requests with images fail", known)
        return getattr(transformers, known)(config)
    # A configuration of remote code was allowed to run, and so is its model.
    if type(config).__module__.startswith("transformers_modules."):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    sees = next((name for name in names if name in IMAGE_TEXT_NAMES), None)
    if sees:
        raise UnservableModelError(f"{sees} takes images, and models run by transformers' code take text only")
    raise UnservableModelError(
        f"transformers has no causal language model of class {', '.join(names) or '(none named)'}"
    )


def _refuse_unservable(model: PreTrainedModel) -> None:
    """Raises for what the configuration or the class tells."""
    for missing in (_missing_state(model), _missing_interface(model)):
        if missing:
            raise UnservableModelError(f"{type(model).__name__} {missing}")


def _missing_state(model: PreTrainedModel) -> str | None:
    """What its layers keep or look at besides keys and values of earlier tokens."""
    config = model.config.get_text_config()
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(SERVED_LAYER_TYPES))
    if config.is_encoder_decoder or any(name.endswith(CROSS_ATTENTION) for name, _ in model.named_modules()):
        return "belongs to an encoder: attention to an encoder's output (cross-attention) is missing here"
    if any("alibi" in name for module in model.modules() for name in dir(type(module))) or getattr(
        config, "alibi", False
    ):
        return "biases scores by distance (ALiBi), which attention here does not"
    if other:
        return f"has layers of type {', '.join(other)}, whose state is not kept here"
    if getattr(model, "_is_stateful", False):
        return "is recurrent, and a recurrent state is not kept here"
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in LENGTH_DEPENDENT_ROPES:
                return (
                    f"rotates keys by their sequence's length (rope type {kind}), which is done for our own models only"
                )
    return None


def _missing_interface(model: PreTrainedModel) -> str | None:
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not any(part._can_set_attn_implementation() for part in parts):
        return "computes attention by itself, not by transformers' interface for attention functions"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "takes no position_ids, so it cannot be told where the tokens of several sequences stand"
    return None


def _check_sequences(config: "PretrainedConfig", device: torch.device) -> list[torch.Tensor]:
    """Random ids, none of them special."""
    text_config = config.get_text_config()
    special = {getattr(text_config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")}
    ids = [i for i in range(min(text_config.vocab_size, 4096)) if i not in special]
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(len(ids), (sum(CHECKED_LENS),), generator=generator, device="cpu")
    return list(torch.tensor(ids, device="cpu")[drawn].to(device).split(CHECKED_LENS))


def _check_batch(
    sequences: list[torch.Tensor],
    starts: tuple[int, ...],
    ends: tuple[int, ...],
    pool: KVPool,
    attention: TorchAttention,
) -> ForwardBatch:
    """Tokens [start, end) of each sequence; its tokens lie in the cache one after the other, from page 1 on."""
    device = sequences[0].device

    def tensor(values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=device)

    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    firsts = [1 + sum(CHECKED_LENS[:i]) for i in range(len(sequences))]
    table = torch.stack([first + torch.arange(max(CHECKED_LENS), device=device) for first in firsts]).int()
    positions = [torch.arange(start, end, device=device) for start, end in zip(starts, ends, strict=True)]
    slots = torch.cat([row[of_row].long() for row, of_row in zip(table, positions, strict=True)])
    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(sequences),
        input_ids=torch.cat([ids[start:end] for ids, start, end in zip(sequences, starts, ends, strict=True)]),
        positions=torch.cat(positions),
        req_pool_indices=tensor(range(len(sequences))),
        seq_lens=tensor(ends),
        extend_prefix_lens=tensor(starts),
        extend_seq_lens=tensor(counts),
        extend_start_loc=tensor(sum(counts[:i]) for i in range(len(counts))),
        seq_lens_cpu=list(ends),
        extend_prefix_lens_cpu=list(starts),
        extend_seq_lens_cpu=counts,
        prompt_lens_cpu=[len(ids) for ids in sequences],
        page_tables=[table] * len(pool.groups),
        out_cache_locs=[slots] * len(pool.groups),
        kv_pool=pool,
        attn_backend=attention,
        sample_rows=tensor([]),
    )


def _compare(expected: list[torch.Tensor], ours: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Raises if logits [tokens, vocab_size] of the sequences differ by more than rounding."""
    worst = 0.0
    for index, (theirs, mine) in enumerate(zip(expected, ours, strict=True)):
        for piece in _errors(mine, theirs[:, : mine.shape[1]]).split(
            [end - start for start, end in _piece_bounds(index)]
        ):
            error = piece.max() if dtype == torch.float32 else piece.median()
            worst = max(worst, float(error.nan_to_num(torch.inf)))
    if not worst <= TOLERANCE[dtype]:
        raise UnservableModelError(
            f"its logits for sequences computed together, in pieces and through the cache differ by {worst:.2g} of "
            "their size from those that it computes by itself: something in it besides attention depends on other "
            "tokens of a step or on their number (a convolution, a recurrence, positions that it counts by itself), or "
            "its attention does more than it tells"
        )


def _errors(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[tokens]: how far logits [tokens, vocab_size] are from the expected ones, relative to how far these are apart."""
    return (logits - expected).norm(dim=-1) / (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)


def _piece_bounds(index: int) -> list[tuple[int, int]]:
    ends = [piece[index] for piece in CHECKED_PIECES]
    return list(zip([0, *ends], ends, strict=False))


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Transformers draws one while it loads."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


EntryClass = TransformersForCausalLM
