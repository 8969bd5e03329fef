"""The page: what is served, and what a reader sees in a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cram.factories import QUESTIONS, image
from tests.cram.serve.http import browser
from tests.cram.serve.http.running import data_url, messages, serving

page = pytest.importorskip("cram.serve.http.page", reason="the server needs the extra `serve`")
EXAMPLES = [page.Example("old", QUESTIONS[0], image(0)), page.Example("other", QUESTIONS[1], image(1))]


def test_the_page_comes_whole_and_runs_nothing_but_its_own_files() -> None:
    with serving(examples=EXAMPLES) as (client, *_):
        status, html, headers = client.send("/")
        assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
        assert "script-src 'self'" in headers["content-security-policy"]
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", html)
        linked = re.findall(r"(?:src|href)=\"([^\"#:]+)\"", html)
        assert linked == ["page.css", "page.js"]
        for name in [*linked, "routing.js"]:
            status, _, headers = client.send(f"/{name}")
            assert status == 200 and headers["content-type"].startswith(("text/css", "text/javascript"))
        listed = client.send("/v1/cram/examples")[1]["data"]
        assert [each["question"] for each in listed] == list(QUESTIONS[:2])
        assert listed[0]["image"] == data_url(0)


CORNER = """
const context = document.createElement("canvas").getContext("2d");
context.drawImage(document.getElementById("picture"), 0, 0);
return [...context.getImageData(9, 9, 1, 1).data];
"""


@pytest.mark.skipif(browser.missing() is not None, reason=f"{browser.missing()} is not installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_reader_asks_and_sees_answer_route_and_base(width: int, tmp_path: Path) -> None:
    with serving(examples=EXAMPLES) as (client, *_), browser.chromium() as window:
        window.open(client.base, width)
        window.wait("return document.querySelectorAll('#examples button').length === 2")
        assert window.text("#status") == "3 experts"
        window.click("#examples li:nth-child(2) button")
        done = "return ['answer-time', 'base-time'].every(id => document.getElementById(id).textContent)"
        window.wait(done)
        asked = {"messages": messages(QUESTIONS[1], 1), "max_tokens": None}
        expected, bare = client.chat(**asked)[1], client.chat(**asked, model="base")[1]
        shown = window.run("return ['answer', 'base'].map(id => document.getElementById(id).textContent)")
        assert shown == [each["choices"][0]["message"]["content"] for each in (expected, bare)]
        assert shown[0] != shown[1]
        assert window.text("#group") == "Instruction group 1. The question and the picture chose 1 expert."
        names = window.run("return [...document.querySelectorAll('#gates th')].map(each => each.textContent)")
        assert names == ["other"]
        heights = "return [...document.querySelectorAll('#gates tr:first-child .bar')].map(b => b.getBBox())"
        mean, *layers = window.run(heights)
        assert mean["width"] == pytest.approx(100) and [each["height"] for each in layers] == [24, 24]
        assert window.run("return document.documentElement.scrollWidth") <= width
        # A file of the reader's own, with a question typed in and sent by the return key.
        own = image(2).resize((2000, 1000)).convert("RGBA")
        own.paste((0, 0, 0, 0), (0, 0, 400, 400))
        own.save(tmp_path / "own.png")
        window.click("#clear")
        assert window.run("return ['clear', 'picture'].every(id => document.getElementById(id).hidden)")
        window.run("document.getElementById('question').value = ''")
        window.click("#send")
        assert window.text("#status") == "Please write a question first."
        window.type("#file", str(tmp_path / "own.png"))
        window.wait("return document.getElementById('picture').naturalWidth === 1024")
        assert window.text("#status") == "3 experts" and window.run(CORNER) == [255] * 4
        window.type("#question", "How many?\ue007")
        window.wait(f"return document.getElementById('answer').textContent && ({done[7:]})")
        assert window.errors() == []
        # Faults are told in words.
        window.run("document.getElementById('question').value = 'see <image>'")
        window.click("#send")
        window.wait("return document.querySelectorAll('.answer.fault').length === 2")
        assert "must not contain '<image>'" in window.text("#answer")


@pytest.mark.skipif(browser.missing() is not None, reason=f"{browser.missing()} is not installed")
def test_a_reader_is_told_that_the_server_has_gone() -> None:
    with browser.chromium() as window:
        with serving(examples=EXAMPLES) as (client, *_):
            window.open(client.base, 390)
            window.wait("return document.querySelectorAll('#examples button').length === 2")
        window.click("#examples li:nth-child(1) button")
        window.wait("return document.querySelectorAll('.answer.fault').length === 2")
        assert window.text("#answer") == window.text("#base") == "The server does not answer."
        assert window.run("return document.getElementById('stop').hidden")
