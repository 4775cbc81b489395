"""Which GGUF of a folder or a repository is meant."""

import pytest

from rtp_llm.srt.gguf.choice import ChoiceError, choose

REPOSITORY = [
    "README.md",
    "Zeta-7B-Q4_K.gguf",
    "Zeta-7B-Q4_K_M.gguf",
    "Zeta-7B-Q4_K_S.gguf",
    "Zeta-7B-IQ4_NL.gguf",
    "Zeta-7B.Q8_0.gguf",
    "zeta_7b_f16.gguf",
    "BF16/Zeta-7B-BF16-00002-of-00002.gguf",
    "BF16/Zeta-7B-BF16-00001-of-00002.gguf",
    "mmproj-Zeta-7B-f32.gguf",
    "imatrix.gguf",
]
PARTS = ["BF16/Zeta-7B-BF16-00001-of-00002.gguf", "BF16/Zeta-7B-BF16-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("Q4_K_M", ["Zeta-7B-Q4_K_M.gguf"]),
        ("q4_k_m", ["Zeta-7B-Q4_K_M.gguf"]),
        ("Q4_K", ["Zeta-7B-Q4_K.gguf"]),
        ("Q8_0", ["Zeta-7B.Q8_0.gguf"]),
        ("F16", ["zeta_7b_f16.gguf"]),
        ("bf16", PARTS),
        ("Zeta-7B-Q4_K.gguf", ["Zeta-7B-Q4_K.gguf"]),
        (PARTS[1], PARTS),
        ("Zeta-7B-BF16.gguf", PARTS),
        ("zeta-7b-bf16-00001-of-00002.gguf", PARTS),
        ("mmproj-Zeta-7B-f32.gguf", ["mmproj-Zeta-7B-f32.gguf"]),  # refused later, by what it says of itself
    ],
)
def test_a_file_is_found_by_quantization_or_name(wanted, found):
    assert choose(REPOSITORY, wanted, "owner/name") == found


@pytest.mark.parametrize("wanted", ["Q4", "F32", "Q4_K_L", "other.gguf"])
def test_what_is_not_there_is_told_with_what_is(wanted):
    message = rf"owner/name: no GGUF file of it matches '{wanted}'. Name one .*owner/name:BF16.*Zeta-7B-Q4_K_M\.gguf"
    with pytest.raises(ChoiceError, match=message):
        choose(REPOSITORY, wanted, "owner/name")


def test_several_are_told():
    with pytest.raises(ChoiceError, match=r"^d: 2 of its GGUF files match 'Q8_0'.*\(d:Q8_0\), .*a-Q8_0.gguf, b-Q8_0.g"):
        choose(["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0", "d")
    with pytest.raises(ChoiceError, match=r"it has 7 GGUF files.*BF16/Zeta-7B-BF16.gguf, Zeta-7B-IQ4"):
        choose(REPOSITORY, None, "owner/name")


def test_without_a_wish_the_only_one_is_meant():
    assert choose(["x.gguf", "mmproj-x.gguf", "y.safetensors"], None, "d") == ["x.gguf"]
    assert choose(PARTS, None, "d") == PARTS


@pytest.mark.parametrize("names", [[], ["a.safetensors"], ["mmproj-a.gguf"]])
def test_nothing_to_choose_from(names):
    with pytest.raises(ChoiceError, match="d has no GGUF file of a language model"):
        choose(names, None, "d")
