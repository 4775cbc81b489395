"""Runs the model for one rank: from a StepPlan to a ForwardBatch to logits."""

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from rtp_llm.srt.attention.base import AttentionBackend
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.device.registry import load_target
from rtp_llm.srt.distributed.parallel_state import get_pp_group, get_world
from rtp_llm.srt.forward_batch import ForwardBatch, LogprobRow
from rtp_llm.srt.kv_pool import KVPool, slots_of
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput
from rtp_llm.srt.layers.quantization.base import stored_bytes
from rtp_llm.srt.model_traits import ModelTraits, PreparesForward
from rtp_llm.srt.models.loader import load_model
from rtp_llm.srt.models.stages import Stage, plan_stages
from rtp_llm.srt.multimodal.embedding_cache import EmbeddingCache
from rtp_llm.srt.multimodal.items import MultimodalInputs, media_blocks
from rtp_llm.srt.multimodal.media_store import open_content
from rtp_llm.srt.plan import Admission, NewPages, PageWrite, RowWork, StepPlan
from rtp_llm.srt.pooling import PooledOutputs, PoolingTask
from rtp_llm.srt.state_pool import StatePool
from rtp_llm.srt.worker.columns import StepColumns, mode_of, page_entries, step_columns
from rtp_llm.srt.worker.decode_batch import DecodeBatches, in_batch
from rtp_llm.srt.worker.last_layer import LastLayer
from rtp_llm.srt.worker.layout import cache_layout, own_part, sees_whole_prompts, takes_mrope_positions
from rtp_llm.srt.worker.model_output import check_output, encoded_output
from rtp_llm.srt.worker.pooling import RowPooling
from rtp_llm.srt.worker.replayable import NotReplayable
from rtp_llm.srt.worker.row_state import RowState
from rtp_llm.srt.worker.states import RowStates
from rtp_llm.srt.worker.step_graphs import DecodeStep, HostRows
from rtp_llm.srt.worker.step_recorder import StepRecorder

_NO_ID = np.zeros(1, dtype=np.int64)  # in the place of a token that was drawn


