"""One rank's worker, which executes step plans. It knows neither texts nor clients."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from rtp_llm.srt.attention.backends import make_backend
from rtp_llm.srt.cache.spec import CacheLayout
from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import provider_named
from rtp_llm.srt.device.provider import DeviceProvider
from rtp_llm.srt.distributed.parallel_state import WorldShape, get_world
from rtp_llm.srt.layers.logits_processor import LogitsProcessorOutput, Logprobs
from rtp_llm.srt.layers.moe import Experts
from rtp_llm.srt.plan import RowResult, StepPlan, StepResult, TokenMasks
from rtp_llm.srt.pooling import ONLY_TOKENS, PooledOutputs
from rtp_llm.srt.worker.affinity import use_processors
from rtp_llm.srt.worker.layout import largest_part
from rtp_llm.srt.worker.model_runner import ModelRunner
from rtp_llm.srt.worker.pooling import NOT_FINITE, PooledLines
from rtp_llm.srt.worker.profiler import Profiler
from rtp_llm.srt.worker.replayable import NotReplayable
from rtp_llm.srt.worker.sampler import Sampler
from rtp_llm.srt.worker.sampling_tables import masked_lines
from rtp_llm.srt.worker.step_graphs import StepGraphs, sizes_up_to

logger = logging.getLogger(__name__)

BAD_LOGITS = "the model's logits are not finite numbers for this request"


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The configuration of one rank; sent to worker processes."""

    server_args: ServerArgs
    model_config: ModelConfig
    device: str = "cpu"
    rank: int = 0
    replica: int = 0  # the core's place among those of the server
    isolates_rows: bool = False  # media that cannot be encoded end their row alone; False: the error is raised

    @property
    def world_shape(self) -> WorldShape:
        args = self.server_args
        tensor, data = args.tp_size // args.num_request_parts, args.num_request_parts
        return WorldShape(tensor, args.pp_size, args.num_expert_parts, data)

    @property
    def world_size(self) -> int:
        return self.world_shape.size

    @property
    def place(self) -> int:
        """This rank's place among ``num_places``, all ranks of all cores of the server on this machine."""
        return self.replica * self.world_size + self.rank

    @property
    def num_places(self) -> int:
        return self.server_args.dp_size * self.world_size


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A worker's report to the core after loading its model."""

    layout: CacheLayout
    weight_bytes: int
    max_media_block: int = 0  # most tokens of media side by side, which see each other both ways; 0: media are causal
    reads_shared_prefixes: bool = False  # whether attention uses StepPlan.shared_prefixes
    sees_whole_prompts: bool = False  # a prompt is computed in one step, and depends on all of its tokens
    outputs: PooledOutputs = ONLY_TOKENS
    max_positions: int | None = None  # tokens that the model takes at most; None: as its configuration says

    @classmethod
    def of_ranks(cls, ranks: Sequence["LoadedModel"]) -> "LoadedModel":
        """Return the report of all ranks: of several stages, with the memory of the largest."""
        layout = largest_part([rank.layout for rank in ranks])
        return replace(ranks[0], layout=layout, weight_bytes=max(rank.weight_bytes for rank in ranks))


@dataclass(frozen=True, slots=True)
class RankStats:
    """Totals of one rank since it started."""

    # Tokens that were routed to each expert of each of its layers; empty but on the rank that counts them. Ranks with
    # requests of their own count these.
    expert_loads: list[list[int]]
    busy_s: float  # seconds of computing steps, of a stage of a pipeline


@dataclass(slots=True)
class PendingLogits:
    """A step whose forward pass is launched and whose tokens are not drawn yet."""

    plan: StepPlan
    # With a row of logits per work with ``sample``; None on stages of a pipeline that are not the last.
    output: LogitsProcessorOutput | None
    prompt_logprobs: dict[int, Logprobs]  # by index into ``plan.work``
    pooled: list[PooledLines]
    row_errors: dict[int, str]  # by index into ``plan.work``
    graphs: StepGraphs | None = None  # that have computed the step, and its best tokens


