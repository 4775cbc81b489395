"""How well texts fit each other: by a model that reads pairs, or by the vectors or weights of one that embeds.

    scoring(requests, sides, options) -> Scoring, whose rounds of prompts are computed -> its scores -> ranked

What Python's ``Engine.score`` and ``rerank`` share with the endpoints.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import mul
from typing import Any, cast

from rtp_llm.srt.managers.generate_options import per_prompt
from rtp_llm.srt.managers.pooled import PooledCompletion, PooledRequests, PoolingOptions, PoolingPrompt
from rtp_llm.srt.pooling import PooledOutput, PooledOutputs
from rtp_llm.srt.sampling_params import InvalidRequest

SCORE, EMBED, TOKEN_EMBED, SPARSE = "score", "embed", "token_embed", "sparse"
BY = (
    SCORE,
    EMBED,
    TOKEN_EMBED,
    SPARSE,
)  # the outputs that can be compared; the first that a model has is, unless asked
# Names of sentence-transformers' prompts for what is asked and what is searched, the first that a checkpoint has.
ROLES = (("query",), ("document", "passage", "corpus"))


@dataclass(frozen=True, slots=True)
class Sides:
    """The texts to compare: each of ``left`` with its partner in ``right``, or the only one of ``left`` with each.

    ``names``: how the caller calls them, for errors. ``are_roles``: the left ones are queries and the right ones
    documents, before which an embedder's checkpoint may put texts of its own.
    """

    left: Sequence[Any]
    right: Sequence[Any]
    names: tuple[str, str] = ("text_1", "text_2")
    are_roles: bool = False

    def check(self) -> None:
        """Raise InvalidRequest unless they are texts that pair up."""
        for name, texts in zip(self.names, (self.left, self.right), strict=True):
            if not texts:
                raise InvalidRequest(f"{name} is empty: there must be at least one text", name)
            for i, text in enumerate(texts):
                if not isinstance(text, str):
                    raise InvalidRequest(f"{self.place(name, i)} must be a text, not {type(text).__name__}", name)
        if len(self.left) not in (1, len(self.right)):
            raise InvalidRequest(
                f"{self.names[0]} has {len(self.left)} texts and {self.names[1]} {len(self.right)}: give one of the "
                "first, or as many as of the second",
                self.names[0],
            )

    def place(self, name: str, i: int) -> str:
        """Return how an error names a text."""
        return f"{name} {i}" if len(self.right if name == self.names[1] else self.left) > 1 else name


@dataclass(frozen=True, slots=True)
class Scoring:
    """Prompts whose outputs make scores.

    Attributes:
        by: the output that is compared.
        prompts: pairs, or the left texts, and then the right ones unless they follow.
        num_left: how many of the prompts are left texts.
        later: with TOKEN_EMBED, the prompts of the right texts, which need the left ones' outputs.
        left_out: ids of tokens without weight.
    """

    by: str
    prompts: list[PoolingPrompt]
    num_left: int = 0
    later: list[PoolingPrompt] = field(default_factory=list)
    left_out: frozenset[int] = frozenset()

    def rounds(self, completions: Sequence[PooledCompletion]) -> Iterator[list[PoolingPrompt]]:
        """Yield prompts to compute one after the other. ``completions``: those of earlier prompts, to which the caller
        adds after each round; they have their output."""
        yield self.prompts
        if self.later:
            queries = [completion.output for completion in completions]
            yield [replace(prompt, against=queries[self._left_of(i)]) for i, prompt in enumerate(self.later)]

    def scores(self, completions: Sequence[PooledCompletion]) -> list[float]:
        """Return the score of each pair, from the completions of all prompts in order, which have their output."""
        right = completions[self.num_left :]
        if self.by in (SCORE, TOKEN_EMBED):
            return [_output(completion).numbers()[0] for completion in right]
        if self.by == EMBED:
            vectors = [_output(completion).numbers() for completion in completions[: self.num_left]]
            return [cosine(vectors[self._left_of(i)], _output(item).numbers()) for i, item in enumerate(right)]
        weights = [weights_of(completion, self.left_out) for completion in completions[: self.num_left]]
        return [overlap(weights[self._left_of(i)], weights_of(item, self.left_out)) for i, item in enumerate(right)]

    def _left_of(self, i: int) -> int:
        return i if self.num_left > 1 else 0


def _output(completion: PooledCompletion) -> PooledOutput:
    assert completion.output is not None
    return completion.output


def scores_by(outputs: PooledOutputs, asked: str | None = None) -> str:
    """Return the output of a model by which texts are compared.

    Args:
        asked: which it shall be.

    Raises:
        InvalidRequest: the model has none, or not that.
    """
    have = f"it has {', '.join(outputs.names)}" if outputs.names else "it has none"
    if asked is not None:
        if asked not in BY or outputs.find(asked) is None:
            raise InvalidRequest(
                f"texts are scored by one of the outputs {', '.join(BY)} that the model has, not by {asked!r}; {have}",
                "score_by",
            )
        return asked
    for task in BY:
        if outputs.find(task) is not None:
            return task
    raise InvalidRequest(
        "this model scores no texts: that is for a ...ForSequenceClassification of one label (a cross-encoder), which "
        f"has the output 'score', or for a model that embeds, by the cosine of vectors; {have}",
        "model",
    )


def scoring(requests: PooledRequests, sides: Sides, options: Mapping[str, Any], score_by: str | None = None) -> Scoring:
    """Return what is to be computed to score pairs of texts.

    Args:
        options: of PoolingOptions, each one value for all pairs; of a model of pairs also a list of one for each.
            ``rid`` is one name, to which the requests' numbers are added.
        score_by: the output by which they are compared; None: the first of BY that the model has.

    Raises:
        InvalidRequest: the model cannot do it, or a text or an option is wrong.
    """
    by = scores_by(requests.manager.outputs, score_by)
    sides.check()
    if by != SCORE:
        if options.get("normalize") is False:
            raise InvalidRequest(
                "this model compares vectors by their cosine: raw numbers are for models of pairs", "normalize"
            )
        prompts = _vectors(requests, sides, options, by)
        split = len(sides.left) if by == TOKEN_EMBED else len(prompts)
        return Scoring(by, prompts[:split], len(sides.left), prompts[split:], requests.special_ids)
    columns = {name: per_prompt(name, value, len(sides.right)) for name, value in options.items() if name != "rid"}
    rids = _rids(options, len(sides.right))
    prompts = []
    for i, text in enumerate(sides.right):
        own: dict[str, Any] = {name: column[i] for name, column in columns.items()}
        own |= {"text_pair": text, "rid": rids[i]}
        first = sides.left[i if len(sides.left) > 1 else 0]
        place = sides.place(sides.names[1], i)
        prompts.append(PoolingPrompt(SCORE, text=first, options=cast(PoolingOptions, own), place=place))
    return Scoring(SCORE, prompts)


def _vectors(requests: PooledRequests, sides: Sides, options: Mapping[str, Any], task: str) -> list[PoolingPrompt]:
    """Return the prompts of an embedder: the left texts, then the right ones."""
    for name, value in options.items():
        if isinstance(value, (list, tuple)):
            raise InvalidRequest(f"{name} must be one value: this model compares vectors", name)
    rids = _rids(options, len(sides.left) + len(sides.right))
    known = requests.sentences.prompts
    prompts: list[PoolingPrompt] = []
    for name, texts, roles in zip(sides.names, (sides.left, sides.right), ROLES, strict=True):
        role = next((role for role in roles if role in known), None) if sides.are_roles else None
        for i, text in enumerate(texts):
            own: dict[str, Any] = {"prompt_name": role, **options, "normalize": True, "rid": rids[len(prompts)]}
            place = sides.place(name, i)
            prompts.append(PoolingPrompt(task, text=text, options=cast(PoolingOptions, own), place=place))
    return prompts


def _rids(options: Mapping[str, Any], count: int) -> list[Any]:
    """Return a name for each request; of one name for several, numbered ones."""
    rid = options.get("rid")
    return [rid] if count == 1 else [None if rid is None else f"{rid}-{i}" for i in range(count)]


def first_tokens(requests: PooledRequests, text: str, count: int) -> str:
    """Return the text of a text's first tokens, special ones not counted; the text itself if it has no more.

    Raises:
        InvalidRequest: the text cannot be encoded.
    """
    ids, _ = requests.manager.encode_input(text, None, False, count + 1)
    return text if len(ids) <= count else requests.manager.decode(ids[:count]).rstrip("\ufffd")  # half a character


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the cosine of two vectors of length one (or zero), in [-1, 1]."""
    return max(-1.0, min(1.0, sum(map(mul, a, b))))