class ModelRunner:
    """Holds model, cache tensors, page tables and last tokens; applies plans to them.

    ``last_tokens[row]`` is the token that was drawn last: a step may compute it before the host has seen it.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        model_config: ModelConfig,
        device: str,
        attn_backend: AttentionBackend,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.device = device
        self._provider = provider_named(device)
        self._torch_device = torch.device(self._provider.torch_device)
        self.stage: Stage | None = None  # of a pipeline
        self.model = load_model(
            model_config,
            model_config.model_path,
            server_args.load_format,
            device,
            progress,
            model_impl=server_args.model_impl,
            quantization=server_args.quantization,
            cut=partial(self._cut, server_args) if get_pp_group().world_size > 1 else None,
            packed_cache=server_args.packed_cache,
        )
        if self.stage is None:
            self._note_what_is_kept(server_args, self.model)
        self.traits = ModelTraits.of(self.model)
        self.layout = own_part(self._whole_layout, self.model)
        self.row_pooling = RowPooling(self.traits.poolers, self._provider)
        self.attn_backend = attn_backend
        self._modules = list(self.model.modules())
        self._step_modules: list[PreparesForward] = [x for x in self._modules if isinstance(x, PreparesForward)]
        self._takes_mrope = takes_mrope_positions(self.model)
        self.embedding_cache = EmbeddingCache(server_args.mm_embedding_cache_size_mb << 20)
        self._forward = self._entry_point()
        self._is_one_of_several = get_world().shape.data > 1  # each with requests of its own
        has_last_layer = (self.stage is None or self.stage.is_last) and not self._is_one_of_several
        narrows = self._provider.narrows_last_layer and has_last_layer
        self.last_layer = LastLayer.of(self.model, attn_backend) if narrows else None
        if self.last_layer is not None:
            self._step_modules.append(self.last_layer)
        self.recorder: StepRecorder | None = None
        can_replay = attn_backend.replays and self.traits.replays_steps
        if can_replay and not server_args.disable_cpu_graph and get_world().shape.size == 1:
            self.recorder = self._make_recorder()
        self._disable_prefix_sharing = server_args.disable_prefix_sharing
        wants_graphs = self.traits.generates and not server_args.disable_cuda_graph
        self.records_graphs = self._provider.records_graphs and wants_graphs
        self._rows: dict[int, RowState] = {}
        self._rows_with_media: set[int] = set()
        self._rows_with_logprobs: set[int] = set()  # rows that want prompt logprobs

    def _cut(self, server_args: ServerArgs, model: nn.Module) -> list[str]:
        """Note what the whole model keeps, then leave this stage's part of it; see ``load_model``."""
        stages = get_pp_group()
        self._note_what_is_kept(server_args, model)
        self.stage = Stage(model, plan_stages(model, stages.world_size, server_args.pp_split), stages)
        return self.stage.absent

    def _note_what_is_kept(self, server_args: ServerArgs, model: nn.Module) -> None:
        generates = ModelTraits.of(model).generates
        page_size, dtype = server_args.page_size, server_args.kv_cache_dtype
        self._whole_layout = cache_layout(model, page_size, dtype, self.device, generates)
        self.sees_whole_prompts = sees_whole_prompts(model)

    def _entry_point(self) -> Callable[[ForwardBatch], LogitsProcessorOutput]:
        """Return the model's ``forward_batch``, else a call of ``forward(input_ids, positions, batch)``."""
        own = self.traits.forward_batch
        forward = own if own is not None else lambda batch: self.model(batch.input_ids, batch.positions, batch)
        return forward if self.traits.generates else partial(encoded_output, forward)

    def _make_recorder(self) -> StepRecorder | None:
        if self._provider.step_recorder is None:
            return None
        recorder: type[StepRecorder] = load_target(self._provider.step_recorder)
        return recorder(self._forward, self.attn_backend, self._step_modules)

    @property
    def max_media_block(self) -> int:
        return self.traits.max_media_block

    @property
    def outputs(self) -> PooledOutputs:
        """The pooled outputs that the model has. Without a cache there is no prefix to reuse."""
        tasks = tuple(
            PoolingTask(name, pooler.width, pooler.per_token, pooler.reads_prefix or self.sees_whole_prompts)
            for name, pooler in self.traits.poolers.items()
        )
        return PooledOutputs(tasks, self.traits.generates)

    @property
    def max_positions(self) -> int | None:
        return self.traits.max_positions

    @property
    def reads_shared_prefixes(self) -> bool:
        return self.attn_backend.reads_shared_prefixes

    @property
    def weight_bytes(self) -> int:
        """Memory of parameters, buffers and packed weights."""
        return stored_bytes(self.model)

    def init_cache(self, num_pages: list[int], max_rows: int, max_len: int, num_state_slots: int = 0) -> None:
        """Reserve cache tensors and page tables for ``max_rows`` requests of at most ``max_len`` tokens.

        Args:
            num_state_slots: of a model with states, how many the scheduler has: one for each row, at least.

        Raises:
            ValueError: the model takes fewer tokens (``max_positions``) than ``max_len``.
        """
        max_positions = self.traits.max_positions
        if max_positions is not None and max_len > max_positions:
            raise ValueError(
                f"the model takes {max_positions} tokens at most, but requests may be of {max_len}; set "
                f"--context-length to {max_positions} or less"
            )
        recorder, self._dummy_row = self.recorder, max_rows
        pads = self.records_graphs or self._is_one_of_several or bool(recorder is not None and recorder.sizes)
        if recorder is not None and recorder.pads_prompts and self.layout.groups and self.layout.states is None:
            pads, recorder.dummy_row = True, max_rows
        num_rows = max_rows + pads
        self.kv_pool = KVPool(self.layout.groups, [count + pads for count in num_pages], self.device)
        self._page_tables = [
            torch.zeros(num_rows, -(-max_len // group.page_size) + 1, dtype=torch.int32, device=self._torch_device)
            for group in self.layout.groups
        ]
        if pads:  # the last page belongs to no request: no row reads what dummies write, not even masked
            for table, count in zip(self._page_tables, num_pages, strict=True):
                table[self._dummy_row] = count + 1
        self.last_tokens = torch.zeros(num_rows, dtype=torch.int64, device=self._torch_device)
        self._mrope_deltas = torch.zeros(num_rows, dtype=torch.int64, device=self._torch_device)
        self._rows_with_deltas: set[int] = set()
        self._num_known = np.zeros(num_rows, dtype=np.int64)  # per row, len(ids) of its RowState
        self._prompt_lens = np.zeros(num_rows, dtype=np.int64)
        self.states = None
        if self.layout.states is not None:
            pool = StatePool(self.layout.states, num_state_slots, self.device)
            self.states = RowStates(pool, num_rows, self._provider)

    def row(self, row: int) -> RowState:
        return self._rows[row]

    @torch.inference_mode()
    def apply(self, plan: StepPlan) -> None:
        """Apply all of a plan except its work: releases, admissions, known tokens, page writes."""
        for row in plan.releases:
            del self._rows[row]
            self._rows_with_media.discard(row)
            self._rows_with_logprobs.discard(row)
            self.row_pooling.release(row)
        for admission in plan.admissions:
            self._admit(admission)
        for known in plan.known_tokens:
            state = self._rows[known.row]
            state.ids = np.concatenate([state.ids[: known.start], np.array(known.ids, dtype=np.int64)])
            self._num_known[known.row] = len(state.ids)
        if self.states is not None:
            self.states.admit(plan.admissions)
        if plan.drawn_rows:
            rows = self._provider.to_device(plan.drawn_rows, torch.int64)
            self.last_tokens[rows] = self._provider.to_device(plan.drawn_ids, torch.int64)
        for group, table in enumerate(self._page_tables):
            writes = [write for write in plan.page_writes if write.group == group]
            self._write_pages(table, writes, [new for new in plan.new_pages if new.group == group])

    def _admit(self, admission: Admission) -> None:
        row, asked = admission.row, admission.spec.media
        media = None if asked is None else MultimodalInputs.decode(open_content(asked.content))
        ids = np.array([*admission.prompt_ids, *admission.output_ids], dtype=np.int64)
        self._rows[row] = RowState(admission, ids, media)
        self._num_known[row], self._prompt_lens[row] = len(ids), len(admission.prompt_ids)
        self.row_pooling.admit(admission, ids)
        if media is not None:
            self._rows_with_media.add(row)
        if admission.logprob_from is not None:
            self._rows_with_logprobs.add(row)
        delta = 0 if media is None or media.mrope_positions is None else media.mrope_position_delta
        if delta or row in self._rows_with_deltas:
            self._mrope_deltas[row] = delta
            self._rows_with_deltas.add(row)

    def _write_pages(self, table: torch.Tensor, writes: list[PageWrite], new_pages: list[NewPages]) -> None:
        """Write a group's page table in one scatter."""
        entries = [page_entries(writes), *((new.rows, new.places, new.page_ids) for new in new_pages)]
        entries = [columns for columns in entries if columns[0]]
        if entries:
            columns = [np.concatenate(column) for column in zip(*entries, strict=True)]
            rows, places, pages = self._provider.to_device_together(columns)
            table[rows, places] = pages.int()

    @torch.inference_mode()
    def forward(
        self, plan: StepPlan, row_errors: dict[int, str] | None = None
    ) -> tuple[ForwardBatch, LogitsProcessorOutput | None]:
        """Compute the tokens of a plan that was applied. Logits are of the work with ``sample``, in its order; None on
        stages of a pipeline that are not the last.

        ``row_errors`` takes errors that end one row; see ForwardBatch.
        """
        batch = self.make_batch(plan.work, self._num_dummies(plan.work))
        batch.row_errors = row_errors
        batch.shared_prefixes = in_batch(plan.shared_prefixes, plan.work)
        if self.states is not None:
            batch.state_pool = self.states.pool
            batch.state_waves = self.states.waves(plan.work, plan.states, batch.num_dummies)
        output = self._computed(batch)
        if self.states is not None:
            self.states.keep_last(plan.work, plan.states)
        if output is None:
            return batch, None
        if batch.num_dummies:  # which are last, with one token each
            output = output.first(output.num_rows - batch.num_dummies, batch.num_tokens - batch.num_dummies)
        return batch, output

    def _computed(self, batch: ForwardBatch) -> LogitsProcessorOutput | None:
        """Return the model's output for the batch; None on stages of a pipeline that are not the last."""
        recorder = None if batch.forward_mode.is_extend() and self._is_watched() else self.recorder
        whole = batch if recorder is None else recorder.with_dummies(batch)
        for module in self._step_modules:
            module.prepare_for_forward(whole)
        self.attn_backend.plan(whole)
        output: LogitsProcessorOutput | None
        if self.stage is not None:
            output = self.stage.run(self._forward, whole)
            if not self.stage.is_last:
                return None
        else:
            output = recorder.run(whole) if recorder is not None and recorder.takes(whole) else self._forward(whole)
        check_output(output, self.model, self.traits, whole)
        if whole is not batch and batch.pooled_tokens is not None:
            return output.first_pooled(len(batch.pooled_tokens))
        return output

    def _is_watched(self) -> bool:
        """Whether hooks are called with what modules take or make, as a replayed step would not."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)

    def _num_dummies(self, work: list[RowWork]) -> int:
        """Number of rows to add up to the next size that decode steps are recorded for; else 0, or 1 to no rows."""
        if self._is_one_of_several:
            return int(not work)  # experts are computed together with ranks that have work
        sizes = () if self.recorder is None else self.recorder.sizes
        place = bisect_left(sizes, len(work))
        if place == len(sizes) or not work or not all(w.num_tokens == 1 and w.sample for w in work):
            return 0
        return sizes[place] - len(work)

    def decode_step(self) -> DecodeStep:
        """Return what a recorded decode step consists of, once the cache is there.

        Raises:
            NotReplayable: steps of this model, or with this attention back end, cannot be recorded.
        """
        if not self.traits.replays_steps:
            raise NotReplayable(f"{type(self.model).__name__} says that it keeps state of its own (replays_steps)")
        if self.stage is not None:
            raise NotReplayable("stages of a pipeline wait for each other")
        if self._is_one_of_several:
            raise NotReplayable("ranks with requests of their own exchange as many tokens as each has")
        if not self.attn_backend.replays:
            raise NotReplayable(f"the attention back end {type(self.attn_backend).__name__} reads the host's lists")
        batches = DecodeBatches(
            last_tokens=self.last_tokens,
            page_tables=self._page_tables,
            kv_pool=self.kv_pool,
            attn_backend=self.attn_backend,
            embedding_cache=self.embedding_cache,
            states=self.states,
            mrope_deltas=self._mrope_deltas if self._takes_mrope else None,
        )
        return DecodeStep(
            make_batch=batches.make,
            forward=self._checked_forward,
            attn_backend=self.attn_backend,
            step_modules=self._step_modules,
            last_tokens=self.last_tokens,
            dummy_row=self._dummy_row,
            shares_prefixes=self.reads_shared_prefixes and not self._disable_prefix_sharing,
        )

    def continued_rows(self, plan: StepPlan) -> HostRows | None:
        """Return the rows of a plan that was applied, if all it does is to continue each by its last drawn token."""
        if plan.states or not all(w.num_tokens == 1 and w.sample for w in plan.work):
            return None
        rows = np.array([w.row for w in plan.work], dtype=np.int64)
        starts = np.array([w.start for w in plan.work], dtype=np.int64)
        if (starts < self._num_known[rows]).any():
            return None
        return HostRows(rows, starts, self._prompt_lens[rows], in_batch(plan.shared_prefixes, plan.work))

    def _checked_forward(self, batch: ForwardBatch) -> LogitsProcessorOutput:
        output = self._forward(batch)
        check_output(output, self.model, self.traits, batch)
        return output

    def make_batch(self, work: list[RowWork], num_dummies: int) -> ForwardBatch:
        """Make a batch of the rows of ``work``, and after them dummies of one token each."""
        rows = work + [RowWork(self._dummy_row, 0, 1, sample=True)] * num_dummies
        host = step_columns(rows)
        step: StepColumns[torch.Tensor] = StepColumns(*self._provider.to_device_together(host))
        counts, offsets = host.counts.tolist(), host.offsets.tolist()[: len(work)]  # dummies are last
        has_media = not self._rows_with_media.isdisjoint(w.row for w in work)
        return ForwardBatch(
            forward_mode=mode_of(counts),
            batch_size=len(rows),
            num_dummies=num_dummies,
            input_ids=self._input_ids(host, step),
            positions=step.positions,
            req_pool_indices=step.rows,
            seq_lens=step.ends,
            extend_prefix_lens=step.starts,
            extend_seq_lens=step.counts,
            extend_start_loc=step.offsets,
            seq_lens_cpu=host.ends.tolist(),
            extend_prefix_lens_cpu=host.starts.tolist(),
            extend_seq_lens_cpu=counts,
            prompt_lens_cpu=self._prompt_lens[host.rows].tolist(),
            page_tables=self._page_tables,
            out_cache_locs=[
                slots_of(table, step.token_rows, step.positions, group.page_size)
                for table, group in zip(self._page_tables, self.layout.groups, strict=True)
            ],
            kv_pool=self.kv_pool,
            attn_backend=self.attn_backend,
            sample_rows=step.sample_rows,
            prompt_logprobs=self._logprob_rows(work, offsets),
            mm_inputs=[*(self._rows[w.row].media for w in work), *[None] * num_dummies] if has_media else None,
            embedding_cache=self.embedding_cache,
            mrope_positions=self._mrope_positions(rows) if has_media and self._takes_mrope else None,
            visible_ends=self._visible_ends(work, offsets, len(host.positions))
            if (self.sees_whole_prompts and self.layout.groups) or (has_media and self.max_media_block)
            else None,
            pooled_tokens=self.row_pooling.tokens(work, offsets),
            token_types=self.row_pooling.token_types(work, offsets, len(host.positions)),
        )

    def _mrope_positions(self, work: list[RowWork]) -> torch.Tensor:
        """[3, T]: a prompt with media has its processor's, which output tokens continue; other rows have positions."""
        pieces = []
        for w in work:
            media = None if w.row == self._dummy_row else self._rows[w.row].media
            positions = torch.arange(w.start, w.start + w.num_tokens).expand(3, -1)
            if media is not None and media.mrope_positions is not None:
                known = media.mrope_positions[:, w.start : w.start + w.num_tokens]
                drawn = positions[:, known.shape[1] :] + media.mrope_position_delta
                positions = torch.cat([known, drawn], dim=1)
            pieces.append(positions)
        return torch.cat(pieces, dim=1).to(self._torch_device)

    def _visible_ends(self, work: list[RowWork], offsets: list[int], num_tokens: int) -> torch.Tensor | None:
        """See ForwardBatch. None where no block is computed in this step."""
        ends = [0] * num_tokens
        for w, offset in zip(work, offsets, strict=True):
            for first, last in self._blocks(w.row):
                if w.start <= first <= last < w.start + w.num_tokens:
                    place = offset + first - w.start
                    ends[place : place + last - first + 1] = [last + 1] * (last - first + 1)
        return self._provider.to_device(ends, torch.int64) if any(ends) else None

    def _blocks(self, row: int) -> list[tuple[int, int]]:
        """Return first and last positions of the tokens of a row's prompt that see each other both ways."""
        if self.sees_whole_prompts:
            return [(0, int(self._prompt_lens[row]) - 1)]
        media = self._rows[row].media
        return media_blocks(media) if media else []

    def _input_ids(self, host: StepColumns[np.ndarray], step: StepColumns[torch.Tensor]) -> torch.Tensor:
        """[T] int64: known ids from the admissions; after them, the row's last drawn token."""
        num_known = self._num_known[host.rows]
        is_drawn = host.starts >= num_known
        if is_drawn.all() and len(host.positions) == len(host.rows):
            return self.last_tokens[step.rows]
        unknown = is_drawn & (host.counts > 1) | ~is_drawn & (host.ends > num_known)
        if unknown.any():
            row, start = host.rows[unknown][0], host.starts[unknown][0]
            raise RuntimeError(f"row {row}: tokens from {start} on are not all known to the worker")
        parts = zip(host.rows.tolist(), host.starts.tolist(), host.ends.tolist(), is_drawn.tolist(), strict=True)
        ids = np.concatenate([_NO_ID if drawn else self._rows[row].ids[start:end] for row, start, end, drawn in parts])
        if not is_drawn.any():
            return self._provider.to_device_together([ids])[0]
        input_ids, places, rows = self._provider.to_device_together((ids, host.offsets[is_drawn], host.rows[is_drawn]))
        input_ids[places] = self.last_tokens[rows]
        return input_ids

    def _logprob_rows(self, work: list[RowWork], offsets: list[int]) -> list[LogprobRow]:
        if not self._rows_with_logprobs:
            return []
        wanted = [
            self._rows[w.row].logprob_row(batch_index, w, offset, self._provider)
            for batch_index, (w, offset) in enumerate(zip(work, offsets, strict=True))
        ]
        return [row for row in wanted if row is not None]
