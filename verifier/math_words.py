r"""What stands in an answer besides formulas: words, choices, dates, names of angles, units.

A text beside a number is a unit or a counted thing if it could be one: known units convert, and a
noun of a few words is a dimension of its own. A text with a word of grammar in it (`or`, `not`,
`is`) says something about the answer, which makes it another answer.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from verifier.math_text import plain

_INSIDE = r"[^{}]*(?:\{[^{}]*\}[^{}]*)*"
_TEXT = re.compile(rf"\\(?:text|mathrm)\s*\{{({_INSIDE})\}}")
_WORDS = re.compile(r"[^\W\d_][^\W\d_ '’,.-]*(?:[ '’,-]+[^\W\d_]+)*")
_SAME_WORD = {"true": "yes", "correct": "yes", "false": "no", "incorrect": "no"}
_SAME_WORD |= {"dne": "does not exist", "infinite": "infinity", "undefine": "undefined"}
_SAME_WORD |= {"infinitely many": "infinity", "infinitely many solution": "infinity"}
_OF_GRAMMAR = """
is are was were be been am isn aren not no nor neither never or either and but if then else than
maybe perhaps possibly probably wrong right correct incorrect false true except unless instead
rather it i we you this that these those what which who because since so more less fewer greater
over under least most between at about could might should can cannot would
"""
_OF_ARITHMETIC = """
plus minus negative half halve third quarter fourth fifth sixth seventh eighth ninth tenth hundredth
thousandth millionth billionth ten twice double doubled divided multiplied factorial root power mod
"""
_GRAMMAR = frozenset([*_OF_GRAMMAR.split(), *_OF_ARITHMETIC.split()])
_REMARKS = frozenset(["exactly", "exact", "approximately", "approx", "unit", "total", "in total"])


def unwrapped(text: str) -> str:
    r"""What all of `text` holds, if it is one \text."""
    match = re.fullmatch(r"\\(?:text|mathrm)\s*\{([^{}]*)\}[.\s]*", text)
    return match[1].strip() if match else text


class Word(NamedTuple):
    """A word or some, in one spelling. One that is not `certain` may be a product of variables."""

    spelling: str
    certain: bool


_SIGNS = {r"\emptyset": Word("no solution", True), r"\infty": Word("infinity", False)}
_SIGNS[r"-\infty"] = Word("negative infinity", False)
_NOTHING = re.compile(
    r"(?:there (?:is|are) )?no (?:such |real |integer |positive |possible |valid )*"
    r"(?:solution|root|value|number|integer|answer|zero)(?: exist)?|none|empty set"
)


def word(text: str) -> Word | None:
    """The word or words that all of `text` is; None for a formula.

    Up to three letters in a row may be a product of variables, unless they stand in `\\text`.
    """
    if text in _SIGNS:
        return _SIGNS[text]
    bare = _TEXT.sub(r"\1", text).strip().rstrip(".").strip()
    if _WORDS.fullmatch(bare) is None:
        return None
    if re.fullmatch("[A-Z]{3,}", bare) and bare != "DNE":  # an order: HTT is not TTH
        return Word(bare, bare != text or len(bare) > 3)
    words = bare.lower().replace(",", " ").split()
    singular = " ".join(
        w[:-1] if len(w) > 4 and w.endswith("s") and w[-2] != "s" else w for w in words
    )
    word = re.sub(r"^(?:the|an?) ", "", singular)
    word = "no solution" if _NOTHING.fullmatch(word) else _SAME_WORD.get(word, word)
    name = re.fullmatch("[A-Z][a-z]{2,}", bare) is not None
    short = len(bare) <= 3 and bare == text and word not in ("yes", "no", "does not exist")
    return Word(word, not short or name)


def letters(text: str) -> bool:
    """Whether a text is an order of three capitals or more, such as HTT."""
    return re.fullmatch("[A-Z]{3,}", unwrapped(text)) is not None


_CHOICE = re.compile(
    r"(?:(?:option|choice|(?:the )?(?:final |correct )?answer)(?: is)?\s*:?)?\s*"
    r"(?:\(([A-Ja-j])\)|([A-J])\)?)(?P<rest>\s*$|\s*[.:–-]\s.*|[.:].*|(?<=\)).*)",
    re.IGNORECASE | re.DOTALL,
)
_ANOTHER = re.compile(
    r"\([A-J]\)|\b(?:or|and|not)\s+[A-J]\b|^\s*[,;+*/]|[,;]\s*[A-J]$|\s[A-J][.)]\s", re.IGNORECASE
)


def choice(text: str) -> str | None:
    """The letter of a multiple choice, from A to J: B, (b), B) or "B. what it says"."""
    bare = re.sub(
        r"\s+", " ", re.sub(r"[{}]", "", re.sub(r"\\(?:text|mathrm)\b", " ", text))
    ).strip()
    match = _CHOICE.match(bare)
    if match is None or (match[2] and not match[2].isupper()) or _ANOTHER.search(match["rest"]):
        return None
    return str(match[1] or match[2]).upper()


_DATE = re.compile(r"(\d{1,4})([-/.])(\d{1,2})\2(\d{1,4})")
_TIME = re.compile(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))?([ap]\.?m\.?)?", re.IGNORECASE)
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_NAMED_DATE = re.compile(
    rf"(?:(\d{{1,2}})(?:st|nd|rd|th)?(?:of)?)?({'|'.join(_MONTHS)})[a-z]*\.?"
    r"(?:(\d{1,2})(?:st|nd|rd|th)?(?!\d))?,?(\d{4})?"
)
_NAMED = re.compile(
    r"(?:m\s*)?\\(angle|triangle|overline|overrightarrow|widehat)\{?([A-Z]{2,4})\}?"
)
Literal = tuple[str | int | None, ...]


def literal(text: str) -> Literal | None:
    """A date, a time of day or the name of an angle, which only look like formulas."""
    bare = plain(_TEXT.sub(r"\1", text))
    if (match := _DATE.fullmatch(bare)) and max(len(match[1]), len(match[4])) == 4:
        return ("date", int(match[1]), int(match[3]), int(match[4]))
    if (match := _NAMED_DATE.fullmatch(bare.lower())) and bool(match[1]) != bool(match[3]):
        year, month = match[4] and int(match[4]), _MONTHS.index(match[2]) + 1
        return ("date", year, month, int(match[1] or match[3]))
    marked = re.search(r"\\text|[AP]\.?M|[ap]\.", text)  # 5am may be a product
    if (match := _TIME.fullmatch(bare)) and match[4] and (match[2] or marked):
        hours = int(match[1]) % 12 + 12 * (match[4][0] in "pP")
        return ("time", hours, int(match[2] or 0), int(match[3] or 0))
    if match := _NAMED.fullmatch(bare):
        name = match[2]
        if match[1] == "triangle":
            name = "".join(sorted(name))
        return (match[1], name if match[1] == "overrightarrow" else min(name, name[::-1]))
    return None


# ------------------------------------------------------------------------------------ units

_SCALES: dict[str, dict[str, str]] = {
    "length": {"nm": "1/1000000000", "µm": "1/1000000", "mm": "1/1000", "cm": "1/100", "dm": "1/10"}
    | {
        "m": "1",
        "km": "1000",
        "inch": "0.0254",
        "ft": "0.3048",
        "yard": "0.9144",
        "mile": "1609.344",
    },
    "mass": {"mg": "1/1000", "g": "1", "kg": "1000", "ton": "1000000", "lb": "453.59237"}
    | {"oz": "28.349523125"},
    "time": {"ms": "1/1000", "s": "1", "min": "60", "h": "3600", "day": "86400", "week": "604800"},
    "money": {"cent": "1/100", "dollar": "1"},
    "volt": {"V": "1", "mV": "1/1000", "kV": "1000"},
    "energy": {"J": "1", "kJ": "1000", "cal": "4.184", "kcal": "4184"},
    "power": {"W": "1", "kW": "1000", "MW": "1000000"},
    "force": {"N": "1", "kN": "1000"},
    "pressure": {"Pa": "1", "kPa": "1000", "MPa": "1000000", "atm": "101325"},
    "frequency": {"Hz": "1", "kHz": "1000", "MHz": "1000000"},
    "resistance": {"ohm": "1"},
}
_KNOWN: dict[str, tuple[tuple[str, int], Fraction]] = {
    name: ((dimension, 1), Fraction(factor))
    for dimension, scale in _SCALES.items()
    for name, factor in scale.items()
}
_KNOWN |= {"ml": (("length", 3), Fraction(1, 10**6)), "l": (("length", 3), Fraction(1, 1000))}
_NAMES = {
    **{"in": "inch", "inche": "inch", "foot": "ft", "feet": "ft", "yd": "yard", "mi": "mile"},
    **{"litre": "l", "liter": "l", "mL": "ml", "L": "l", "hour": "h", "hr": "h", "sec": "s"},
    **{"second": "s", "minute": "min", "mph": "mile/h", "kph": "km/h", "kmh": "km/h"},
    **{"gram": "g", "metre": "m", "meter": "m", "pound": "lb", "ounce": "oz", "joule": "J"},
    **{"watt": "W", "newton": "N", "volt": "V", "hertz": "Hz", "pascal": "Pa", r"\Omega": "ohm"},
    **{
        r"\$": "dollar",
        "USD": "dollar",
        "buck": "dollar",
        "percent": "%",
        "pct": "%",
        r"\%": "%",
        "¢": "cent",
    },
    **{"deg": "degree", r"^\circ": "degree", "rad": "radian", "元": "yuan", "€": "euro", "£": "£"},
    **{"tonne": "ton", "kilo": "kg", "um": "µm", "μm": "µm", "micron": "µm"},
}
_PREFIXES = {"milli": "m", "centi": "c", "kilo": "k", "deci": "d", "nano": "n", "micro": "µ"}
_SCALE_WORDS = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6}
_SCALE_WORDS |= {"billion": 10**9, "trillion": 10**12}
_UP_TO_TWENTY = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen
"""
_NUMERALS = {word: n for n, word in enumerate(_UP_TO_TWENTY.split())}
_NUMERALS |= {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70}
_NUMERALS |= {"eighty": 80, "ninety": 90}
_BARE = sorted({n for n in [*_KNOWN, *_NAMES] if n.isalpha() and len(n) > 1}, key=len)[::-1]
_PIECE = (
    rf"\\(?:text|mathrm)\s*\{{{_INSIDE}\}}|\\?%|\^\\circ(?:\s*[CF](?![a-zA-Z]))?|\\mu(?![a-zA-Z])|\\Omega(?![a-zA-Z])"
    rf"|(?<![a-zA-Z\\])(?:{'|'.join(_BARE)})s?\.?(?![a-zA-Z])"
    r"|(?<=\s)[a-zA-Z]{1,3}/(?:h|hr|s|min|kg|m|[lL])(?![a-zA-Z])|(?<=\s)[a-zA-Z]{3,}\.?(?![a-zA-Z])|[^\x00-\x7f]|\^\s*\{?-?[1-3]\}?(?=[^\w]*$)"
)
_MEASURE = re.compile(
    rf"(?P<value>.*?[\w)}}\]!.|])\s*(?!\^\s*\{{?-?\d)(?P<unit>(?:(?:{_PIECE})(?:[\s/]|\\cdot)*)+)",
    re.DOTALL,
)
_ANGLED = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|c?tg|cis)(?![a-zA-Z])")
_MONEY = re.compile(r"(?P<sign>-?)\s*(?P<unit>\\\$|[£€¥₹]|\\pounds)\s*(?P<value>.*)", re.DOTALL)
_QUANTITY = re.compile(
    r"(?P<value>\d+(?:\.\d+)?)\s*(?:\\(?:text|mathrm)\s*\{(?P<text>[^{}]*)\}|(?P<bare>[A-Za-z]{2,}))[\s,]*(?:and\s)?"
)
_BASED = re.compile(
    r"\(?(?:\\text\{)?(?P<value>[0-9A-F]+)\}?\)?_\{?(?:\\text\{)?(?P<base>\d{1,9}|[a-z]{3,})\}*"
)