def weights_of(completion: PooledCompletion, left_out: frozenset[int]) -> dict[int, float]:
    """Return id -> weight, of those above zero, from an output ``sparse``: a weight for each token of the input, of
    which the largest of equal ones counts, or for each of the vocabulary.

    Args:
        left_out: tokens of the input without weight: special ones.
    """
    output = _output(completion)
    numbers = output.numbers()
    if len(output.shape) == 1:
        return {token: weight for token, weight in enumerate(numbers) if weight > 0}
    return token_weights(completion.request.prompt_ids, numbers, left_out)


def token_weights(ids: Sequence[int], weights: Sequence[float], left_out: frozenset[int]) -> dict[int, float]:
    """Return each token's largest weight, of those above zero."""
    largest: dict[int, float] = {}
    for token, weight in zip(ids, weights, strict=True):
        if token not in left_out and weight > largest.get(token, 0.0):
            largest[token] = weight
    return largest


def overlap(a: Mapping[Any, float], b: Mapping[Any, float]) -> float:
    """Return the sum over equal tokens of the product of their weights."""
    return sum(weight * b[token] for token, weight in a.items() if token in b)


def ranked(scores: Sequence[float], top_n: int | None = None) -> list[tuple[int, float]]:
    """Return ``(index, score)`` by falling score, equal ones by index; at most ``top_n`` of them."""
    order = sorted(enumerate(scores), key=lambda item: -item[1])
    return order if top_n is None else order[:top_n]


def labels_of(config: Any, num_labels: int) -> list[str]:
    """Return the names of a classifier's labels by the checkpoint's ``id2label``; LABEL_3 where one has none."""
    named: Mapping[Any, Any] = getattr(config, "id2label", None) or {}
    return [str(named.get(i, named.get(str(i), f"LABEL_{i}"))) for i in range(num_labels)]


def classified(output: PooledOutput, labels: Sequence[str]) -> dict[str, Any]:
    """Return ``{"label", "probs", "num_classes"}`` of a classifier's output; the label is the most probable one's."""
    probs = output.numbers().tolist()
    best = max(range(len(probs)), key=probs.__getitem__)
    return {"label": labels[best], "probs": probs, "num_classes": len(probs)}
