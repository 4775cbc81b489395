"""Write docs/sampling_parameters.md from the fields of SamplingParams.

python scripts/sampling_parameters.py
"""

import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rtp_llm.srt.entrypoints.openai.protocol import GenerationBody
from rtp_llm.srt.sampling_params import SamplingParams

PAGE = ROOT / "docs" / "sampling_parameters.md"
OTHER_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}  # of OpenAI's endpoints
HEAD = """# Sampling parameters

Written by `scripts/sampling_parameters.py` from `SamplingParams`; do not edit by hand. `Engine.generate` and
`/generate` take all of them in `sampling_params`; OpenAI's endpoints take those with a name in the second column.

In every step, and for each request by itself, they are applied to the logits in this order:

1. `frequency_penalty` and `presence_penalty`, over generated tokens; then `repetition_penalty`, over prompt and output;
2. `logit_bias`;
3. `allowed_token_ids`, then `bad_words`;
4. the ban of end tokens before `min_new_tokens`;
5. with `temperature` 0, `top_k` 1 or `top_p` 0, the most probable token is taken. Otherwise logits are divided by
   `temperature`, then `top_k`, `top_p` (among what `top_k` leaves) and `min_p` drop tokens, and one of the rest is
   drawn.

Log-probabilities are those of the model, before all this.

| parameter | OpenAI's endpoints | default | meaning |
|---|---|---|---|
"""


def page() -> str:
    return HEAD + "".join(f"{_row(item)}\n" for item in fields(SamplingParams))


def _row(item: Field) -> str:
    name = OTHER_NAMES.get(item.name, item.name)
    theirs = f"`{name}`" if name in GenerationBody.model_fields else ""
    default = "unset" if item.default is None else "none" if item.default is MISSING else f"`{item.default}`"
    return f"| `{item.name}` | {theirs} | {default} | {item.metadata['help']} |"


if __name__ == "__main__":
    PAGE.write_text(page())