class Measure(NamedTuple):
    """A value (text) with its unit: powers of dimensions, and how many of their own it has.

    A noun that the table does not know is a dimension of its own.
    """

    value: str
    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction


def measure(text: str) -> Measure | None:
    """A number or formula with a unit, a percent sign, a degree sign or a base."""
    if based := _BASED.fullmatch(plain(text)):
        value, base = based["value"], in_digits(based["base"]) or based["base"]
        if (
            not value.isdigit()
            and base.isdigit()
            and max(int(digit, 16) for digit in value) < int(base) <= 36
        ):
            value = str(int(value, int(base)))
        return Measure(value, ((f"base {base}", 1),), Fraction(1))
    if money := _MONEY.fullmatch(text):
        inner = measure(money["value"])  # $2.5 million
        value, factor = (inner.value, inner.factor) if inner else (money["value"], Fraction(1))
        currency = _NAMES.get(money["unit"], money["unit"])
        dimension = "money" if currency == "dollar" else currency
        return Measure(money["sign"] + value, ((dimension, 1),), factor)
    if compound := _compound(text):
        return compound
    match = _MEASURE.fullmatch(text)
    if match is None or not match["value"].strip(r"\ ") or match["value"].rstrip()[-1] in "^_\\":
        return None
    if match["unit"].startswith("^") and _ANGLED.search(match["value"]):
        return None  # the degrees of \cos 36^\circ are its argument's
    micro = match["unit"].replace(r"\mu", "µ")
    spelled = re.sub(r"µ\s+", "µ", _TEXT.sub(r"\1" if "µ" in micro else r" \1", micro))
    unit = _unit(spelled)
    return Measure(match["value"].strip(), *unit) if unit is not None else None


