"""What every offline page is held to: elements that close in order, ids of its own, nothing fetched from elsewhere.

And plans that begin as those of NVIDIA's libraries do.
"""

import re
from html.parser import HTMLParser

import pytest

VOID = {"meta", "img"}
# An address that the browser would fetch: anything but data inside the page and places on it.
# Two slashes amid letters are base64, not the start of an address.
FETCHED = re.compile(
    r"""https?:|(?<![\w+/])//\w|@import|<script|<link|<iframe|(?:src|href)=(?!["']?(?:data:|\#))|url\((?!\#)"""
)


class Structure(HTMLParser):
    """Fails on tags that do not close in order; keeps names of elements, ids and places referred to."""

    def __init__(self, page):
        super().__init__()
        self.open, self.names, self.ids, self.references = [], set(), [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.names.add(name)
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.references += [value[1:] for key, value in attributes if key == "href" and value.startswith("#")]
        self.references += [place for value in values.values() for place in re.findall(r"url\(#(\w+)\)", value or "")]
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        self.handle_endtag(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name


@pytest.fixture(scope="session")
def structure_of():
    return Structure


@pytest.fixture(scope="session")
def fetched_by():
    """Every address in a text that a browser would fetch."""
    return FETCHED.findall


@pytest.fixture(scope="session")
def plan_of():
    """Bytes that say they are a plan of a target's library in some version, and nothing more."""
    from lrq_export.doctor.system import version_of
    from lrq_export.engine.plan_header import STARTS

    def make(target, version="1"):
        numbers = [*version_of(version), 0, 0, 0][:4]
        return STARTS[target][0] + bytes(20) + bytes(numbers) + bytes(16)

    return make