class PendingResult:
    """A launched step whose results are being copied to the host. Only ``result()`` waits for the device."""

    def __init__(
        self,
        provider: DeviceProvider,
        plan: StepPlan,
        token_ids: torch.Tensor,
        bad_rows: torch.Tensor,
        asked: list[int],
        logprobs: list[Logprobs],
        prompt_logprobs: dict[int, Logprobs],
        pooled: list[PooledLines],
        row_errors: dict[int, str],
    ) -> None:
        """
        Args:
            token_ids: [S] int64, the drawn tokens; bad_rows: [S] bool, those from bad logits, which are meaningless.
            asked: places in ``token_ids`` of the tokens that ``logprobs``, one after the other, belong to.
            prompt_logprobs, row_errors: by index into ``plan.work``.
        """
        self._plan = plan
        self._row_errors = row_errors
        self._asked, self._prompts = asked, list(prompt_logprobs)
        self._logprobs = [*prompt_logprobs.values(), *logprobs]
        self._pooled = pooled
        tensors = (tensor for each in self._logprobs for tensor in (each.ids, each.values))
        self._arrived = provider.to_host([token_ids, bad_rows, *(each.lines for each in pooled), *tensors])

    def result(self) -> StepResult:
        token_ids, bad_rows, *tensors = self._arrived()
        lines, tensors = tensors[: len(self._pooled)], tensors[len(self._pooled) :]
        pairs = zip(self._logprobs, tensors[::2], tensors[1::2], strict=True)
        read = [replace(logprobs, ids=ids, values=values).read() for logprobs, ids, values in pairs]
        logprobs = dict(zip(self._asked, chain(*read[len(self._prompts) :]), strict=True))
        drawn = enumerate(zip(token_ids.tolist(), bad_rows.tolist(), strict=True))
        rows = []
        for work in self._plan.work:
            if not work.sample:
                rows.append(RowResult())
                continue
            place, (token_id, bad) = next(drawn)
            logprob = [logprobs[place]] if place in logprobs else []
            rows.append(RowResult(error=BAD_LOGITS) if bad else RowResult([token_id], logprob, []))
        for index, prompt_logprobs in zip(self._prompts, read, strict=False):
            rows[index].prompt_logprobs = prompt_logprobs
        for pooled, copied in zip(self._pooled, lines, strict=True):
            for index, output in pooled.outputs(copied):
                rows[index] = RowResult(error=NOT_FINITE) if output is None else RowResult(pooled=output)
        for index, message in self._row_errors.items():
            rows[index] = RowResult(error=message)
        return StepResult(self._plan.step_id, rows)


class NoResult:
    """A step of a stage that draws no tokens: the last stage's ranks have its result."""

    def __init__(self, plan: StepPlan) -> None:
        self._step_id = plan.step_id

    def result(self) -> StepResult:
        return StepResult(self._step_id, [])


