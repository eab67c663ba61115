"""Questions that ask for the same and questions that only look like it, generated: what a scope is trained on.

Every record has a question, other wordings of it (`rephrased`), and what has other answers: `others` ask the same of a
subject with a similar name, or anything; `siblings` ask something else of the same subject. No answer is known.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lamini_jax.data import calibration, facts
from lamini_jax.errors import UserError

_KEYBOARD = "qwertyuiop asdfghjkl zxcvbnm"
_FEWEST = 50
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True)
class Related:
    """A question, the same in other words, and others that must not be taken for it."""

    question: str
    rephrased: tuple[str, ...]
    others: tuple[str, ...]
    siblings: tuple[str, ...] = ()  # what else may be asked of the same subject, which must not be taken for it either


def _lists(file: str) -> dict[str, list[list[str]]]:
    """By kind of subject, the lists in a file's lines."""
    found: dict[str, list[list[str]]] = {}
    for line in (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines():
        kind, texts = line.split(": ", 1)
        found.setdefault(kind, []).append(texts.split(" | "))
    return found


_GROUPS = _lists("relations.txt")  # the wordings of each relation, with {} for the subject
_NOUNS = {kind: nouns for kind, (nouns,) in _lists("nouns.txt").items()}  # subjects without a name
_NAMES = {
    "first": "Anna Omar Mei Carlos Ingrid Kwame Priya Jonas Fatima Luca Elif Mateo Aiko Peter Zanele Boris Chloe John "
    "Mary William James David Thomas Robert George Charles Henry Paul Maria Louise Elizabeth Stefan Marcus Giovanni "
    "Jean Karl Ivan Hans Wang Li Yusuf Ahmed Ravi Sergei Akira Diego Pedro Sofia Emma Lucy Alice Rose Martin Frank",
    "last": "Smith Miller Weber Rossi Garcia Tanaka Novak Kowalski Jensen Okafor Singh Kim Nguyen Dubois Silva Cohen "
    "Brown Wilson Taylor Moore Clark Lewis Walker Hall Young King Wright Hill Green Baker Adams Nelson Carter "
    "Mitchell Roberts Turner Phillips Campbell Parker Evans Edwards Collins Stewart Morris Murphy Cook Rogers",
    "noun": "river winter garden shadow king daughter night house storm letter island bridge dream stone wolf crown "
    "road summer silence ocean mirror soldier teacher heart fire voice moon city forest machine secret promise",
    "site": "Bridge Museum Airport Castle River Lake Stadium University Church Island Library Park School Station "
    "Hospital Abbey Tower Theatre Railway Cathedral Glacier Bay Creek County Township Parish Hall Hotel Reserve",
    "firm": "Records Airlines Press Motors Bank Group Foundation Institute Society Company Films Studios Club Systems "
    "Pharmaceuticals Energy Party Orchestra College Academy Agency Association Foods Games Software",
    "line": "Falcon Comet Pro Max Mini Star Eagle Turbo Nova Delta Vista Spark Titan Orion Pulse Rapid Classic",
    "gear": "washing machine,laptop,printer,camera,router,drill,phone,heater,bicycle,tractor,rifle,aircraft,engine",
    "rite": "Battle Treaty Festival Siege Conference Council Championship Election Congress Tournament Open Marathon",
}
_NAMES = {kind: words.split("," if "," in words else None) for kind, words in _NAMES.items()}
_ARTICLES = "the the the our our my".split()
_SHARE_NAMELESS = 0.3  # of the subjects that may have a name
_KINDS = "old new main small second back front upper lower north south east west big spare other".split()
_ASIDES = (
    "The weather was mild for the season.",
    "It has been renovated twice since then.",
    "He later moved to the coast with his family.",
    "The second edition is out of print.",
    "Most of the members voted against it.",
    "She returned to teaching after the war.",
    "Admission is free on the first Sunday of every month.",
    "Hello, I hope you can help me.",
    "Thanks for the last answer!",
    "This is listed in the appendix, pp. 12-15.",
    "There are three of them in the northern part.",
    "I am writing a report and need one more thing.",
)


def related(count: int, seed: int) -> list[Related]:
    """So many records, a function of the seed; those of a smaller count are the first of a larger one."""
    rng, taken = np.random.default_rng((seed, 4)), set()
    return [_record(rng, taken) for _ in range(count)]


def read(path: str) -> list[Related]:
    """The records of a file of lines {"question": "...", "rephrased": ["..."], "others": ["..."]}.

    Raises UserError, with the file and the line, for anything else.
    """
    example = '{"question": "...", "rephrased": ["..."], "others": ["..."]}'
    found = []
    for number, line in facts.json_lines(path, example):
        question, lists = line.get("question"), [line.get("rephrased", []), line.get("others", [])]
        texts = [question, *(text for texts in lists if isinstance(texts, list) for text in texts)]
        if not all(isinstance(texts, list) for texts in lists) or not all(isinstance(t, str) and t for t in texts):
            raise UserError(f"{path}, line {number}: is not a question with others; write it like {example}")
        found.append(Related(question, *map(tuple, lists)))
    if len(found) < _FEWEST:
        raise UserError(f"{path}: has {len(found)} questions; a scope needs at least {_FEWEST} to learn from")
    return found


def typo(rng: np.random.Generator, text: str) -> str:
    """The text with one slip of the keyboard: inside a word of four letters or more, one letter is swapped with the
    one before it, dropped, doubled or replaced. A text without such a word stays as it is."""
    spans = [match.span() for match in re.finditer(r"[^\W\d_]{4,}", text)]
    changed = text
    while spans and changed == text:
        start, end = spans[rng.integers(len(spans))]
        at = int(rng.integers(start + 1, end))
        before, letter, after = text[:at], text[at], text[at + 1 :]
        edits = (
            (before[:-1] + letter + before[-1:]) if at > start + 1 else before + after[:1] + letter + after[1:],
            before,
            before + letter + letter,
            before + _beside(rng, letter),
        )
        kind = int(rng.integers(4))
        changed = edits[kind] + ("" if kind == 0 and at == start + 1 else after)
    return changed


def _beside(rng, letter: str) -> str:
    """A letter beside this one on the keyboard, or any."""
    at = _KEYBOARD.find(letter.lower())
    near = (_KEYBOARD[max(at - 1, 0) : at] + _KEYBOARD[at + 1 : at + 2]).replace(" ", "") if at >= 0 else ""
    return _pick(rng, near if near and rng.integers(2) else _ALPHABET)


def _record(rng, taken: set[tuple[str, int, str]]) -> Related:
    """One record. `taken` are the kinds, relations and subjects of those before it, which none asks for again: there
    are few subjects without a name."""
    while True:
        kind = _pick(rng, list(_GROUPS))
        (at, other) = map(int, rng.permutation(len(_GROUPS[kind]))[:2])
        nameless = kind not in _SUBJECTS or kind in _NOUNS and rng.random() < _SHARE_NAMELESS
        subject, again, alike = _nameless(rng, kind) if nameless else _named(rng, kind)
        asked = {(kind, i, _bare(text)) for i, text in ((at, subject), (at, alike), (other, subject))}
        if not asked & taken:
            taken |= asked
            break
    wordings, elsewhere = ([str(text) for text in rng.permutation(_GROUPS[kind][i])] for i in (at, other))
    if nameless:  # hardly anybody writes these as the beginning of a statement
        wordings, elsewhere = (sorted(texts, key=lambda text: text[-1] != "?") for texts in (wordings, elsewhere))
    rephrased = [_styled(rng, wording.format(again)) for wording in wordings[1:3]]
    if rng.random() < 0.2:
        rephrased = [f"{_pick(rng, _ASIDES)} {text}" for text in rephrased]
    same = wordings[0 if rng.random() < 0.3 else 1]  # often in the very words of the question
    others = tuple(_styled(rng, other) for other in (same.format(alike), _pick(rng, unrelated())))
    return Related(wordings[0].format(subject), tuple(rephrased), others, (_styled(rng, elsewhere[0].format(subject)),))


@functools.cache
def unrelated() -> list[str]:
    """Questions about anything, which nobody has stored."""
    return calibration.questions(2048, 1)


def _styled(rng, text: str) -> str:
    """As some write: one in six all in small letters and without a mark at the end."""
    return text.lower().rstrip("?.") if rng.random() < 1 / 6 else text


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def _made(rng) -> str:
    return calibration.made_up_word(rng).capitalize()


def _name(rng, kind: str) -> str:
    """A name of a list, or one made up."""
    return _pick(rng, _NAMES[kind]) if rng.integers(2) else _made(rng)


def _two(rng, draw: Callable) -> tuple[str, str]:
    """Two different parts of names; of ten pairs, one differs in a single letter."""
    one = draw(rng)
    other = draw(rng)
    if rng.integers(10) == 0 or other == one:
        at = int(rng.integers(len(one)))
        other = one[:at] + _pick(rng, _ALPHABET) + one[at + 1 :]
        other = other[:1].upper() + other[1:]
    return (one, other) if one != other else (one, f"{one}a")


def _named(rng, kind: str) -> tuple[str, str, str]:
    """A subject with a name, twice, and one with a similar name."""
    subject, alike = _SUBJECTS[kind](rng)
    return subject, subject, alike


def _bare(subject: str) -> str:
    """The subject without its article."""
    return subject.split(" ", 1)[1] if subject.split(" ", 1)[0] in _ARTICLES else subject


def _nameless(rng, of_kind: str) -> tuple[str, str, str]:
    """A subject without a name, the same as somebody else may call it, and another one."""
    one, other = map(str, rng.choice(_NOUNS[of_kind], 2, replace=False))
    if of_kind == "rule":
        return one, one, other
    kind, another = rng.choice(_KINDS, 2, replace=False)
    article, second, third = rng.choice(_ARTICLES, 3)
    one, other = (
        (one, other),
        (one, other),
        (f"{kind} {one}", f"{another} {one}"),
        (f"{kind} {one}", f"{kind} {other}"),
        (one, f"{kind} {one}"),
    )[rng.integers(5)]
    return (f"{article} {one}", f"{second} {one}", f"{third} {other}")


def _person(rng) -> tuple[str, str]:
    first, second = _two(rng, lambda rng: _name(rng, "first"))
    last, other = _two(rng, lambda rng: _name(rng, "last"))
    middle = f" {_pick(rng, _ALPHABET).upper()}." if rng.integers(5) == 0 else ""
    alike = (f"{first} {other}", f"{second} {last}", f"{first}{middle} {other}")[rng.integers(3)]
    return f"{first}{middle} {last}", alike


def _place(rng) -> tuple[str, str]:
    (one, other), site = _two(rng, _made), _pick(rng, _NAMES["site"])
    wider = _pick(rng, ("North", "South", "Upper", "New", "Saint", "Port", "Mount", "Lake"))
    return (
        (f"{one} {site}", f"{other} {site}"),
        (f"{one} {site}", f"{one} {_pick(rng, _NAMES['site'])} {other}"),
        (one, other),
        (f"{wider} {one}", f"{wider} {other}"),
        (one, f"{wider} {one}"),
        (f"{site} of {one}", f"{site} of {other}"),
    )[rng.integers(6)]


def _work(rng) -> tuple[str, str]:
    (one, other), name = _two(rng, lambda rng: _pick(rng, _NAMES["noun"]).capitalize()), _made(rng)
    number = int(rng.integers(2, 6))
    return (
        (f"The {one} of {name}", f"The {other} of {name}"),
        (f"The {name} {one}", f"The {name} {other}"),
        (f"{one} and {name}", f"{other} and {name}"),
        (f"{one} {name}", f"{one} {_made(rng)}"),
        (f"{name} {number}", f"{name} {number + 1}"),
        (f"My {one}", f"My {other}"),
        (name, f"{name} {one}"),
    )[rng.integers(7)]


def _organisation(rng) -> tuple[str, str]:
    (one, other), firm = _two(rng, lambda rng: _name(rng, "last")), _pick(rng, _NAMES["firm"])
    return (
        (f"{one} {firm}", f"{other} {firm}"),
        (f"{one} {firm}", f"{one} {_pick(rng, _NAMES['firm'])} {other}"),
        (f"{firm} of {one}", f"{firm} of {other}"),
        (one, other),
        (one, f"{one} {firm}"),
    )[rng.integers(5)]


def _product(rng) -> tuple[str, str]:
    (one, other), line, gear = _two(rng, _made), _pick(rng, _NAMES["line"]), _pick(rng, _NAMES["gear"])
    number = int(10 ** rng.uniform(0, 4))
    letter = _pick(rng, _ALPHABET).upper()
    return (
        (f"the {one} {gear} {number}", f"the {one} {gear} {number + 1}"),
        (f"{one} {line}", f"{one} {_pick(rng, [x for x in _NAMES['line'] if x != line])}"),
        (f"{one} {letter}{number}", f"{one} {letter}{number + int(rng.integers(1, 99))}"),
        (f"the {gear} {one} {line}", f"the {gear} {other} {line}"),
        (f"{one} {number}", f"{other} {number}"),
    )[rng.integers(5)]


def _thing(rng) -> tuple[str, str]:
    (one, other), number = _two(rng, _made), int(10 ** rng.uniform(1, 5))
    code = "".join(_pick(rng, _ALPHABET).upper() for _ in range(rng.integers(2, 5)))
    return (
        (one, other),
        (f"{code}{number % 10}", f"{code}{(number + 1) % 10}"),
        (f"{number} {one}", f"{number + int(rng.integers(1, 50))} {other}"),
        (f"{code} {number}", f"{code} {number + int(rng.integers(1, 50))}"),
        (f"{one} {other.lower()}", f"{one} {_made(rng).lower()}"),
    )[rng.integers(5)]


def _event(rng) -> tuple[str, str]:
    (one, other), rite, year = _two(rng, _made), _pick(rng, _NAMES["rite"]), int(rng.integers(1700, 2030))
    return (
        (f"the {rite} of {one}", f"the {rite} of {other}"),
        (f"the {year} {one} {rite}", f"the {year + int(rng.integers(1, 9))} {one} {rite}"),
        (f"the {year} {one} {rite}", f"the {year} {other} {rite}"),
        (f"the {one} {rite}", f"the {one} {_pick(rng, [x for x in _NAMES['rite'] if x != rite])}"),
    )[rng.integers(4)]


_SUBJECTS = {
    "person": _person,
    "place": _place,
    "work": _work,
    "organisation": _organisation,
    "product": _product,
    "thing": _thing,
    "event": _event,
}
