"""Runs the model for one rank: from a StepPlan to a ForwardBatch to logits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.cache.spec import CacheGroup, CacheLayout, CacheSpec, LengthScaling
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.forward_batch import ForwardBatch, ForwardMode, LogprobRow
from rtp_llm.srt.kv_pool import KVPool, slots_of
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput
from rtp_llm.srt.layers.multimodal import EmbeddingCache
from rtp_llm.srt.layers.radix_attention import RadixAttention
from rtp_llm.srt.layers.rotary import MRotaryEmbedding
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.multimodal.items import (
    MediaError,
    MultimodalInputs,
    media_blocks,
    pad_mm_tokens,
    vocabulary_ids,
)
from rtp_llm.srt.plan import Admission, PaddedPrompt, PageWrite, RowWork, SharedPrefix, StepPlan
from rtp_llm.srt.worker.device import to_device


@dataclass(slots=True)
class RowState:
    """What a row's admission said. ``ids`` are the tokens that the host knew then."""

    admission: Admission
    ids: list[int]
    media: MultimodalInputs | None = None

    @property
    def prompt_len(self) -> int:
        return len(self.admission.prompt_ids)


class ModelRunner:
    """Holds model, cache tensors, page tables and last tokens; applies plans to them.

    ``last_tokens[row]`` is the token that was drawn last: a step may compute it before the host has seen it.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        model_path: str,
        load_format: str,
        device: str,
        page_size: int,
        attn_backend: AttentionBackend,
        progress: Callable[[int, int], None] | None = None,
        model_impl: str = "auto",
        media_cache_bytes: int = 0,
        kv_cache_dtype: str = "auto",
    ) -> None:
        self.device = device
        self._torch_device = torch.device(device)
        self.model = load_model(model_config, model_path, load_format, device, progress, model_impl)
        self.layout = cache_layout(self.model, page_size, kv_cache_dtype, device)
        self._attn_backend = attn_backend
        self._step_modules: list[Any] = [m for m in self.model.modules() if hasattr(m, "prepare_for_forward")]
        self._takes_mrope = any(isinstance(m, MRotaryEmbedding) for m in self.model.modules())
        self.embedding_cache = EmbeddingCache(media_cache_bytes)
        self._forward = self._entry_point()
        self._rows: dict[int, RowState] = {}

    def _entry_point(self) -> Callable[[ForwardBatch], LogitsProcessorOutput]:
        """``forward_batch(batch)`` where the model has it, else ``forward(input_ids, positions, batch)``."""
        own: Any = getattr(self.model, "forward_batch", None)
        if callable(own):
            return own
        return lambda batch: self.model(batch.input_ids, batch.positions, batch)

    @property
    def max_media_block(self) -> int:
        return int(getattr(self.model, "max_media_block", 0))

    @property
    def reads_shared_prefixes(self) -> bool:
        return self._attn_backend.reads_shared_prefixes

    def pad_input_ids(self, prompt_ids: list[int], media: bytes) -> PaddedPrompt:
        """What the model's ``pad_input_ids`` makes of a prompt; without that method, pad ids at the items' offsets.

        Raises:
            MediaError: what it returned is not consistent with the media. And whatever the method raises.
        """
        inputs = MultimodalInputs.decode(media)
        before = [list(item.offsets) for item in inputs.mm_items]
        own: Any = getattr(self.model, "pad_input_ids", pad_mm_tokens)
        padded = [int(token_id) for token_id in own(list(prompt_ids), inputs)]
        ids = vocabulary_ids(padded, inputs)
        blocks = media_blocks(inputs) if self.max_media_block else []
        moved = before != [item.offsets for item in inputs.mm_items]
        if moved and inputs.mrope_positions is not None:
            raise MediaError("pad_input_ids moved media whose rotary positions the processor had already computed")
        return PaddedPrompt(ids, padded, inputs.encode() if moved else media, blocks)

    @property
    def weight_bytes(self) -> int:
        tensors = {t.data_ptr(): t.nbytes for t in [*self.model.parameters(), *self.model.buffers()]}
        return sum(tensors.values())

    def init_cache(self, num_pages: list[int], max_rows: int, max_len: int) -> None:
        """Reserves cache tensors and page tables for ``max_rows`` requests of at most ``max_len`` tokens.

        Raises:
            ValueError: the model has learned positions, and fewer (``max_positions``).
        """
        max_positions = getattr(self.model, "max_positions", None)
        if max_positions is not None and max_len > max_positions:
            raise ValueError(
                f"the model has learned positions for {max_positions} tokens only, but requests may be of {max_len}; "
                f"set --context-length to {max_positions} or less"
            )
        self.kv_pool = KVPool(self.layout.groups, num_pages, self.device)
        self._page_tables = [
            torch.zeros(max_rows, -(-max_len // group.page_size) + 1, dtype=torch.int32, device=self.device)
            for group in self.layout.groups
        ]
        self.last_tokens = torch.zeros(max_rows, dtype=torch.int64, device=self.device)

    def row(self, row: int) -> RowState:
        return self._rows[row]

    def apply(self, plan: StepPlan) -> None:
        """Takes in everything of a plan but its work."""
        for row in plan.releases:
            del self._rows[row]
        for admission in plan.admissions:
            media = None if admission.media is None else MultimodalInputs.decode(admission.media)
            self._rows[admission.row] = RowState(admission, [*admission.prompt_ids, *admission.output_ids], media)
        for group, table in enumerate(self._page_tables):
            self._write_pages(table, [write for write in plan.page_writes if write.group == group])

    def _write_pages(self, table: torch.Tensor, writes: list[PageWrite]) -> None:
        """One scatter for all writes of a group; a later write to the same entry wins."""
        entries = {(write.row, write.start + i): page for write in writes for i, page in enumerate(write.page_ids)}
        if entries:
            rows, places = zip(*entries, strict=True)
            pages = to_device(list(entries.values()), torch.int32, self._torch_device)
            table[self._tensor(list(rows)), self._tensor(list(places))] = pages

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> tuple[ForwardBatch, LogitsProcessorOutput]:
        """Computes the plan's tokens. Logits come for work with ``sample``, in the order of ``plan.work``."""
        self.apply(plan)
        batch = self._batch(plan.work)
        batch.shared_prefixes = _in_batch(plan.shared_prefixes, plan.work)
        for module in self._step_modules:
            module.prepare_for_forward(batch)
        self._attn_backend.plan(batch)
        output = self._forward(batch)
        _check_output(output, self.model, batch)
        return batch, output

    def _batch(self, work: list[RowWork]) -> ForwardBatch:
        counts = [w.num_tokens for w in work]
        starts = [w.start for w in work]
        ends = [w.start + w.num_tokens for w in work]
        offsets = [0]
        for count in counts:
            offsets.append(offsets[-1] + count)
        rows = self._tensor([w.row for w in work])
        repeats = self._tensor(counts)
        token_rows = rows.repeat_interleave(repeats, output_size=offsets[-1])
        positions = self._tensor([p for w in work for p in range(w.start, w.start + w.num_tokens)])
        has_media = any(self._rows[w.row].media is not None for w in work)
        return ForwardBatch(
            forward_mode=_mode(counts),
            batch_size=len(work),
            input_ids=self._input_ids(work, offsets),
            positions=positions,
            req_pool_indices=rows,
            seq_lens=self._tensor(ends),
            extend_prefix_lens=self._tensor(starts),
            extend_seq_lens=repeats,
            extend_start_loc=self._tensor(offsets[:-1]),
            seq_lens_cpu=ends,
            extend_prefix_lens_cpu=starts,
            extend_seq_lens_cpu=counts,
            prompt_lens_cpu=[self._rows[w.row].prompt_len for w in work],
            page_tables=self._page_tables,
            out_cache_locs=[
                slots_of(table, token_rows, positions, group.page_size)
                for table, group in zip(self._page_tables, self.layout.groups, strict=True)
            ],
            kv_pool=self.kv_pool,
            attn_backend=self._attn_backend,
            sample_rows=self._tensor([end - 1 for w, end in zip(work, offsets[1:], strict=True) if w.sample]),
            prompt_logprobs=[
                row for b, w in enumerate(work) if (row := self._logprob_row(b, w, offsets[b])) is not None
            ],
            mm_inputs=[self._rows[w.row].media for w in work] if has_media else None,
            embedding_cache=self.embedding_cache,
            mrope_positions=self._mrope_positions(work) if has_media and self._takes_mrope else None,
            visible_ends=self._visible_ends(work, offsets) if has_media and self.max_media_block else None,
        )

    def _mrope_positions(self, work: list[RowWork]) -> torch.Tensor:
        """[3, T]: of a prompt with media as its processor made them, and going on from there; else the positions."""
        pieces = []
        for w in work:
            state = self._rows[w.row]
            positions = torch.arange(w.start, w.start + w.num_tokens).expand(3, -1)
            if state.media is not None and state.media.mrope_positions is not None:
                known = state.media.mrope_positions[:, w.start : w.start + w.num_tokens]
                drawn = positions[:, known.shape[1] :] + state.media.mrope_position_delta
                positions = torch.cat([known, drawn], dim=1)
            pieces.append(positions)
        return torch.cat(pieces, dim=1).to(self._torch_device)

    def _visible_ends(self, work: list[RowWork], offsets: list[int]) -> torch.Tensor | None:
        """See ForwardBatch. None where no block is computed in this step."""
        ends = [0] * offsets[-1]
        for w, offset in zip(work, offsets, strict=False):
            media = self._rows[w.row].media
            for first, last in media_blocks(media) if media else ():
                if w.start <= first <= last < w.start + w.num_tokens:
                    place = offset + first - w.start
                    ends[place : place + last - first + 1] = [last + 1] * (last - first + 1)
        return self._tensor(ends) if any(ends) else None

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return to_device(values, torch.int64, self._torch_device)

    def _input_ids(self, work: list[RowWork], offsets: list[int]) -> torch.Tensor:
        """Known ids from the admissions; past them, the last drawn token of the row."""
        ids: list[int] = []
        drawn: list[tuple[int, int]] = []  # (place in the batch, row)
        for w, offset in zip(work, offsets, strict=False):
            known = self._rows[w.row].ids[w.start : w.start + w.num_tokens]
            if len(known) < w.num_tokens:
                if known or w.num_tokens > 1:
                    raise RuntimeError(f"row {w.row}: tokens from {w.start} on are not known to the worker")
                drawn.append((offset, w.row))
                known = [0]
            ids.extend(known)
        input_ids = self._tensor(ids)
        if drawn:
            where = self._tensor([place for place, _ in drawn])
            input_ids[where] = self.last_tokens[self._tensor([row for _, row in drawn])]
        return input_ids

    def _logprob_row(self, batch_index: int, work: RowWork, offset: int) -> LogprobRow | None:
        """Prompt logprobs wanted from this work: of the tokens that follow ``[start, end)`` within the prompt."""
        state = self._rows[work.row]
        admission = state.admission
        if admission.logprob_from is None:
            return None
        first = max(work.start, admission.logprob_from)
        last = min(work.start + work.num_tokens, state.prompt_len - 1)
        if first >= last:
            return None
        return LogprobRow(
            batch_index,
            token_rows=list(range(offset + first - work.start, offset + last - work.start)),
            targets=admission.prompt_ids[first + 1 : last + 1],
            top_num=admission.top_logprobs_num,
            token_ids=admission.token_ids_logprob,
        )


