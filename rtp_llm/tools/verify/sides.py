"""The two compared models, each run on one prompt at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.configs.server_args import ServerArgs
from rtp_llm.srt.device.choice import choose_device
from rtp_llm.srt.engine.executor import InProcessExecutor
from rtp_llm.srt.layers.quantization.base import hidden_parameters
from rtp_llm.srt.models.registry import reason
from rtp_llm.srt.multimodal.items import Modality, MultimodalInputs
from rtp_llm.srt.multimodal.media_store import open_content
from rtp_llm.srt.pooling import PoolingSpec
from rtp_llm.srt.worker.worker import WorkerConfig
from rtp_llm.tools.auto_classes import computed, forget_last_prompt
from rtp_llm.tools.reference import TransformersModel
from rtp_llm.tools.step_driver import StepDriver
from rtp_llm.tools.verify.boundary_states import (
    State,
    StateLog,
    forget_states,
    mark_states,
    our_states,
    their_states,
)
from rtp_llm.tools.verify.feed import extras_for
from rtp_llm.tools.verify.options import VerifyError
from rtp_llm.tools.verify.pointer import constructions
from rtp_llm.tools.verify.prompts import Cuts, Prompt, cuts_of
from rtp_llm.tools.verify.trace import Trace


class ForwardError(RuntimeError):
    """Our model cannot compute; the cause is chained."""


class OurModel:
    """Our model in this process, one prompt at a time."""

    def __init__(self, args: ServerArgs, config: ModelConfig, max_len: int, max_rows: int = 1) -> None:
        """``max_rows``: how many prompts are computed together at most."""
        executor = InProcessExecutor(WorkerConfig(args, config, choose_device(args.device)))
        with constructions() as self.built, hidden_parameters():  # ``built``: the lines that build our modules
            num_groups = len(executor.load().layout.groups)
        num_pages = max_rows * -(-max_len // args.page_size)
        executor.init_cache([num_pages] * num_groups, max_rows, max_len, num_state_slots=max_rows + 1)
        self._spare_slot = max_rows + 1
        self._runner = executor.worker.runner
        self._driver = StepDriver(executor, num_groups, args.page_size)

    @property
    def model(self) -> nn.Module:
        return self._runner.model

    def cut_of(self, prompt: Prompt, cut_len: Cuts) -> Cuts:
        """Return ``cut_len``, or less if that would cut an image that the model computes at once."""
        if prompt.media is None or not self._runner.max_media_block:
            return cut_len
        blocks = prompt.media.blocks
        cuts = [next((first for first, last in blocks if first < cut <= last), cut) for cut in cuts_of(cut_len)]
        return tuple(dict.fromkeys(cut for cut in cuts if cut))

    @contextmanager
    def images_one_by_one(self) -> Iterator[None]:
        """Have the model encode each item by itself within the context, not all of a step together."""
        methods = {name: getattr(self.model, name, None) for name in (f"get_{each.value}_feature" for each in Modality)}
        encoders = {name: method for name, method in methods.items() if method is not None}
        for name, encode in encoders.items():
            one_by_one = lambda items, encode=encode: torch.cat([encode([item]) for item in items])  # noqa: E731
            setattr(self.model, name, one_by_one)
        try:
            yield
        finally:
            for name in encoders:
                delattr(self.model, name)

    def run(
        self,
        prompt: Prompt,
        cut_len: Cuts,
        num_new: int,
        trace: Trace | None = None,
        states: StateLog | None = None,
        forgets: bool = False,
    ) -> tuple[list[int], torch.Tensor]:
        """Return ``num_new`` ids, and logits [rows, vocab_size] float32: after ``cut_len`` tokens, the prompt, and each
        id but the last. A trace records the prompt's steps; ``states`` gets what is kept after each of its pieces.
        Images are encoded again. ``forgets``: set all states to zero after the first piece."""
        if prompt.media is not None and (problem := prompt.media.too_long_for(self._runner.max_media_block)):
            raise ForwardError(f"the engine refuses the prompt {prompt.text!r}: {problem}")
        self._runner.embedding_cache.clear()
        self._driver.start([prompt.ids], num_new, [prompt.media])
        ids = prompt.ids
        ends = [*cuts_of(cut_len), len(ids)]
        pieces = list(zip([0, *ends], ends, strict=False))
        pieces += [(len(ids) + i, len(ids) + i + 1) for i in range(num_new - 1)]
        output_ids, logits = [], []
        for start, end in pieces:
            with trace.step(start, end - start) if trace and end <= len(ids) else _no_trace():
                token_id, row = self._step(end - start)
            logits.append(row)
            if states is not None and self._runner.states is not None and end <= len(ids):
                states.ours[end] = our_states(self.model, self._runner.states.pool)
            if forgets and start == 0 and self._runner.states is not None:
                forget_states(self.model, self._runner.states.pool)
            if end >= len(ids):
                output_ids.append(token_id)
        return output_ids, torch.cat(logits)

    def unstored(self, prompt: Prompt, cut_len: Cuts) -> tuple[State, int, int] | None:
        """Return the first state that a piece of a prompt does not store, and the piece's tokens [start, end); None:
        all are stored by each piece."""
        if self._runner.states is None:
            return None
        pool, ends = self._runner.states.pool, [*cuts_of(cut_len), len(prompt.ids)]
        self._driver.start([prompt.ids], 1, [prompt.media])
        for start, end in pairwise([0, *ends]):
            mark_states(self.model, pool, self._spare_slot)
            self._driver.step_from([end - start], self._spare_slot)
            if state := next((state for state in our_states(self.model, pool) if state.is_marked), None):
                return state, start, end
        return None

    def run_together(self, prompts: Sequence[Prompt], trace: Trace) -> None:
        """Record prompts without media that are computed in one step, each in a row of its own."""
        self._runner.embedding_cache.clear()
        self._driver.start([prompt.ids for prompt in prompts], 1)
        with trace.step(0, trace.num_tokens):
            self._driver.step([len(prompt.ids) for prompt in prompts])

    def pool(self, prompt: Prompt, task: str, trace: Trace | None = None) -> torch.Tensor:
        """Return a pooled output, its numbers before the last function: one line [width], or [tokens, width]. A trace
        records the step."""
        with trace.step(0, len(prompt.ids)) if trace else _no_trace():
            try:
                output = self._driver.pool(prompt.ids, PoolingSpec(task, normalize=False))
            except Exception as error:  # of any kind; the cause is chained
                raise ForwardError(f"{type(self.model).__name__} fails while it computes: {reason(error)}") from error
        return torch.frombuffer(bytearray(output.data), dtype=torch.float32).reshape(output.shape)

    def _step(self, num_tokens: int) -> tuple[int, torch.Tensor]:
        try:
            result, logits = self._driver.step_with_logits([num_tokens])
        except Exception as error:  # of any kind; the cause is chained
            raise ForwardError(f"{type(self.model).__name__} fails while it computes: {reason(error)}") from error
        if result.rows[0].error is not None:
            return int(logits[0].nan_to_num().argmax()), logits
        return result.rows[0].token_ids[0], logits


@contextmanager
def _no_trace() -> Iterator[None]:
    yield


class TheirModel:
    """Transformers' model, with its own cache."""

    def __init__(self, args: ServerArgs, config: ModelConfig) -> None:
        try:
            reference = TransformersModel(config.model_path, config.dtype, args.device, args.trust_remote_code)
        except (ValueError, KeyError, AttributeError, ImportError) as error:
            cause = reason(error) if isinstance(error, KeyError) else str(error).strip()  # its text is the key alone
            raise VerifyError(f"there is nothing to compare {', '.join(config.architectures)} with: {cause}") from error
        self.model = reference.model

    @torch.inference_mode()
    def run(
        self,
        prompt: Prompt,
        cut_len: Cuts,
        output_ids: list[int],
        trace: Trace | None = None,
        states: StateLog | None = None,
    ) -> torch.Tensor:
        """Return logits like ``OurModel.run``, with these output ids after the prompt. ``states`` gets what is kept
        after the prompt; see ``add_states_at_cut``."""
        ids, extras = prompt.ids, {}
        if prompt.media is not None:
            extras = extras_for(self.model, ids, MultimodalInputs.decode(open_content(prompt.media.content)))
        forget_last_prompt(self.model)
        with trace.step(0, len(ids)) if trace else _no_trace():
            logits, cache = computed(self.model, ids, **extras)
        if states is not None:
            states.theirs[len(ids)] = their_states(cache)
        rows = [logits[:, end - 1] for end in (*cuts_of(cut_len), len(ids))]
        for token_id in output_ids[:-1]:
            logits, cache = computed(self.model, [token_id], cache)
            rows.append(logits[:, -1])
        return torch.cat(rows).float().cpu()

    @torch.inference_mode()
    def add_states_at_cut(self, prompt: Prompt, cut_len: Cuts, states: StateLog) -> None:
        """Add what is kept after each piece but the last of a prompt without media, its tokens computed at once."""
        for end in cuts_of(cut_len):
            if prompt.media is None and end < len(prompt.ids) and states.ours.get(end):
                forget_last_prompt(self.model)
                _, cache = computed(self.model, prompt.ids[:end])
                states.theirs[end] = their_states(cache)
