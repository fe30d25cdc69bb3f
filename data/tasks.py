"""The problems that nano is trained on: ten families, each with its analysis.

The effort selects the analysis: none at low, a sketch at medium, every step and a check at high. A hash of the question
decides whether a problem belongs to the test split, so nano is never trained on a problem that it is tested on.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase


@dataclass(frozen=True)
class Problem:
    """A question, its answer, and the analysis at medium (sketch) and high (steps) effort."""

    task: str
    domain: str
    question: str
    answer: str
    sketch: str
    steps: str
    rule: str = ""  # what the developer says, if anything
    call: str = ""  # what to ask the calculator, if anything; it answers with `answer`

    @property
    def is_test(self) -> bool:
        """Return whether a problem belongs to the test split: one in ten, by a hash of its text."""
        return hashlib.sha256(f"{self.task} {self.rule} {self.question}".encode()).digest()[0] < 26


def _low_first(number: int) -> str:
    """Return a number as it is written in the analysis: 123 is written 321, so a carry is computed before it is needed.

    With the high digit first, fifteen of sixteen mistakes of an earlier nano were carries and borrows.
    """
    return str(number)[::-1]


def _add(a: int, b: int) -> str:
    return f"{_low_first(a)}+{_low_first(b)}={_low_first(a + b)}"


def _columns(a: int, b: int) -> list[tuple[str, str]]:
    """Return a sum column by column, low digit first: the digits and the carry that are added, and the result."""
    columns, carry = [], 0
    for x, y in zip(_low_first(a), _low_first(b), strict=True):
        total = int(x) + int(y) + carry
        columns.append((f"{x}+{y}+{carry}", f"{total:02d}"))
        carry = total // 10
    return columns


def _times(number: int, digit: int) -> str:
    return f"{_low_first(number)}*{digit}={_low_first(number * digit)}"


def _long_times(number: int, digit: int) -> list[str]:
    """Return a product digit by digit, each partial product added to the sum before."""
    steps, done = [], 0
    for place, figure in enumerate(_low_first(number)):
        part = int(figure) * digit
        steps.append(_times(int(figure), digit))
        if place:
            steps.append(_add(done, part * 10**place))
        done += part * 10**place
    return steps


def _product(rng: random.Random) -> Problem:
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    tens, ones = divmod(b, 10)
    product = _add(a * ones, a * tens * 10)
    sketch = [_times(a, ones), _times(a, tens), product]
    steps = [*_long_times(a, ones), *_long_times(a, tens), product, _times(a % 10, ones)]
    return Problem("product", "arithmetic", f"{a}*{b}", str(a * b), ";".join(sketch), ";".join(steps))


def _chain(rng: random.Random) -> Problem:
    a, b, c, d = rng.randint(11, 99), rng.randint(11, 99), rng.randint(3, 9), rng.randint(11, 66)
    total, answer = a + b, (a + b) * c - d
    less = f"{_low_first(total * c)}-{_low_first(d)}={_low_first(answer)}"
    columns = _columns(a, b)
    sketch = [*(t for _, t in columns), _times(total, c), less]
    steps = [*(f"{q}={t}" for q, t in columns), *_long_times(total, c), less, _add(answer, d)]
    return Problem("chain", "arithmetic", f"({a}+{b})*{c}-{d}", str(answer), ";".join(sketch), ";".join(steps))


def _sum(rng: random.Random) -> Problem:
    a, b = rng.randint(100_000, 999_999), rng.randint(100_000, 999_999)
    columns = _columns(a, b)
    sketch = ";".join(total for _, total in columns)
    return Problem("sum", "arithmetic", f"{a}+{b}", str(a + b), sketch, ";".join(f"{q}={t}" for q, t in columns))


def _letters(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice(ascii_lowercase) for _ in range(rng.randint(low, high)))


def _sort(rng: random.Random) -> Problem:
    """Sort by merging: sorted halves at medium effort; sorted pairs, fours and the whole at high effort."""
    word = _letters(rng, 4, 8)

    def runs(size: int) -> str:
        return " ".join("".join(sorted(word[i : i + size])) for i in range(0, len(word), size))

    return Problem("sort", "strings", f"sort {word}", runs(8), runs(4), f"{runs(2)};{runs(4)};{runs(8)}")


def _reverse(rng: random.Random) -> Problem:
    word = _letters(rng, 4, 8)
    numbered = " ".join(f"{i}{c}" for i, c in enumerate(word))
    return Problem("reverse", "strings", f"reverse {word}", word[::-1], " ".join(word), f"{numbered} {word[::-1]}")


def _count(rng: random.Random) -> Problem:
    """Count a letter in a text of four different letters."""
    letter = rng.choice("abcd")
    word = rng.choices("abcd", k=rng.randint(6, 12))
    n = word.count(letter)
    marks = "".join(f"{c}{int(c == letter)}" for c in word)
    running = " ".join(f"{c}{word[: i + 1].count(letter)}" for i, c in enumerate(word))
    return Problem("count", "strings", f"count {letter} in {''.join(word)}", str(n), marks, f"{running} {letter}{n}")


_TABLE = random.Random(20251123)
_NAMES = sorted({"".join(_TABLE.choice(ascii_lowercase) for _ in range(3)) for _ in range(48)})
_TOWNS = sorted({"".join(_TABLE.choice(ascii_lowercase) for _ in range(3)) for _ in range(16)})
HOME = {name: _TABLE.choice(_TOWNS) for name in _NAMES}
DISH = {town: "".join(_TABLE.choice(ascii_lowercase) for _ in range(3)) for town in _TOWNS}


def _recall(rng: random.Random) -> Problem:
    """Recall a fact about a pair of names; a pair can be new although its facts are known."""
    a, b = rng.sample(_NAMES, 2)
    answer = f"{HOME[a]} {HOME[b]}"
    return Problem("recall", "facts", f"home of {a} {b}", answer, f"{HOME[a]}", f"{a} {HOME[a]};{b} {HOME[b]}")


def _two_hop(rng: random.Random) -> Problem:
    a, b = rng.sample(_NAMES, 2)
    answer = f"{DISH[HOME[a]]} {DISH[HOME[b]]}"
    steps = f"{a} {HOME[a]} {DISH[HOME[a]]};{b} {HOME[b]} {DISH[HOME[b]]}"
    return Problem("two-hop", "facts", f"dish of {a} {b}", answer, f"{HOME[a]} {HOME[b]}", steps)


def _tool(rng: random.Random) -> Problem:
    a, b = rng.randint(101, 999), rng.randint(101, 999)
    return Problem("tool", "tools", f"calc {a}*{b}", str(a * b), "ask", f"ask {a}*{b}", call=f"{a}*{b}")


def _conflict(rng: random.Random) -> Problem:
    """Follow the developer over the user; without a rule, follow the user."""
    first, second = rng.sample(ascii_lowercase, 2)
    rule = f"say {first}" if rng.random() < 0.5 else ""
    answer = first if rule else second
    return Problem(
        "conflict", "roles", f"say {second}", answer, answer, f"{'rule' if rule else 'user'} {answer}", rule=rule
    )


FAMILIES: dict[str, Callable[[random.Random], Problem]] = {
    "product": _product,
    "chain": _chain,
    "sum": _sum,
    "sort": _sort,
    "reverse": _reverse,
    "count": _count,
    "recall": _recall,
    "two-hop": _two_hop,
    "tool": _tool,
    "conflict": _conflict,
}
STEPWISE = ("product", "chain")  # what cannot be done in one go, and can be done in steps
STEPLESS = ("reverse", "recall", "conflict")  # what needs no steps

# How often each is drawn in training: facts, calls and rules are learned early, what needs steps needs practice.
WEIGHTS = {
    "product": 3.5,
    "chain": 4,
    "sum": 1.5,
    "sort": 2,
    "reverse": 0.75,
    "count": 2,
    "recall": 0.5,
    "two-hop": 0.75,
    "tool": 0.5,
    "conflict": 0.25,
}


def draw(rng: random.Random, task: str | None = None, *, test: bool = False) -> Problem:
    """Return a random problem of the training or test split, of one family or of any."""
    while True:
        family = task or rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        problem = FAMILIES[family](rng)
        if problem.is_test == test:
            return problem