def _check_output(output: object, model: nn.Module, batch: ForwardBatch) -> None:
    """A model may return anything; what is wrong with it must not show up only when tokens are drawn."""
    name = type(model).__name__
    if not isinstance(output, LogitsProcessorOutput):
        method = "forward_batch" if callable(getattr(model, "forward_batch", None)) else "forward"
        raise TypeError(
            f"{name}.{method} must return a LogitsProcessorOutput, which LogitsProcessor makes, not "
            f"{type(output).__name__}"
        )
    num_rows, expected = output.next_token_logits.shape[0], batch.sample_rows.shape[0]
    if num_rows != expected:
        raise ValueError(
            f"{name} returned {num_rows} rows of next_token_logits, not {expected}: there must be one for each of "
            "forward_batch.sample_rows, which LogitsProcessor picks out"
        )


def _in_batch(prefixes: list[SharedPrefix], work: list[RowWork]) -> list[SharedPrefix]:
    """Shared prefixes with rows of the batch instead of the worker's."""
    if not prefixes:
        return []
    places = {w.row: place for place, w in enumerate(work)}
    return [SharedPrefix(prefix.num_tokens, [places[row] for row in prefix.rows]) for prefix in prefixes]


def _mode(counts: list[int]) -> ForwardMode:
    if not counts:
        return ForwardMode.IDLE
    single = [count == 1 for count in counts]
    if all(single):
        return ForwardMode.DECODE
    return ForwardMode.MIXED if any(single) else ForwardMode.EXTEND