def in_digits(text: str) -> str | None:
    """The digits of a number in words: two hundred five."""
    words = re.findall("[a-z]+|[^a-z\\s-]", unwrapped(text).lower())
    total = part = 0
    for word in words:
        number, scale = _NUMERALS.get(word), _SCALE_WORDS.get(word)
        if number is not None and (number or len(words) == 1):
            if part % 100 and not (number < 10 and part % 10 == 0 and part % 100 > 10):
                return None  # two three is not five
            part += number
        elif word == "hundred" and 0 < part < 10:
            part *= 100
        elif scale and scale >= 1000 and part and (not total or part * scale < total):
            total, part = total + part * scale, 0
        else:
            return None
    return str(total + part) if words else None


def _compound(text: str) -> Measure | None:
    """2 hours 30 minutes."""
    parts = list(_QUANTITY.finditer(text))
    if len(parts) < 2 or "".join(part[0] for part in parts) != text:
        return None
    texts = (re.sub(r"[\s,]+and\s*$", "", part["text"] or part["bare"]) for part in parts)
    units = [unit for text in texts if (unit := _unit(text))]
    if len(units) < len(parts) or len({dimensions for dimensions, _ in units}) > 1:
        return None
    values = (Fraction(part["value"]) for part in parts)
    total = sum(value * factor for value, (_, factor) in zip(values, units, strict=True))
    return Measure(f"({total})", units[0][0], Fraction(1))


