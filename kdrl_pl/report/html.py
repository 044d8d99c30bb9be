"""HTML put together from elements: whatever is not markup already is escaped, so nothing a model wrote can act.

A page holds no script and loads nothing; its Content-Security-Policy says so to the browser as well, so that even
markup that slipped in could not run or call out.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable

from kdrl_pl.text import printable

_EMPTY = frozenset({"br", "link", "meta", "wbr"})  # elements without an end tag


class Markup(str):
    """Text that is HTML already."""


def escaped(text: object) -> Markup:
    """`text` as it is to be read: control characters as escapes, nothing that HTML would act on."""
    return text if isinstance(text, Markup) else Markup(html.escape(printable(str(text))))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element of HTML or SVG.

    >>> element("p", "1 < 2", element("br"), class_="note", title=None)
    '<p class="note">1 &lt; 2<br></p>'

    Args:
        name: of the element.
        children: texts, which are escaped; markup, which is not; lists of both; None is left out.
        attributes: their values are escaped; None and False leave them out, True writes the bare name. A `_` at the end
            is dropped, any other becomes `-`.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(printable(str(value)))}"')
    start = f"<{' '.join(words)}>"
    return Markup(start if name in _EMPTY else f"{start}{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    """Children of an element one behind the other, as `element` takes them."""
    parts = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(child))
        elif child is not None:
            parts.append(escaped(child))
    return Markup("".join(parts))


def breakable(name: str) -> Markup:
    """A name like `model.lr_schedule`, or a path, which a narrow column breaks between its words.

    >>> breakable("model.lr_schedule"), breakable("a/b<0.5")
    ('model.<wbr>lr_<wbr>schedule', 'a/<wbr>b&lt;0.5')
    """
    return Markup(re.sub(r"(?<=[^\W\d_])[./_](?=[^\W\d_])", r"\g<0><wbr>", escaped(name)))


def table(head: Iterable[object], rows: Iterable[Iterable[object]], caption: object, numbers: bool = True) -> Markup:
    """A table that scrolls on its own where the screen is narrow.

    Args:
        head: of the columns.
        rows: the first cell of each is its head.
        caption: what the table shows, for those who cannot see it.
        numbers: cells but the first stand on the right.
    """
    body = []
    for first, *cells in rows:
        body.append(element("tr", element("th", first, scope="row"), [element("td", cell) for cell in cells]))
    content = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", [element("th", cell, scope="col") for cell in head])),
        element("tbody", body),
        class_="numbers" if numbers else None,
    )
    return element("div", content, class_="wide", role="region", aria_label=caption, tabindex="0")


def document(title: str, style: str, *body: object) -> str:
    """A whole page in one file.

    Args:
        title: of the page.
        style: its style sheet, the only one the browser will obey.
        body: what stands in it.
    """
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),  # else the browser asks for one
        element("title", title),
        Markup(f"<style>{style}</style>"),
    )
    return f"<!doctype html>\n{element('html', head, element('body', element('main', *body)), lang='en')}\n"