def cache_layout(model: nn.Module, page_size: int, kv_cache_dtype: str = "auto", device: str = "cpu") -> CacheLayout:
    """Groups the model's attention layers by what they keep. Layers that share a cache (equal ids) must agree.

    Args:
        kv_cache_dtype: "auto": as the model computes; or "bf16", "int8".

    Raises:
        ValueError: there are no attention layers, they do not agree, or their cache cannot be as it is asked for.
    """
    specs: dict[int, CacheSpec] = {}
    length_scaling: LengthScaling | None = None
    for name, module in model.named_modules():
        if isinstance(module, RadixAttention):
            spec = stored_as(module.cache_spec(), kv_cache_dtype, device)
            if specs.setdefault(module.layer_id, spec) != spec:
                raise ValueError(f"{name}: layer {module.layer_id} is used twice with different caches")
        scaling: Any = getattr(module, "length_scaling", None)
        if scaling is not None:
            if length_scaling not in (None, scaling):
                raise ValueError(f"{name}: the model mixes rotations that depend on the sequence length differently")
            length_scaling = scaling
    if not specs:
        raise ValueError("the model has no RadixAttention layer: there is nothing to cache")
    groups: dict[CacheSpec, list[int]] = {}
    for layer_id, spec in sorted(specs.items()):
        groups.setdefault(spec, []).append(layer_id)
    return CacheLayout(
        tuple(CacheGroup(spec, tuple(layer_ids), page_size) for spec, layer_ids in groups.items()), length_scaling
    )


def stored_as(spec: CacheSpec, kv_cache_dtype: str, device: str) -> CacheSpec:
    """What a layer keeps, in the type that ``--kv-cache-dtype`` asks for.

    Raises:
        ValueError: it cannot be.
    """
    if kv_cache_dtype == "auto":
        return spec
    if device != "cpu":
        raise ValueError(f"kv_cache_dtype={kv_cache_dtype} is for CPUs alone as yet; on {device} leave it at auto")
    if kv_cache_dtype == "bf16":
        if spec.dtype == "float16":
            raise ValueError("kv_cache_dtype=bf16 saves nothing for a model in float16; leave it at auto")
        return replace(spec, dtype="bfloat16")
    if spec.latent:
        raise ValueError(
            "kv_cache_dtype=int8 is not possible for a model with multi-head latent attention, whose cache is small as "
            "it is; leave it at auto"
        )
    return replace(spec, dtype="int8")
