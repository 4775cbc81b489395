"""Media in a prompt: placeholders in its text, positions in its ids."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from rtp_llm.srt.multimodal.hf_processor import tokenizer_of
from rtp_llm.srt.multimodal.items import Modality, MultimodalDataItem
from rtp_llm.srt.multimodal.processor_output import rows_of_each
from rtp_llm.srt.sampling_params import InvalidRequest


@dataclass
class MultimodalSpecialTokens:
    """The placeholders of a model's prompts.

    ``X_token`` is the placeholder for one item in a prompt, ``X_token_id`` the id at the positions of its
    embedding after replacement; in most models they are the same token. ``X_token_regex`` finds placeholders in
    texts; unset: the token itself.
    """

    image_token: str | None = None
    video_token: str | None = None
    audio_token: str | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    image_token_regex: re.Pattern[str] | str | None = None
    video_token_regex: re.Pattern[str] | str | None = None
    audio_token_regex: re.Pattern[str] | str | None = None
    combined_regex: re.Pattern[str] | str | None = None

    def build(self, processor: Any) -> Self:
        """Fill in tokens from ids, ids from tokens, and the regular expressions; return self."""
        tokenizer = tokenizer_of(processor)
        for modality in Modality.all():
            token, token_id = self.token_of(modality), self.get_token_id_by_modality(modality)
            if token is None and token_id is not None:
                token = tokenizer.convert_ids_to_tokens(token_id)
            elif token is not None and token_id is None:
                token_id = known_id(tokenizer, token)
            self._set(modality, "token", token)
            self._set(modality, "token_id", token_id)
            regex = self.regex_of(modality)
            self._set(modality, "token_regex", re.compile(re.escape(token)) if regex is None and token else regex)
        self.combined_regex = self.get_combined_regex()
        return self

    def get_combined_regex(self) -> re.Pattern[str]:
        """Return a pattern that splits a text into placeholders and the text between them."""
        regexes = [regex.pattern for modality in Modality.all() if (regex := self.regex_of(modality))]
        default = f"({'|'.join(f'(?:{regex})' for regex in regexes)})" if regexes else "((?!))"
        return re.compile(self.combined_regex or default)

    def get_modality_of_token(self, token: str) -> Modality | None:
        """Return the kind of media that this text is a placeholder for; None: it is no placeholder."""
        for modality in Modality.all():
            regex = self.regex_of(modality)
            if token == self.token_of(modality) or (regex is not None and regex.fullmatch(token)):
                return modality
        return None

    def get_token_id_by_modality(self, modality: Modality) -> int | None:
        return getattr(self, f"{modality.value}_token_id")

    def token_of(self, modality: Modality) -> str | None:
        return getattr(self, f"{modality.value}_token")

    def regex_of(self, modality: Modality) -> re.Pattern[str] | None:
        regex = getattr(self, f"{modality.value}_token_regex")
        return None if regex is None else re.compile(regex)

    def placeholder_id(self, modality: Modality, tokenizer: Any) -> int | None:
        """Return the placeholder's id; None: it is not a single token, or there is none."""
        token = self.token_of(modality)
        return None if token is None else known_id(tokenizer, token)

    def num_placeholders(self, prompt: str | list[int], modality: Modality, tokenizer: Any) -> int:
        if isinstance(prompt, str):
            return sum(self.get_modality_of_token(part) is modality for part in split_text(prompt, self))
        token_id = self.placeholder_id(modality, tokenizer)
        if token_id is None and self.token_of(modality) is not None:
            return self.num_placeholders(tokenizer.decode(prompt), modality, tokenizer)
        return sum(given == token_id for given in prompt)

    def fill(self, modality: Modality, tokenizer: Any) -> str:
        """Return the token at the positions of embeddings.

        Raises:
            InvalidRequest: the model takes no such media.
        """
        token_id = self.get_token_id_by_modality(modality)
        if token_id is None:
            raise InvalidRequest(f"this model takes no {modality.value}", f"{modality.value}_data")
        return tokenizer.convert_ids_to_tokens(token_id)

    def _set(self, modality: Modality, name: str, value: Any) -> None:
        setattr(self, f"{modality.value}_{name}", value)


