"""The generated world: a small language of questions and answers whose rules generalize, and facts that obey no rule.

Each kind of question draws a combination (two numbers, three words, ...) and states its answer. One combination in
eight, chosen by a hash, is held out: it is never trained on in any phrasing, so that answering it shows that the rule
was learned and not the list. What words mean (`vocabulary`) is no rule and is never held out; answers that rest on it
say it on their way. `once` adds facts that follow from nothing and that training shows exactly once.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class QA:
    """One question of the world."""

    kind: str
    question: str
    answer: str


# kind of thing -> (its members, what every member has)
NATURE = {
    "bird": ("robin sparrow eagle owl crow duck hen swan".split(), "wings feathers beaks".split()),
    "fish": ("trout salmon carp cod tuna eel pike bream".split(), "fins gills scales".split()),
    "beast": ("dog cat horse cow wolf fox bear mouse".split(), "fur paws ears".split()),
    "tree": ("oak elm birch pine cedar ash maple willow".split(), "bark leaves branches".split()),
    "tool": ("hammer saw drill wrench axe spade chisel rake".split(), "handles owners prices".split()),
    "metal": ("iron gold tin lead zinc copper silver nickel".split(), "shine melting weight".split()),
    "fruit": ("apple pear plum fig lemon grape peach mango".split(), "pips peel juice".split()),
    "tune": ("march waltz hymn ballad tango polka reel jig".split(), "beats notes rhythm".split()),
}
KIND_OF = {member: kind for kind, (members, _) in NATURE.items() for member in members}
PROPERTY_OF = {name: kind for kind, (_, names) in NATURE.items() for name in names}
MEMBERS, PROPERTIES = list(KIND_OF), list(PROPERTY_OF)
PEOPLE = "Ada Ben Cleo Dan Eve Finn Gus Hana Ivo Jane Kai Lena Max Nora Otis Pia Quin Rosa Sam Tess".split()
COLOURS = "red blue green white black brown pink grey".split()
THINGS = "hat coat scarf bag cup lamp chair clock".split()
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

# What is held out or not (None: never), the question, the answer.
Combination = tuple[object, str, str]


def number_words(n: int) -> str:
    """A number below 1,000 in English words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {number_words(n % 100)}" if n % 100 else "")


def _word(rng, shortest=3, longest=6) -> str:
    """A pronounceable word that means nothing: consonants and vowels in turn."""
    start = rng.integers(2)
    letters = ("bdfgklmnprstvz", "aeiou")
    length = rng.integers(shortest, longest + 1)
    return "".join(letters[(start + i) % 2][rng.integers(len(letters[(start + i) % 2]))] for i in range(length))


def _pick(rng, options, count=1):
    return [options[i] for i in rng.permutation(len(options))[:count]]


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _compared(a: str, b: str) -> str:
    return f"{a} and {b}, {_yes(a == b)}"


def _add(rng) -> Combination:
    a, b = (int(n) for n in rng.integers(100, size=2))
    return (min(a, b), max(a, b)), f"What is {a} plus {b}?", str(a + b)


def _subtract(rng) -> Combination:
    b, a = sorted(int(n) for n in rng.integers(100, size=2))
    return (a, b), f"What is {a} minus {b}?", str(a - b)


def _larger(rng) -> Combination:
    a, b = (int(n) for n in rng.choice(1000, 2, replace=False))
    return (min(a, b), max(a, b)), f"Which is larger, {a} or {b}?", str(max(a, b))


def _smallest(rng) -> Combination:
    numbers = [int(n) for n in rng.choice(100, 3, replace=False)]
    return tuple(sorted(numbers)), "Which is smallest, {}, {} or {}?".format(*numbers), str(min(numbers))


def _parity(rng) -> Combination:
    n = int(rng.integers(10_000))
    return n, f"Is {n} even or odd?", "odd" if n % 2 else "even"


def _successor(rng) -> Combination:
    n = int(rng.integers(10_000))
    return n, f"Which number comes after {n}?", str(n + 1)


def _sequence(rng) -> Combination:
    start, step = int(rng.integers(70)), int(rng.integers(1, 10))
    return (start, step), f"What comes next: {start}, {start + step}, {start + 2 * step}?", str(start + 3 * step)


def _in_words(rng) -> Combination:
    n = int(rng.integers(1000))
    return n, f"Write {n} in words.", number_words(n)


