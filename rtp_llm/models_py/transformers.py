"""Any causal language model of the transformers library, with our paged attention in place of its own.

The model's own code runs, on all tokens of a step as one row. Two things let several sequences share that row: position
ids are passed, and attention, which transformers calls through its interface for attention functions, is ours. A module
that keeps another state (a convolution's, a recurrence's) gets the sequences one by one, or those of equal length
together, with states of ours. Such a model does not declare what its layers need of the cache, so this is found out
after loading: one pass over a few tokens records every call of attention, with its shapes, scaling, soft cap, sinks and
mask, and every state that a module asks the cache for. Then the plain model computes the
same tokens, and ours computes them in pieces; a model whose logits differ is refused.
"""

import copy
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from rtp_llm.srt.attention.torch import TorchAttention
from rtp_llm.srt.cache.spec import CacheGroup, StateGroup
from rtp_llm.srt.forward_batch import ForwardBatch
from rtp_llm.srt.kv_pool import KVPool
from rtp_llm.srt.layers.fallback.attention import PROBING, SERVING, PagedAttention, Probe
from rtp_llm.srt.layers.fallback.build import build, cache_options, keeps_states, refuse_unservable
from rtp_llm.srt.layers.fallback.cache import ServedCache
from rtp_llm.srt.layers.fallback.loading import loaded, refuse_setting
from rtp_llm.srt.layers.fallback.masks import UnservableModelError
from rtp_llm.srt.layers.fallback.own_states import served_cache
from rtp_llm.srt.layers.fallback.proof import (
    CHECKED_LENS,
    CHECKED_PIECES,
    TOLERANCE,
    check_batch,
    check_sequences,
    compare,
    errors,
)
from rtp_llm.srt.layers.fallback.single_steps import check_single_steps
from rtp_llm.srt.layers.fallback.states import StateKeeper, StateProbe, Steps
from rtp_llm.srt.layers.logits_processor import ROWS_PER_PIECE, LogitsProcessorOutput, Logprobs, prompt_logprobs
from rtp_llm.srt.layers.quantization.base import QuantizationConfig
from rtp_llm.srt.state_pool import StatePool

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rtp_llm.srt.forward_batch import LogprobRow


