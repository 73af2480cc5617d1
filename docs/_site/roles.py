"""Docstrings speak Sphinx's roles and double backticks; the site is Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")
_LITERAL = re.compile(r"``([^`]+)``")
_ALONE = re.compile(r"^[ \t]*::$", re.MULTILINE)
_BLOCK = re.compile(r"::$", re.MULTILINE)
_SESSION = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class Roles(griffe.Extension):
    """Turn :class:`x` and ``x`` into `x`, two colons before a block into one; fence what has prompts."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object, as it was read."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            text = _BLOCK.sub(":", _ALONE.sub("", _LITERAL.sub(r"`\1`", text)))
            obj.docstring.value = _SESSION.sub(lambda session: f"```pycon\n{session[0]}\n```", text)
