"""A page of HTML as a tree that tests ask."""

import html.parser
from dataclasses import dataclass, field

VOID = {"meta", "img", "br", "rect", "line", "circle", "path", "link"}


@dataclass
class Node:
    """A tag with its attributes and what is in it."""

    tag: str
    attributes: dict
    parent: "Node | None" = None
    children: list = field(default_factory=list)
    own: str = ""

    @property
    def text(self):
        return " ".join((self.own + "".join(c.text + " " for c in self.children)).split())

    def all(self, tag, **attributes):
        """Return the tags of this kind with these attributes, in the page's order."""
        here = self.tag == tag and all(self.attributes.get(k) == v for k, v in attributes.items())
        return [
            *([self] if here else []),
            *(n for c in self.children for n in c.all(tag, **attributes)),
        ]

    def one(self, tag, **attributes):
        """Return the only one."""
        (found,) = self.all(tag, **attributes)
        return found


class Tree(html.parser.HTMLParser):
    """A page as a tree; every tag must be closed where it was opened."""

    def __init__(self, text):
        super().__init__()
        self.root = self.now = Node("", {})
        self.feed(text)
        assert self.now is self.root, f"<{self.now.tag}> is not closed"

    def handle_starttag(self, tag, attrs):
        node = Node(tag, dict(attrs), self.now)
        self.now.children.append(node)
        if tag not in VOID:
            self.now = node

    def handle_startendtag(self, tag, attrs):
        self.now.children.append(Node(tag, dict(attrs), self.now))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert tag == self.now.tag, f"</{tag}> closes <{self.now.tag}>"
        self.now = self.now.parent

    def handle_data(self, data):
        if self.now.tag == "data" or self.now.children:
            self.now.children.append(Node("#text", {}, self.now, own=data))
        else:
            self.now.own += data


def parsed(path):
    """Return the page in a file."""
    return Tree(path.read_text(encoding="utf-8")).root


def rows(table):
    """Return the rows of a table: text of each cell, and the numbers in it."""
    body = table.one("tbody")
    return [
        [(c.text, [float(d.attributes["value"]) for d in c.all("data")]) for c in row.children
         if c.tag in ("th", "td")]
        for row in body.all("tr")
    ]  # fmt: skip
