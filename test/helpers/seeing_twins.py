"""A tiny random checkpoint of each architecture that sees, as the test file of its model makes it."""

import test_mm_gemma3
import test_mm_gemma4
import test_mm_internvl
import test_mm_llava
import test_mm_mistral3
import test_mm_qwen2_5_vl
import test_mm_qwen2_vl
import test_mm_qwen3_vl
from mm_parity import VisionCase


def _case(cases: tuple[VisionCase, ...], name: str) -> VisionCase:
    return next(case for case in cases if case.name == name)


SEEING_TWINS: dict[str, VisionCase] = {
    "Gemma3ForConditionalGeneration": test_mm_gemma3.CASES[0],
    "Gemma4ForConditionalGeneration": test_mm_gemma4.CASES[0],
    "InternVLForConditionalGeneration": test_mm_internvl.CASES[0],
    "LlavaForConditionalGeneration": _case(test_mm_llava.CASES, "llava"),
    "LlavaNextForConditionalGeneration": _case(test_mm_llava.CASES, "llava-next"),
    "LlavaOnevisionForConditionalGeneration": _case(test_mm_llava.CASES, "llava-onevision"),
    "Mistral3ForConditionalGeneration": test_mm_mistral3.CASES[0],
    "Qwen2VLForConditionalGeneration": test_mm_qwen2_vl.CASES[0],
    "Qwen2_5_VLForConditionalGeneration": test_mm_qwen2_5_vl.CASES[0],
    "Qwen3VLForConditionalGeneration": _case(test_mm_qwen3_vl.CASES, "qwen3-vl"),
    "Qwen3VLMoeForConditionalGeneration": _case(test_mm_qwen3_vl.CASES, "qwen3-vl-moe"),
}