def _unit(text: str) -> tuple[tuple[tuple[str, int], ...], Fraction] | None:
    """Dimensions and factor of a unit's text; None if it says more than a unit does."""
    text = re.sub(r"[()]|\\cdot", " ", text.replace("²", "^2").replace("³", "^3")).strip()
    if text.strip(". ") in _REMARKS:
        return (), Fraction(1)
    words = re.findall(r"\\[a-zA-Z%$]+|\\?%|\^\\circ|\^\s*\{?-?\d\}?|/|[^\s/^\\.]+", text)
    if words[:1] in (["squared"], ["cubed"]):
        return None  # it is the number that is
    if len(words) > 6 or any(_says_more(w) for w in words):
        return None
    powers: dict[str, int] = {}
    factor, sign, next_power = Fraction(1), 1, 1
    for index, name in enumerate(words):
        if name.startswith("^") and name != r"^\circ":
            continue
        if name.lower() in ("per", "/", "a"):
            sign = -1
        elif name.lower() in ("square", "squared", "sq", "cubic", "cubed"):
            next_power = 3 if name[0] in "cC" else 2
        elif name.lower() in _SCALE_WORDS:
            factor *= _SCALE_WORDS[name.lower()]
        else:
            raised = re.search(r"-?\d", words[index + 1]) if words[index + 1 : index + 2] else None
            raised = raised if raised and words[index + 1].startswith("^") else None
            power = sign * (int(raised[0]) if raised else next_power)
            for dimension, exponent, scale in _parts(name):
                powers[dimension] = powers.get(dimension, 0) + exponent * power
                factor *= scale**power
            next_power = 1
    return tuple(sorted(item for item in powers.items() if item[1])), factor


def _says_more(word: str) -> bool:
    return word.isdigit() or bool({word.lower(), word.lower().removesuffix("s")} & _GRAMMAR)


def _parts(name: str) -> list[tuple[str, int, Fraction]]:
    """The dimensions of one word."""
    for spelling in (name, name.removesuffix("s"), name.lower(), name.lower().removesuffix("s")):
        unit = _NAMES.get(spelling, spelling)
        for prefix, short in _PREFIXES.items():
            if unit.startswith(prefix) and len(unit) > len(prefix):
                stem = unit.removeprefix(prefix)
                unit = short + _NAMES.get(stem, stem)
        above, _, below = unit.partition("/")
        if above in _KNOWN:
            (dimension, exponent), factor = _KNOWN[above]
            rest = [(d, -e, 1 / f) for d, e, f in _parts(below)] if below else []
            return [(dimension, exponent, factor), *rest]
        if unit in ("degree", "radian", "%"):
            return [(unit, 1, Fraction(1))]
    noun = name.lower().removesuffix("s")
    return [] if noun in _REMARKS else [(noun, 1, Fraction(1))]


_SAYING = re.compile(
    r"(?:\\text\s*\{(?P<text>[^{}]{1,100})\}|(?P<bare>[A-Za-z][A-Za-z ]{1,100}(?::|\bis\b)))\s*"
    r"(?P<rest>\S.*)",
    re.DOTALL,
)


def without_introduction(text: str) -> str:
    r"""The answer without "The area is" or "Final answer:" before it."""
    match = _SAYING.fullmatch(text)
    if match is None:
        return text
    said = (match["text"] or match["bare"]).strip().lower()
    words = re.findall("[a-z]+", said)
    introduces = said.endswith((":", "=")) or words[-1:] in (["is"], ["are"], ["equals"], ["be"])
    hedges = set(words[:-1] if not said.endswith(":") else words) & (_GRAMMAR - {"is", "are", "at"})
    return match["rest"] if introduces and not hedges - {"correct", "what", "which"} else text