class Worker:
    """Executes plans: ``step(plan)``, or ``forward`` and then ``sample`` where token masks come in between."""

    def __init__(self, config: WorkerConfig, progress: Callable[[int, int], None] | None = None) -> None:
        self._provider = provider_named(config.device)
        args = config.server_args
        use_processors(self._provider, args, config.place, config.num_places)
        asked = args.moe_a2a_backend
        get_world().moe_a2a_backend = self._provider.moe_a2a_backend if asked == "auto" else asked
        dtype = getattr(torch, config.model_config.dtype)
        backend = make_backend(config.server_args.attention_backend, config.device, dtype)
        self.runner = ModelRunner(config.server_args, config.model_config, config.device, backend, progress)
        self._args = args
        self.graphs: StepGraphs | None = None
        self._vocab_size = config.model_config.vocab_size
        self._isolates_rows = config.isolates_rows
        self._profiler = Profiler(config.rank, self._provider.activities)

    def loaded(self) -> LoadedModel:
        runner = self.runner
        return LoadedModel(
            runner.layout,
            runner.weight_bytes,
            runner.max_media_block,
            runner.reads_shared_prefixes,
            runner.sees_whole_prompts,
            runner.outputs,
            runner.max_positions,
        )

    def init_cache(self, num_pages: list[int], max_rows: int, max_len: int, num_state_slots: int = 0) -> None:
        self.runner.init_cache(num_pages, max_rows, max_len, num_state_slots)
        generates = self.runner.traits.generates
        self.sampler = Sampler(max_rows, self._vocab_size, self._provider.name, generates)
        if self.runner.records_graphs:
            self._record_graphs(max_rows)

    def _record_graphs(self, max_rows: int) -> None:
        """Record decode steps, where the model allows it; otherwise the log says why not."""
        tables = self.sampler.tables
        assert tables is not None, "a device that records graphs has tables of what rows draw by"
        try:
            step = self.runner.decode_step()
        except NotReplayable as reason:
            logger.info("decode steps are not recorded: %s", reason)
            return
        sizes = sizes_up_to(max_rows, self._args.cuda_graph_max_bs, self._args.cuda_graph_bs)
        self.graphs = StepGraphs(step, tables, self._provider, sizes, self._vocab_size)
        self.graphs.record()

    def step(self, plan: StepPlan) -> "PendingResult | NoResult":
        return self.sample(self.forward(plan))

    @torch.inference_mode()
    def step_with_logits(self, plan: StepPlan) -> tuple[StepResult, torch.Tensor]:
        """As ``step``, but wait; also return a copy of the logits that were drawn from, [S, vocab_size] float32."""
        pending = self.forward(plan)
        if pending.output is None:
            raise RuntimeError("this rank's stage of the pipeline computes no logits: ask those of the last")
        return self.sample(pending).result(), pending.output.next_token_logits.to("cpu", copy=True)

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function with this worker and more arguments, and return what it returns.

        For tools that look into every rank: ``executor.rpc("apply", function, ...)`` names a function that the rank's
        process can import.
        """
        return function(self, *args)

    def stats(self) -> RankStats:
        experts = [module for module in self.runner.model.modules() if isinstance(module, Experts)]
        loads = [module.load.tolist() for module in experts if module.load is not None]
        return RankStats(loads, 0.0 if self.runner.stage is None else self.runner.stage.busy_s)

    def start_profile(self, activities: list[str], record_shapes: bool) -> None:
        self._profiler.start(activities, record_shapes)

    def stop_profile(self, path_prefix: str) -> str:
        return self._profiler.stop(path_prefix)

    def forward(self, plan: StepPlan) -> PendingLogits:
        for row in plan.releases:
            self.sampler.release(row)
        for admission in plan.admissions:
            if admission.spec.pooling is None:
                self.sampler.admit(admission)
        self.runner.apply(plan)
        get_world().step_tokens = plan.rank_tokens
        if (recorded := self._run_graph(plan)) is not None:
            return recorded
        row_errors: dict[int, str] = {}
        batch, output = self.runner.forward(plan, row_errors if self._isolates_rows else None)
        if output is None:
            return PendingLogits(plan, None, {}, [], {})
        indices = [row.batch_index for row in batch.prompt_logprobs]
        prompt_logprobs = dict(zip(indices, output.prompt_logprobs, strict=True))
        pooled = self.runner.row_pooling.lines(output.pooled_states)
        return PendingLogits(plan, output, prompt_logprobs, pooled, row_errors)

    @torch.inference_mode()
    def _run_graph(self, plan: StepPlan) -> PendingLogits | None:
        """Launch the recorded step of this plan's rows, if there is one."""
        if self.graphs is None or not self.graphs.takes(len(plan.work)):
            return None
        rows = self.runner.continued_rows(plan)
        if rows is None:
            return None
        if self.sampler.tables is not None:
            self.sampler.tables.fill()
        self.graphs.run(rows)
        output = LogitsProcessorOutput(self.graphs.logits[: len(plan.work)], [])
        return PendingLogits(plan, output, {}, [], {}, self.graphs)

    @torch.inference_mode()
    def sample(self, pending: PendingLogits, masks: TokenMasks | None = None) -> "PendingResult | NoResult":
        """Draw the step's tokens, under ``masks`` for ``plan.masked_rows``, where there are logits."""
        if pending.output is None:
            return NoResult(pending.plan)
        work = [w for w in pending.plan.work if w.sample]
        rows, positions = [w.row for w in work], [w.start + w.num_tokens for w in work]
        if pending.graphs is not None and self.sampler.are_in_tables(rows):
            return self._drawn_by_graph(pending.plan, pending.graphs, rows, masks)
        tokens, bad_rows, asked, logprobs = [], [], [], []
        for part, logits in pending.output.pieces():
            own_masks = None if masks is None else _without_others(masks, rows, part)
            drawn, bad = self.sampler.sample_and_check(logits, rows[part], positions[part], own_masks)
            places, theirs = self.sampler.logprobs(logits, drawn, rows[part])
            tokens.append(drawn)
            bad_rows.append(bad)
            asked += [part.start + place for place in places]
            logprobs += [] if theirs is None else [theirs]
            del logits  # before the next piece takes as much memory
        token_ids, bad_ones = self._join(tokens), self._join(bad_rows).bool()
        if rows:
            self.sampler.observe(rows, token_ids)
            self.runner.last_tokens[self._provider.to_device(rows, torch.int64)] = token_ids
        return PendingResult(
            self._provider,
            pending.plan,
            token_ids,
            bad_ones,
            asked,
            logprobs,
            pending.prompt_logprobs,
            pending.pooled,
            pending.row_errors,
        )

    def _drawn_by_graph(
        self, plan: StepPlan, graphs: StepGraphs, rows: list[int], masks: TokenMasks | None
    ) -> PendingResult:
        """Return what the recorded step drew, its best tokens; adjust and draw first, if some rows want it."""
        tables, num_rows = self.sampler.tables, len(rows)
        counts, draws = tables is not None and tables.adjusts(rows), not self.sampler.are_greedy(rows)
        lines = [] if masks is None else masked_lines(rows, masks, self._vocab_size)
        graphs.draw(draws, counts or masks is not None, counts, masks, lines)
        tokens, bad = graphs.tokens[:num_rows], graphs.bad[:num_rows]
        asked, logprobs = self.sampler.logprobs(graphs.logits[:num_rows], tokens, rows)
        found = [] if logprobs is None else [logprobs]
        return PendingResult(self._provider, plan, tokens, bad, asked, found, {}, [], {})

    def _join(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Concatenate what was drawn; without pieces, nothing was."""
        if not pieces:
            return torch.empty(0, dtype=torch.int64, device=self._provider.torch_device)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _without_others(masks: TokenMasks, rows: list[int], part: slice) -> TokenMasks | None:
    """Leave out the masks of the step's rows that are not in ``part``; return None if none is left."""
    others = {*rows[: part.start], *rows[part.stop :]}
    if others.isdisjoint(masks.rows):
        return masks
    lines = [line for line, row in enumerate(masks.rows) if row not in others]
    return TokenMasks([masks.rows[line] for line in lines], masks.words[lines]) if lines else None
