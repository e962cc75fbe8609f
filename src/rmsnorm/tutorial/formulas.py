"""The only file that sets formulas: one line of plain notation as MathML, which browsers draw and screen readers say.

``x / √(mean(x²) + ε) · w``: `/` and `√` take what follows, without its brackets; a bracket right behind a name holds
what a function is given, one behind a space is a factor.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(r"(\s*)(\d[\d.]*|(?:[^\W\d_²]\u0302?)+|\S)")
_OPERATORS = "=+−·×←,|"
# Invisible, and spoken.
_TIMES, _APPLY, _OF = '<mo rspace=".16em">\u2062</mo>', "<mo>\u2061</mo>", '<mo rspace=".16em">\u2061</mo>'
_OPEN, _CLOSED = '<mrow><mo stretchy="false">(</mo>', '<mo stretchy="false">)</mo></mrow>'


def mathml(source: str, block: bool = False) -> str:
    """A formula as one ``<math>`` element.

    Args:
        source: the formula; names, numbers, ``( ) / √ ²`` and the operators ``= + − · × ← , |``.

        block: on a line of its own, with fractions that are higher than a line.

    Raises:
        ValueError: a bracket is left open, or there is a sign that this notation doesn't have.
    """
    left = _TOKEN.findall(source)[::-1]

    def row(closing: str = "") -> str:
        """Up to the closing bracket, or to the end."""
        out = last = ""
        while (left or closing) and left[-1][1] != closing:
            space, token = left[-1]
            if token in _OPERATORS:
                out += f"<mo>{left.pop()[1]}</mo>"
            else:
                if last and last not in _OPERATORS:
                    given = last.isalpha() and token == "(" and not space
                    out += _APPLY if given else _OF if last in ("sin", "cos") else _TIMES
                out += quotient()
            last = token
        if closing:
            left.pop()
        return out

    def quotient() -> str:
        upper = factor()
        while left and left[-1][1] == "/":
            left.pop()
            lower = factor()
            upper = f"<mfrac>{_bare(upper)}{_bare(lower)}</mfrac>" if block else f"{upper}<mo>/</mo>{lower}"
        return upper

    def factor() -> str:
        token = left.pop()[1]
        if token == "√":
            return f"<msqrt>{_bare(factor())}</msqrt>"
        if token == "(":
            out = _OPEN + row(")") + _CLOSED
        elif token[0].isdigit() or token == "∞":
            out = f"<mn>{token}</mn>"
        elif token.endswith("\u0302"):
            out = f'<mover accent="true"><mi>{token[:-1]}</mi><mo stretchy="false">^</mo></mover>'
        elif token.isalpha():
            out = f"<mi>{token}</mi>"
        else:
            raise KeyError(token)
        if left and left[-1][1] == "²":
            left.pop()
            return f"<msup>{out}<mn>2</mn></msup>"
        return out

    try:
        return f'<math display="{"block" if block else "inline"}">{row()}</math>'
    except IndexError:
        raise ValueError(f"{source}: the formula ends too early") from None
    except KeyError as sign:
        raise ValueError(f"{source}: {sign} is no sign of a formula") from None


def _bare(part: str) -> str:
    """Without the brackets that only say what belongs together."""
    if part.startswith(_OPEN) and part.endswith(_CLOSED):
        return f"<mrow>{part[len(_OPEN) : -len(_CLOSED)]}</mrow>"
    return part
