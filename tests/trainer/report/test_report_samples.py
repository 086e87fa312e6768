"""Sentences and entries as the report shows them."""

import re
from html import unescape

from tests.trainer.report.run_files import sample
from trainer.report.markup import Html, join, tag
from trainer.report.samples import first_guess, helped, hidden_words, highlight, sentence


def plain(html: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", html))


def test_text_is_escaped_unless_it_is_html_already() -> None:
    assert tag("p", "a<b", Html("<i>"), None, class_='x"y') == '<p class="x&quot;y">a&lt;b<i></p>'
    assert join("&", 3) == "&amp;3"
    assert tag("meta", name="a", hidden=True, title=None) == '<meta name="a" hidden>'
    assert tag("p", "\ud800").encode() == b"<p>?</p>"


def test_the_sentence_reads_as_text_with_its_hidden_words_numbered() -> None:
    shown = sentence(sample(), sample()["masked"])
    assert plain(shown) == "lisbon2 lies by the tagus1."
    assert '<span class="masked told">us<sup>1</sup></span>' in shown
    assert '<span class="masked missed">lisbon<sup>2</sup></span>' in shown


def test_a_masked_token_is_shown_as_its_truth() -> None:
    masked = sample()
    masked["tokens"][1] = "[MASK]"
    assert plain(sentence(masked, masked["masked"])) == "lisbon2 lies by the tagus1."


def test_quotes_brackets_and_hyphens_close_up() -> None:
    tokens = ["[CLS]", "ada", "'", "s", "(", "1815", "-", "52", ")", "engine", ",", "x", "."]
    assert plain(sentence({"tokens": tokens}, [])) == "ada's (1815-52) engine, x."


def test_the_first_guess_is_the_most_probable() -> None:
    assert first_guess(sample()["masked"][0]) == "##us"
    assert first_guess({}) is None


def test_hidden_words_are_whole_and_found_again_only_whole() -> None:
    words = hidden_words(sample()["tokens"], sample()["masked"])
    assert words == ["lisbon", "tagus"]
    marked = highlight("Lisbon & lisboners, by the tagus", words)
    assert marked == "<mark>Lisbon</mark> &amp; lisboners, by the <mark>tagus</mark>"
    assert highlight("a < b", []) == "a &lt; b"


def test_what_the_memory_turned_right_is_counted() -> None:
    said = helped([sample()])
    assert said.startswith("Of the 2 hidden word pieces")
    assert "right for 1 with the memory and for 0 without" in said
