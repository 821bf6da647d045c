"""One count of tokens for chunks and prompts."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from semantic_text_splitter import TextSplitter

from pipeline.errors import ConfigError
from stages.prompt import INSTRUCTIONS
from stages.tokens import estimate, token_count


def real_count(text: str, model: str) -> int:
    """Return the true number of tokens, out of the vocabularies that the splitter carries inside."""
    low, high = 1, len(text.encode())
    while low < high:
        middle = (low + high) // 2
        if len(TextSplitter.from_tiktoken_model(model, middle, trim=False).chunks(text)) <= 1:
            high = middle
        else:
            low = middle + 1
    return low


ENGLISH = (
    INSTRUCTIONS,
    str(json.__doc__),
    str(Path.__doc__),
    str(str.__doc__) + str(dict.__doc__),
)
OTHER = (
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",  # noqa: RUF001 - it is Russian
    "\u4eba\u4eba\u751f\u800c\u81ea\u7531,\u5728\u5c0a\u4e25\u548c\u6743\u5229\u4e0a\u4e00\u5f8b\u5e73\u7b49\u3002",
)


@pytest.mark.parametrize("model", ["gpt-4", "gpt-4o"])
@pytest.mark.parametrize("text", ENGLISH + OTHER)
def test_estimate_errs_on_the_safe_side(text: str, model: str) -> None:
    """A text never has more tokens for the vocabularies of today than the estimate says."""
    assert estimate(text) >= real_count(text, model)


@pytest.mark.parametrize("text", [text for text in ENGLISH if len(text) > 200])
def test_estimate_wastes_less_than_half_on_english(text: str) -> None:
    """What is lost to caution stays below the size of the text itself."""
    assert estimate(text) <= 2 * real_count(text, "gpt-4")


@given(st.text(max_size=200), st.text(max_size=200))
def test_estimate_of_a_whole_is_no_more_than_that_of_its_parts_and_no_less_than_either(left: str, right: str) -> None:
    """The splitter searches by halving, which needs a count that grows with the text."""
    whole = estimate(left + right)
    assert max(estimate(left), estimate(right)) <= whole + 1
    assert whole <= estimate(left) + estimate(right) + 1


@given(st.text())
def test_estimate_is_zero_only_without_signs(text: str) -> None:
    """Whatever a reader can see costs something."""
    assert estimate(text) > 0 or not text.strip()


def test_tokenizer_file_decides_the_count(tmp_path: Path) -> None:
    """With a tokenizer.json the count is that tokenizer's own, truncation and special tokens aside."""
    tokenizers = pytest.importorskip("tokenizers", reason="the optional package tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "water": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    count = token_count(str(tmp_path / "tokenizer.json"))
    assert count("water under the bridge of sighs") == 6


def test_missing_tokenizer_file_is_the_operators_matter(tmp_path: Path) -> None:
    """The message names the file and the setting."""
    pytest.importorskip("tokenizers", reason="the optional package tokenizers")
    with pytest.raises(ConfigError, match=r"retriever.tokenizer .* no file .*nowhere.json"):
        token_count(str(tmp_path / "nowhere.json"))


def test_broken_tokenizer_file_is_the_operators_matter(tmp_path: Path) -> None:
    """The message says that the file is no tokenizer."""
    pytest.importorskip("tokenizers", reason="the optional package tokenizers")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        token_count(str(tmp_path / "tokenizer.json"))


def test_missing_package_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a tokenizer without the extra is told how to get it."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'penstock\[tokenizers\]'"):
        token_count("/models/tokenizer.json")
