"""The only file that translates docstrings: the cross-references of Python's own tools, into those of the site."""

from __future__ import annotations

import re

import griffe

_ROLE = re.compile(r":(?:func|class|meth):`([\w.]+)`")


class Roles(griffe.Extension):
    """``:func:`rmsnorm.rms_norm` `` becomes a link to that entry."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(r"[`\1`][\1]", obj.docstring.value)