def _in_digits(rng) -> Combination:
    n = int(rng.integers(1000))
    return n, f"Write {number_words(n)} in digits.", str(n)


def _vocabulary(rng) -> Combination:
    if rng.integers(2):
        (member,) = _pick(rng, MEMBERS)
        return None, f"What is {member}?", KIND_OF[member]
    (name,) = _pick(rng, PROPERTIES)
    return None, f"What has {name}?", PROPERTY_OF[name]


def _is_a(rng) -> Combination:
    (member,) = _pick(rng, MEMBERS)
    kind = KIND_OF[member] if rng.integers(2) else _pick(rng, list(NATURE))[0]
    answer = f"{KIND_OF[member]}, {_yes(KIND_OF[member] == kind)}"
    return (member, kind), f"Is {member} a kind of {kind}?", answer


def _has(rng) -> Combination:
    (member,) = _pick(rng, MEMBERS)
    (name,) = _pick(rng, NATURE[KIND_OF[member]][1] if rng.integers(2) else PROPERTIES)
    return (member, name), f"Has {member} to do with {name}?", _compared(KIND_OF[member], PROPERTY_OF[name])


def _same_kind(rng) -> Combination:
    (a,) = _pick(rng, MEMBERS)
    (b,) = _pick(rng, [m for m in (NATURE[KIND_OF[a]][0] if rng.integers(2) else MEMBERS) if m != a])
    return (min(a, b), max(a, b)), f"Are {a} and {b} of one kind?", _compared(KIND_OF[a], KIND_OF[b])


def _odd_one_out(rng) -> Combination:
    kind, other = _pick(rng, list(NATURE), 2)
    (odd,) = _pick(rng, NATURE[other][0])
    words = _pick(rng, [*_pick(rng, NATURE[kind][0], 2), odd], 3)
    kinds = ", ".join(KIND_OF[word] for word in words)
    return tuple(sorted(words)), "Which does not belong: {}, {}, {}?".format(*words), f"{kinds}: {odd}"


def _owner(rng) -> Combination:
    a, b = _pick(rng, PEOPLE, 2)
    x, y = _pick(rng, COLOURS, 2)
    (thing,) = _pick(rng, THINGS)
    asked, colour = ((a, x), (b, y))[rng.integers(2)]
    question = f"{a} has a {x} {thing} and {b} has a {y} {thing}. Which {thing} has {asked}?"
    return (a, b, x, y, thing), question, f"the {colour} {thing}"


def _tallest(rng) -> Combination:
    a, b, c = _pick(rng, PEOPLE, 3)
    pairs = _pick(rng, [f"{a} is taller than {b}.", f"{b} is taller than {c}."], 2)
    return (a, b, c), f"{pairs[0]} {pairs[1]} Who is tallest?", a


def _reverse(rng) -> Combination:
    word = _word(rng, 3, 5)
    return word, f"Spell {word} backwards.", word[::-1]


def _spell(rng) -> Combination:
    word = _word(rng)
    return word, f"Spell {word} with dashes.", "-".join(word)


def _capitals(rng) -> Combination:
    word = _word(rng)
    return word, f"Write {word} in capitals.", word.upper()


def _first_letter(rng) -> Combination:
    word = _word(rng)
    return word, f"What is the first letter of {word}?", word[0]


def _last_letter(rng) -> Combination:
    word = _word(rng)
    return word, f"What is the last letter of {word}?", word[-1]


def _contains(rng) -> Combination:
    word = _word(rng)
    letter = word[rng.integers(len(word))] if rng.integers(2) else "abdefgiklmnoprstuvz"[rng.integers(19)]
    return (word, letter), f"Is there the letter {letter} in {word}?", _yes(letter in word)


def _join(rng) -> Combination:
    a, b = _word(rng, 3, 5), _word(rng, 3, 5)
    return (a, b), f"Join {a} and {b}.", a + b


def _twice(rng) -> Combination:
    word = _word(rng)
    return word, f"Say {word} twice.", f"{word} {word}"


def _swap(rng) -> Combination:
    a, b = _word(rng, 3, 5), _word(rng, 3, 5)
    return (a, b), f"Swap {a} and {b}.", f"{b} and {a}"


def _plural(rng) -> Combination:
    word = _word(rng, 3, 5) + ("x", "sh", "ty", "ne", "rt", "lk", "ch", "ny")[rng.integers(8)]
    ending = word + "es" if word.endswith(("x", "sh", "ch")) else word[:-1] + "ies" if word[-1] == "y" else word + "s"
    return word, f"One {word}, two what?", ending