def split_text(text: str, mm_tokens: MultimodalSpecialTokens) -> list[str]:
    """Split a text into placeholders and the text between them, in order."""
    parts, end = [], 0
    for match in mm_tokens.get_combined_regex().finditer(text):
        parts += [text[end : match.start()], match.group()]
        end = match.end()
    return [part for part in (*parts, text[end:]) if part]


def check_counts(modality: Modality, num_placeholders: int, num_given: int) -> None:
    """Raise InvalidRequest if there are not as many placeholders as media."""
    if num_placeholders != num_given:
        name = modality.value
        raise InvalidRequest(
            f"Prompt has {num_placeholders} {name} placeholders but {num_given} {name} inputs were provided",
            f"{name}_data",
        )


def known_id(tokenizer: Any, token: str) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(token)
    return None if token_id == getattr(tokenizer, "unk_token_id", None) and token != tokenizer.unk_token else token_id


def runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending positions as runs (first, last), inclusive."""
    breaks = [i for i, (one, other) in enumerate(pairwise(positions), 1) if other != one + 1]
    bounds = [0, *breaks, len(positions)]
    return [(positions[start], positions[end - 1]) for start, end in pairwise(bounds) if start < end]


def runs_of(ids: Sequence[int], token_id: int | None) -> list[tuple[int, int]]:
    """Return runs (first, last) of positions that hold this id."""
    return runs([position for position, given in enumerate(ids) if given == token_id])


def place(items: list[MultimodalDataItem], found: list[tuple[int, int]]) -> list[MultimodalDataItem]:
    """Set the items' offsets from the runs of their token: one run each, or by their grids' sizes. If neither
    works, join all items into one at all runs."""
    if len(items) == 1:
        items[0].offsets = found
        return items
    positions = [position for first, last in found for position in range(first, last + 1)]
    rows = [sum(rows_of_each(item) or [0]) for item in items]
    if all(rows) and all(len(positions) * count % sum(rows) == 0 for count in rows):
        start = 0
        for item, count in zip(items, rows, strict=True):
            end = start + len(positions) * count // sum(rows)
            item.offsets = runs(positions[start:end])
            start = end
    elif len(found) == len(items):
        for item, run in zip(items, found, strict=True):
            item.offsets = [run]
    else:
        raise InvalidRequest(
            f"the prompt has {len(found)} places for {len(items)} items of kind {items[0].modality.value}, which "
            "cannot be told apart",
            f"{items[0].modality.value}_data",
        )
    return items


def set_offsets(
    ids: Sequence[int],
    replaced: Sequence[tuple[MultimodalDataItem, str]],
    mm_tokens: MultimodalSpecialTokens,
    tokenizer: Any,
) -> None:
    """Assign positions of an embedding's token to the items in their order, to each as many as its replacement
    has."""
    fill_ids = {item.modality: mm_tokens.get_token_id_by_modality(item.modality) for item, _ in replaced}
    for fill_id in set(fill_ids.values()):
        positions = [position for position, token_id in enumerate(ids) if token_id == fill_id]
        taken = 0
        for item, text in replaced:
            if fill_ids[item.modality] == fill_id:
                count = text.count(mm_tokens.fill(item.modality, tokenizer))
                item.offsets = runs(positions[taken : taken + count])
                taken += count
        if taken != len(positions):
            token = tokenizer.convert_ids_to_tokens(fill_id)
            raise InvalidRequest(
                f"the prompt holds the token {token} where no image or video is ({len(positions)} times, and "
                f"{taken} are theirs); it stands for media and cannot be used otherwise",
                "prompt",
            )


def check_rows(items: Sequence[MultimodalDataItem]) -> None:
    """Raise InvalidRequest if a prompt has no positions for an item, or not as many as its embedding has rows."""
    for item in items:
        rows = None if item.precomputed_embeddings is None else len(item.precomputed_embeddings)
        if not item.num_tokens or rows not in (None, item.num_tokens):
            name = item.modality.value
            raise InvalidRequest(
                f"the prompt has {item.num_tokens} places for the given {name}"
                + ("" if rows is None else f", whose embedding has {rows} rows"),
                f"{name}_data",
            )
