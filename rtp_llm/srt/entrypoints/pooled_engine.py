"""The engine's methods for pooled outputs: ``encode``, ``score``, ``rerank`` and ``classify``."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict, Unpack

from rtp_llm.srt.configs.model_config import ModelConfig
from rtp_llm.srt.entrypoints.frontend import Call, Result, Results, run_in_thread
from rtp_llm.srt.managers.detokenizer import Completion
from rtp_llm.srt.managers.engine_client import Client
from rtp_llm.srt.managers.pooled import PooledCompletion, PooledRequests, PoolingOptions, PoolingPrompt
from rtp_llm.srt.managers.scoring import Scoring, Sides, classified, labels_of, ranked, scoring
from rtp_llm.srt.pooling import PooledOutput
from rtp_llm.srt.sampling_params import InvalidRequest

WINDOW = 64  # inputs that are encoded before the core begins with them, while the next ones are encoded


class Ranked(TypedDict):
    """A document of ``rerank``."""

    index: int
    document: str
    relevance_score: float


class PooledMethods(ABC):
    """Base of Engine."""

    model_config: ModelConfig
    _client: Client
    _pooled: PooledRequests

    @abstractmethod
    def _check_process(self) -> None: ...

    @abstractmethod
    def _collect(self, call: Call) -> Results: ...

    @abstractmethod
    def _collect_all(self, calls: Iterable[Call]) -> list[Result]: ...

    @abstractmethod
    async def _collect_async(self, call: Call) -> Results: ...

    @property
    def tasks(self) -> list[str]:
        """Names of the pooled outputs that the model has."""
        return self._pooled.manager.outputs.names

    def encode(
        self,
        prompt: str | Sequence[str] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        task: str = "embed",
        **options: Unpack[PoolingOptions],
    ) -> Results:
        """Make a pooled output of one input, or of each of a list: texts in ``prompt``, or ids in ``input_ids``.

        Args:
            task: one of ``engine.tasks``: "embed", "token_embed", "classify", "score", "reward", ...
            options: see PoolingOptions.

        Returns:
            For one input a dict, else a list of them: ``{"embedding": an array of float32, "meta_info": {"id",
            "finish_reason", "prompt_tokens", "cached_tokens", "e2e_latency", ...}}``. Of a task of tokens it is a list
            of arrays, one for each token. Both may be indexed as lists are, and ``numpy.asarray`` takes them. A request
            that fails by itself has None there, and ends with the finish reason ``abort`` and a message.

        Raises:
            InvalidRequest: the model has no such output, or an input or an option is wrong.
            EngineStopped: the engine was shut down, or failed: then with the cause.
        """
        self._check_process()
        prompts, is_list = self._pooled.prompts(task, prompt, input_ids, options)
        if any(each.has_media for each in prompts):
            prompts = run_in_thread(partial(self._with_media, prompts))
        windows = [prompts[start : start + WINDOW] for start in range(0, len(prompts), WINDOW)]
        calls = (Call(self._client, self._made(window), True) for window in windows)
        results = self._collect_all(calls)
        return results if is_list else results[0]

    async def async_encode(
        self,
        prompt: str | Sequence[str] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        task: str = "embed",
        **options: Unpack[PoolingOptions],
    ) -> Results:
        """Do the same as ``encode`` without blocking the event loop; cancelling it ends the requests."""
        self._check_process()
        prompts, is_list = self._pooled.prompts(task, prompt, input_ids, options)
        completions = self._made(await self._with_media(prompts))
        return await self._collect_async(Call(self._client, completions, is_list))

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        score_by: str | None = None,
        **options: Unpack[PoolingOptions],
    ) -> float | list[float]:
        """Return how well texts fit each other: one text with each of ``text_2``, or as many, each with its partner.

        By a model that has the output "score" (a cross-encoder), else by the cosine of an embedder's vectors.

        Args:
            score_by: the output that is compared: "score", "embed" (by cosine), "token_embed" (by MaxSim, the sum over
                tokens of ``text_1`` of the largest product of vectors), or "sparse" (by weights of equal tokens). None:
                the first of these that the model has.
            options: see PoolingOptions. ``normalize=False``: a cross-encoder's numbers before the sigmoid.

        Returns:
            A number for two texts, else a list of as many as ``text_2`` has.

        Raises:
            InvalidRequest: the model scores no texts, or a text or an option is wrong.
            RuntimeError: a request failed by itself.
            EngineStopped: the engine was shut down, or failed: then with the cause.
        """
        asked = self._scoring(Sides(_texts("text_1", text_1), _texts("text_2", text_2)), options, score_by)
        scores = self._scores(asked, self._run(asked))
        return scores[0] if isinstance(text_1, str) and isinstance(text_2, str) else scores

    async def async_score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        score_by: str | None = None,
        **options: Unpack[PoolingOptions],
    ) -> float | list[float]:
        """Do the same as ``score`` without blocking the event loop; cancelling it ends the requests."""
        asked = self._scoring(Sides(_texts("text_1", text_1), _texts("text_2", text_2)), options, score_by)
        scores = self._scores(asked, await self._run_async(asked))
        return scores[0] if isinstance(text_1, str) and isinstance(text_2, str) else scores

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        score_by: str | None = None,
        **options: Unpack[PoolingOptions],
    ) -> list[Ranked]:
        """Sort documents by how well they fit a query, best first.

        As ``score``; before an embedder's texts stand those that its checkpoint has for queries and documents, if any.

        Args:
            top_n: return so many of the best; None: all.
        """
        sides = _query_and_documents(query, documents, top_n)
        asked = self._scoring(sides, options, score_by)
        return _ranking(sides, self._scores(asked, self._run(asked)), top_n)

    async def async_rerank(
        self,
        query: str,
        documents: Sequence[str],
        top_n: int | None = None,
        score_by: str | None = None,
        **options: Unpack[PoolingOptions],
    ) -> list[Ranked]:
        """Do the same as ``rerank`` without blocking the event loop; cancelling it ends the requests."""
        sides = _query_and_documents(query, documents, top_n)
        asked = self._scoring(sides, options, score_by)
        return _ranking(sides, self._scores(asked, await self._run_async(asked)), top_n)

    def classify(
        self,
        prompt: str | Sequence[str] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        **options: Unpack[PoolingOptions],
    ) -> Results:
        """Classify one input, or each of a list, by a model that has the output "classify".

        Returns:
            For one input a dict, else a list of them: ``{"label": the most probable one's name in the checkpoint,
            "probs": a number for each label, "num_classes"}``.

        Raises:
            InvalidRequest, RuntimeError, EngineStopped: as ``score``.
        """
        self._check_process()
        completions, is_list = self._pooled.completions("classify", prompt, input_ids, options)
        self._collect(Call(self._client, completions, True))
        labelled = self._labelled([_output_of(item) for item in completions])
        return labelled if is_list else labelled[0]

    async def async_classify(
        self,
        prompt: str | Sequence[str] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        **options: Unpack[PoolingOptions],
    ) -> Results:
        """Do the same as ``classify`` without blocking the event loop; cancelling it ends the requests."""
        self._check_process()
        completions, is_list = self._pooled.completions("classify", prompt, input_ids, options)
        await self._collect_async(Call(self._client, completions, True))
        labelled = self._labelled([_output_of(item) for item in completions])
        return labelled if is_list else labelled[0]

    def _scoring(self, sides: Sides, options: Mapping[str, Any], score_by: str | None) -> Scoring:
        self._check_process()
        self._pooled.check_names(options)
        return scoring(self._pooled, sides, options, score_by)

    async def _with_media(self, prompts: Sequence[PoolingPrompt]) -> list[PoolingPrompt]:
        return [await self._pooled.with_media(prompt) for prompt in prompts]

    def _made(self, prompts: Sequence[PoolingPrompt]) -> list[Completion]:
        self._pooled.encode_together(prompts)
        return [self._pooled.completion(prompt) for prompt in prompts]

    def _run(self, asked: Scoring) -> list[PooledCompletion]:
        completions: list[PooledCompletion] = []
        for prompts in asked.rounds(completions):
            made = [self._pooled.completion(prompt) for prompt in prompts]
            self._collect(Call(self._client, list(made), True))
            completions += _with_outputs(made)
        return completions

    async def _run_async(self, asked: Scoring) -> list[PooledCompletion]:
        completions: list[PooledCompletion] = []
        for prompts in asked.rounds(completions):
            made = [self._pooled.completion(prompt) for prompt in prompts]
            await self._collect_async(Call(self._client, list(made), True))
            completions += _with_outputs(made)
        return completions

    def _scores(self, asked: Scoring, completions: Sequence[PooledCompletion]) -> list[float]:
        return asked.scores(completions)

    def _labelled(self, outputs: Sequence[PooledOutput]) -> list[dict[str, Any]]:
        labels = labels_of(self.model_config.hf_config, outputs[0].shape[-1]) if outputs else []
        return [classified(output, labels) for output in outputs]


def _texts(name: str, value: str | Sequence[str]) -> Sequence[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest(f"{name} must be a text or a list of texts, not {type(value).__name__}", name)
    return value


def _query_and_documents(query: str, documents: Sequence[str], top_n: int | None) -> Sides:
    if not isinstance(query, str):
        raise InvalidRequest(f"query must be a text, not {type(query).__name__}", "query")
    if isinstance(documents, str) or not isinstance(documents, Sequence):
        raise InvalidRequest(f"documents must be a list of texts, not {type(documents).__name__}", "documents")
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
        raise InvalidRequest(f"top_n must be a positive integer, not {top_n!r}", "top_n")
    return Sides([query], documents, ("query", "documents"), are_roles=True)


def _ranking(sides: Sides, scores: Sequence[float], top_n: int | None) -> list[Ranked]:
    return [
        {"index": index, "document": sides.right[index], "relevance_score": score}
        for index, score in ranked(scores, top_n)
    ]


def _with_outputs(completions: Sequence[PooledCompletion]) -> Sequence[PooledCompletion]:
    """Return them. Raise RuntimeError for a request that failed."""
    for completion in completions:
        _output_of(completion)
    return completions


def _output_of(completion: Any) -> PooledOutput:
    """Raise RuntimeError for a request that failed."""
    assert isinstance(completion, PooledCompletion)
    if completion.output is None:
        reason = completion.finish_reason
        raise RuntimeError((reason and reason.message) or "the request was ended before its output was made")
    return completion.output