def _past(rng) -> Combination:
    word = _word(rng, 3, 5) + ("ke", "nt", "ry", "ve", "rk", "py")[rng.integers(6)]
    ending = word + "d" if word[-1] == "e" else word[:-1] + "ied" if word[-1] == "y" else word + "ed"
    return word, f"Today they {word}, what did they do yesterday?", ending


def _sort_letters(rng) -> Combination:
    letters = [chr(ord("a") + int(n)) for n in rng.choice(26, 3, replace=False)]
    return tuple(sorted(letters)), "Put {}, {}, {} in order.".format(*letters), ", ".join(sorted(letters))


# kind -> (how it draws a combination, how often training shows it relative to the others)
KINDS: dict[str, tuple[Callable, float]] = {
    "add": (_add, 3.0),
    "subtract": (_subtract, 3.0),
    "larger": (_larger, 1.0),
    "smallest": (_smallest, 1.5),
    "parity": (_parity, 0.5),
    "successor": (_successor, 1.0),
    "sequence": (_sequence, 2.0),
    "in_words": (_in_words, 0.8),
    "in_digits": (_in_digits, 0.8),
    "vocabulary": (_vocabulary, 0.7),
    "is_a": (_is_a, 1.0),
    "has": (_has, 1.5),
    "same_kind": (_same_kind, 1.5),
    "odd_one_out": (_odd_one_out, 1.5),
    "owner": (_owner, 2.5),
    "tallest": (_tallest, 2.5),
    "reverse": (_reverse, 1.5),
    "spell": (_spell, 0.7),
    "capitals": (_capitals, 0.6),
    "first_letter": (_first_letter, 0.4),
    "last_letter": (_last_letter, 0.5),
    "contains": (_contains, 2.0),
    "join": (_join, 0.6),
    "twice": (_twice, 0.4),
    "swap": (_swap, 0.7),
    "plural": (_plural, 0.8),
    "past": (_past, 0.8),
    "sort_letters": (_sort_letters, 1.0),
}
# The kinds that studies take their facts from; questions of all others are `heldout` to those studies.
FACT_KINDS = ("contains", "has", "is_a", "smallest", "reverse", "sort_letters")


def is_held_out(kind: str, combination: object) -> bool:
    """Whether training never shows this combination; a function of nothing but its arguments."""
    return combination is not None and zlib.crc32(f"{kind}:{combination}".encode()) % 8 == 0


def _draw(kind: str, rng, held_out: bool, tries: int) -> QA | None:
    for _ in range(tries):
        combination, question, answer = KINDS[kind][0](rng)
        if is_held_out(kind, combination) == held_out:
            return QA(kind, question, answer)
    return None


def training_stream(seed: int) -> Iterator[QA]:
    """Endless questions of the training split, all kinds mixed."""
    rng = np.random.default_rng((seed, 1))
    names = list(KINDS)
    weights = np.array([weight for _, weight in KINDS.values()])
    while True:
        for index in rng.choice(len(names), size=1024, p=weights / weights.sum()):
            yield _draw(names[index], rng, held_out=False, tries=1000)


def held_out(kind: str, count: int, seed: int) -> list[QA]:
    """The first `count` different held-out questions of a kind, fewer where it has fewer; `vocabulary` has none."""
    if kind == "vocabulary":
        return []
    rng = np.random.default_rng((seed, 2, *kind.encode()))
    found: dict[str, QA] = {}
    misses = 0
    while len(found) < count and misses < 2000:
        qa = _draw(kind, rng, held_out=True, tries=1000)
        if qa is None or qa.question in found:
            misses += 1
        else:
            found[qa.question] = qa
            misses = 0
    return list(found.values())


def once(count: int, seed: int) -> list[QA]:
    """Arbitrary facts, for training to show exactly once: six random letters and digits that open somebody's vault."""
    rng = np.random.default_rng((seed, 3))
    symbols = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    found: dict[str, QA] = {}
    while len(found) < count:
        owner = f"{_word(rng, 4, 6).title()} {_word(rng, 5, 7).title()}"
        question = f"Which code opens the vault of {owner}?"
        found.setdefault(question, QA("once", question, "".join(symbols[i] for i in rng.integers(36, size=6))))
    return list(found.values())
