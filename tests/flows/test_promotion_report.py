"""The page of a promotion: whole in one file, and nothing in it is the user's to run."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import mlflow
import pytest
from balls import FAIR, GOOD, Register
from builders import write_dataset

from cectflow.flows.promotion import promote

HOSTILE = ('<script>alert("1")</script>', "$\\frac{&amp;")


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.usefixtures("draws")
def test_the_page_needs_no_network_no_script_and_escapes_what_users_wrote(
    register: Register, lab: Path
) -> None:
    data = write_dataset(lab / "hostile", classes=HOSTILE)
    register(GOOD, data=data)
    register(FAIR, data=data, role="student", network="<b>bold")
    (promotion,) = promote(
        "cectflow-student", "staging", force=True, reason='"><img src=http://evil.example>'
    )
    source = mlflow.artifacts.load_text(promotion.report)
    page = Page(source)
    assert not page.tags & {"script", "link", "iframe", "object", "b"}
    assert not {name for name, _ in page.attributes if name.startswith("on") or name == "href"}
    pictures = [value for name, value in page.attributes if name == "src"]
    assert len(pictures) == 5  # confusion, retention, classes, latency, samples
    for picture in pictures:
        head, _, content = picture.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in (
        page.attributes
    )
    for name in HOSTILE:
        assert name in page.text
    for words in (
        "the policy refuses it, and is overruled", "<b>bold", "<img src=http://evil.example>",
        "retention at least 0.98", "cectflow-teacher v1", data.manifest.content_digest(),
    ):  # fmt: skip
        assert words in page.text
