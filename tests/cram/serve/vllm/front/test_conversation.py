"""What routing reads of a chat."""

from __future__ import annotations

from cram.serve.vllm.front.conversation import read_chat
from tests.cram.serve.vllm.front.fakes import conversation


def test_a_data_url_may_be_written_in_capitals() -> None:
    plain, loud = (conversation("What colour?", 0) for _ in range(2))
    image = loud["messages"][0]["content"][0]["image_url"]
    head, _, data = image["url"].partition(",")
    image["url"] = f"{head.upper()},{data}"
    assert read_chat(loud) == read_chat(plain)
