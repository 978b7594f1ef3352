"""Numbers as people and models write them: signs, separators, currencies, fractions.

What may be read in two ways is read as in English: `1,234` and `1.234` are a thousand and one and a
bit. A comma that cannot separate thousands is a decimal one (`0,5`, `1.234,56`), unless there are
several: `1,2,3` is a list.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal

THIN = "\u2009"
ALIKE: Mapping[int, str] = str.maketrans(
    {
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # fullwidth ASCII
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63", "-"),  # dashes, the minus sign
        **dict.fromkeys("\u00a0\u2007\u202f", THIN),  # spaces that do not break
        "\u2019": "'",
        "\u2044": "/",
    }
)
MARKUP = (
    (r"\{,\}|,\\!", ","),
    (r"\\[,;]", THIN),
    (r"\\(?=[$€£¥%])", ""),
    (r"(?<=\d)\\[dt]?frac\{(\d+)\}\{(\d+)\}", r" \1/\2"),
    (r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2"),
)
"""What LaTeX writes otherwise."""
VULGAR = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")
NUMBER = re.compile(
    rf"""
    (?P<sign>(?:(?<![\w)])[-+])?(?:[$€£¥][ ]?-?)?)
    (?:
      (?P<fraction>(?<![\d/.,])(?:\d{{1,3}}[ ])?\d{{1,9}}/0*[1-9]\d{{0,8}}(?![\d/]|[.,]\d))
    | (?P<english>[1-9]\d{{0,2}}(?:,\d{{2,3}})*,\d{{3}}(?!\d|,\d)(?:\.\d+)?)
    | (?P<spaced>[1-9]\d{{0,2}}(?P<space>[{THIN}'_])\d{{3}}(?:(?P=space)\d{{3}})*(?!\d)(?:[.,]\d+)?)
    | (?P<dotted>[1-9]\d{{0,2}}(?:(?:\.\d{{3}})+,\d+|(?:\.\d{{3}}){{2,}})(?!\d|[.,]\d))
    | (?P<decimal>(?<![\d,.])\d+,\d+(?!\d|[.,]\d))
    | (?P<plain>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,2}}(?![\w]))?)
    )
    """,
    re.VERBOSE,
)


def last_number(text: str) -> str:
    """The last number in a text, in digits, with a sign if it is negative, a decimal point, and
    nothing around; a fraction as `1 1/2`. "" if there is none.

    A minus after a digit or a letter does not belong to the number: "5-3" ends in 3.
    """
    numbers = [*NUMBER.finditer(_plain(text))]
    if not numbers:
        return ""
    found = numbers[-1]
    form = str(found.lastgroup)
    digits = found[form]
    if form == "dotted":
        digits = digits.replace(".", "")
    digits = re.sub(f"[{THIN}'_]" if form != "english" else ",", "", digits).replace(",", ".")
    return "-" * ("-" in found["sign"]) + digits


def value_of(number: str) -> Decimal:
    """What `last_number` found, as a value."""
    size = number.removeprefix("-")
    whole, _, rest = size.rpartition(" ")
    top, _, bottom = rest.partition("/")
    value = Decimal(top)  # exact, however long; what is calculated is rounded
    if bottom:
        value = Decimal(whole or 0) + value / Decimal(bottom)
    return value.copy_negate() if number.startswith("-") else value


def _plain(text: str) -> str:
    """With one sign for each thing that has several."""
    text = text.translate(ALIKE)
    for markup, plain in MARKUP:
        text = re.sub(markup, plain, text)
    return VULGAR.sub(_fraction, text)


def _fraction(found: re.Match[str]) -> str:
    before, sign = found.groups()
    written = unicodedata.normalize("NFKC", sign).translate(ALIKE)
    return f"{before} {written}" if before else written
