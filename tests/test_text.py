"""Text from outside, on terminals and in Markdown."""

import html
import re

import pytest
from markdown_it import MarkdownIt

from mobilenet.text import clean, markdown


pytestmark = pytest.mark.any_version


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![image](https://example.org/x.png)",
    "[link](javascript:alert(1))",
    "<https://example.org>",
    "a | b",
    "`code` ``more``",
    "*stress* __strong__ ~~gone~~",
    "\\<b>bold\\</b>",
    "&lt;script&gt; &amp; $x^2$",
    "# heading",
    "tabby, tabby cat (Felis catus) - 100 %",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_text_as_it_is(text: str) -> None:
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    rendered = page.render(f"| label | accuracy |\n|---|---|\n| {markdown(text)} | 1 |\n")
    cells = re.findall(r"<td>(.*?)</td>", rendered, re.DOTALL)
    assert [html.unescape(cell) for cell in cells] == [text, "1"]
    assert "<" not in cells[0]


def test_one_line_stays_one_line() -> None:
    assert markdown("---\nlicense: mit\r\n\u2028---\x1b[31m") == "---�license: mit���---�\\[31m"


def test_terminals_get_nothing_to_obey() -> None:
    assert clean("a\x1b[2Jb\x9b31mc\u202ed\x07e\tf\ng") == "a�[2Jb�31mc�d�e�f�g"
    assert clean("Grüße, 猫 🐈 [bold]") == "Grüße, 猫 🐈 [bold]"