class TransformersForCausalLM(nn.Module):
    """Transformers' own class for a configuration, served with our cache and batching.

    Raises:
        UnservableModelError: from the constructor if the configuration shows it, from ``finish_load`` if only running
            the model does.
    """

    replays_steps = False  # transformers' code may keep state between steps

    def __init__(
        self, config: "PretrainedConfig", quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        refuse_setting(quant_config)
        self.vocab_size = config.get_text_config().vocab_size
        own_config = copy.deepcopy(config)
        if quant_config is not None:
            vars(own_config).pop("quantization_config", None)  # weights come dequantized
        with no_init_weights():
            self.model = build(own_config)
        self.model.tie_weights()
        refuse_unservable(self.model)
        taken = inspect.signature(self.model.forward).parameters
        self._takes_rows, self._takes_positions = "logits_to_keep" in taken, "position_ids" in taken
        self.attentions, self.states = nn.ModuleList(), nn.ModuleList()
        self._steps = Steps()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load as transformers does, with its renamings, conversions and ties. A missing weight is an error."""
        model_class, config, device = type(self.model), self.model.config, self.model.device
        del self.model  # free its tensors, which are not initialised, before the loaded ones are made
        self.model = loaded(model_class, config, device, weights)

    def finish_load(self) -> None:
        """Find out what attention needs, and make sure that the model computes the same with it."""
        self.model.eval()
        sequences = check_sequences(self.model.config, self.model.device)
        expected = self._run_plain(sequences)
        self._first_position = self._find_first_position(sequences[0], expected[0])
        self._probe(sequences[0])
        self._set(SERVING, self._attention)
        compare(expected, self._run_in_pieces(sequences), self.model.dtype)

    def _set(self, name: str, handler: Probe | PagedAttention | None) -> None:
        self.model.set_attn_implementation(name)
        for module in self.model.modules():
            module.rtp_llm_attention = handler

    def _run_plain(self, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
        """[tokens, vocab_size] float32 of each sequence, by transformers alone."""
        self._set("eager", None)
        return [self.model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in sequences]

    def _find_first_position(self, ids: torch.Tensor, expected: torch.Tensor) -> int:
        """Return the position id of a sequence's first token: 0, except in RoBERTa (2019): the padding id + 1."""
        if not self._takes_positions:
            return 0
        positions = torch.arange(len(ids), device=ids.device)
        logits = self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0].float()
        if float(errors(logits, expected).median()) < TOLERANCE[self.model.dtype] / 10:
            return 0
        return 1 + (getattr(self.model.config.get_text_config(), "pad_token_id", None) or 0)

    def _probe(self, ids: torch.Tensor) -> None:
        """Find attention's calls and the modules that keep states, and make them ours."""
        cache = served_cache(self.model.config) if keeps_states(self.model) else ServedCache()
        self._cache_options = cache_options(self.model, cache)
        probe, states = Probe(len(ids)), StateProbe(cache)
        self._set(PROBING, probe)
        with states.watching(self.model):
            self._logits(ids, torch.arange(len(ids), device=ids.device), torch.tensor([0], device=ids.device))
        if not probe.calls and (cache.num_updates or not states.calls):
            raise UnservableModelError(
                f"{type(self.model).__name__} computes attention by itself, not by transformers' interface for "
                "attention functions"
            )
        states.check([call.module for call in probe.calls])
        self._keepers = [
            StateKeeper(call, i, len(ids), place, self._steps)
            for i, (call, place) in enumerate(zip(states.calls, states.places, strict=True))
        ]
        self.states.extend(self._keepers)
        check_single_steps(states.calls, cache, len(ids))
        self._attention = PagedAttention(probe.calls)
        self.attentions.extend(self._attention.layers)

    def _run_in_pieces(self, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
        """As ``_run_plain``, through the cache, both sequences in one batch."""
        specs = {layer.layer_id: layer.cache_spec() for layer in self._attention.layers}
        groups = [CacheGroup(spec, (layer_id,)) for layer_id, spec in specs.items()]
        device = str(sequences[0].device)
        pool = KVPool(groups, [sum(CHECKED_LENS)] * len(groups), device)
        kept_states = StateGroup(tuple((keeper.layer_id, keeper.state_spec()) for keeper in self._keepers))
        state_pool = StatePool(kept_states, len(sequences), device) if kept_states.layers else None
        attention = TorchAttention()
        logits: list[list[torch.Tensor]] = [[] for _ in sequences]
        starts = (0,) * len(sequences)
        for ends in CHECKED_PIECES:
            batch = check_batch(sequences, starts, ends, pool, attention, state_pool)
            attention.plan(batch)
            rows = torch.arange(batch.num_tokens, device=batch.input_ids.device)
            with self._attention.serving(batch), self._steps.serving(batch):
                pieces = self._logits(batch.input_ids, batch.positions, rows).split(batch.extend_seq_lens_cpu)
            for kept, piece in zip(logits, pieces, strict=True):
                kept.append(piece)
            starts = ends
        return [torch.cat(pieces) for pieces in logits]

    def _logits(self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[N, vocab_size] float32, of tokens ``rows`` [N] among [T], by the model's own head and what follows it."""
        options: dict[str, Any] = {"logits_to_keep": rows} if self._takes_rows else {}
        if self._takes_positions:
            options["position_ids"] = positions[None] + self._first_position
        output = self.model(input_ids=input_ids[None], **options, **self._cache_options)
        logits = output.logits[0] if self._takes_rows else output.logits[0, rows]
        return logits[:, : self.vocab_size].float()

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        sample_rows, wanted = forward_batch.sample_rows, forward_batch.prompt_logprobs
        if not len(input_ids):
            return LogitsProcessorOutput(torch.empty(0, self.vocab_size, device=input_ids.device), [])
        rows = torch.cat((sample_rows, *(row.token_rows for row in wanted)))
        with self._attention.serving(forward_batch), self._steps.serving(forward_batch):
            logits = self._logits(input_ids, positions, rows)
        next_token_logits, *pieces = logits.split([len(sample_rows), *(len(row.token_rows) for row in wanted)])
        return LogitsProcessorOutput(
            next_token_logits, [_prompt_logprobs(row, piece) for row, piece in zip(wanted, pieces, strict=True)]
        )


def _prompt_logprobs(row: "LogprobRow", logits: torch.Tensor) -> Logprobs:
    """``logits``: [tokens of the row, vocab_size]."""
    pieces = iter(logits.split(ROWS_PER_PIECE))
    return prompt_logprobs(row, lambda token_rows: next(pieces))


EntryClass = TransformersForCausalLM
