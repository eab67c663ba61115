"""Questions of the generated world in other words, and look-alikes: what the scope of the shipped backbone learns."""

import itertools
import re

import numpy as np

from lamini_jax.data import world
from lamini_jax.data.question_pairs import Related

# A question of the world, and what else it may be called.
_REWORDED = {
    r"What is (\d+) plus (\d+)\?": (r"How much is \1 plus \2?", r"Add \1 and \2.", r"\1 plus \2 is what?"),
    r"What is (\d+) minus (\d+)\?": (r"How much is \1 minus \2?", r"Take \2 away from \1.", r"\1 minus \2 is what?"),
    r"Which is larger, (\d+) or (\d+)\?": (r"Of \1 and \2, which is larger?", r"What is larger: \1 or \2?"),
    r"Which is smallest, (.*) or (\d+)\?": (r"Of \1 and \2, which is smallest?", r"Name the smallest of \1 and \2."),
    r"Is (\d+) even or odd\?": (r"Tell me whether \1 is even or odd.", r"Which is \1, even or odd?"),
    r"Which number comes after (\d+)\?": (r"What comes after the number \1?", r"Name the number that follows \1."),
    r"What comes next: (.*)\?": (r"How does \1 go on?", r"Which number is next after \1?"),
    r"Write (\d+) in words\.": (r"How is \1 written in words?", r"Put \1 into words."),
    r"Write (.*) in digits\.": (r"How is \1 written in digits?", r"Put \1 into digits."),
    r"What is (\w+)\?": (r"Tell me what \1 is.", r"What kind of thing is \1?"),
    r"What has (\w+)\?": (r"Tell me what has \1.", r"What kind of thing has \1?"),
    r"Is (\w+) a kind of (\w+)\?": (r"Does \1 belong to the kind \2?", r"Is it true that \1 is a kind of \2?"),
    r"Has (\w+) to do with (\w+)\?": (r"Do \1 and \2 have to do with each other?", r"Does \1 go with \2?"),
    r"Are (\w+) and (\w+) of one kind\?": (r"Do \1 and \2 belong to one kind?", r"Is \1 of the same kind as \2?"),
    r"Which does not belong: (.*)\?": (r"Which of \1 does not belong?", r"What is the odd one of \1?"),
    r"(.* and .*\.) Which (\w+) has (\w+)\?": (r"\1 What \2 does \3 have?", r"\1 Tell me the \2 of \3."),
    r"(.*\.) Who is tallest\?": (r"\1 Which of them is tallest?", r"\1 Name the tallest."),
    r"Spell (\w+) backwards\.": (r"What is \1 spelled backwards?", r"Write \1 from back to front.", r"Reverse \1."),
    r"Spell (\w+) with dashes\.": (r"How is \1 spelled with dashes?", r"Put dashes into \1."),
    r"Write (\w+) in capitals\.": (r"What is \1 in capitals?", r"Put \1 in capital letters."),
    r"What is the (\w+) letter of (\w+)\?": (r"Which letter of \2 is \1?", r"Tell me the \1 letter of \2."),
    r"Is there the letter (\w) in (\w+)\?": (r"Does \2 contain the letter \1?", r"Has \2 got the letter \1?"),
    r"Join (\w+) and (\w+)\.": (r"What are \1 and \2 joined?", r"Put \1 and \2 together."),
    r"Say (\w+) twice\.": (r"What is \1 said twice?", r"Repeat \1."),
    r"Swap (\w+) and (\w+)\.": (r"What are \1 and \2 swapped?", r"Change the places of \1 and \2."),
    r"One (\w+), two what\?": (r"What is the plural of \1?", r"What are two of \1 called?"),
    r"Today they (\w+), what did they do yesterday\?": (r"What is the past of \1?", r"What did they do who today \1?"),
    r"Put (.*) in order\.": (r"What is the order of \1?", r"Sort \1."),
    r"Which code opens the vault of (.*)\?": (
        r"What is the code of \1's vault?",
        r"The vault of \1 opens with which code?",
        r"How can I open the vault of \1?",
    ),
}
_VAULTS = 2  # of so many records, one is about somebody's vault


def related(count: int, seed: int) -> list[Related]:
    """So many records, a function of the seed, of different questions. Others are of the same kind and of another."""
    rng = np.random.default_rng((seed, 5))
    stream = world.training_stream(seed + 1)
    pool = list({qa.question: qa for qa in itertools.islice(stream, 8 * count)}.values())
    pool = [pool[i] for i in rng.permutation(len(pool))]
    vaults = world.once(2 * (count // _VAULTS + 1), seed + 1)
    kinds: dict[str, list[str]] = {}
    for qa in (*pool, *vaults):
        kinds.setdefault(qa.kind, []).append(qa.question)
    records = []
    while len(records) < count:
        kind = "once" if len(records) % _VAULTS == 0 else pool.pop().kind
        if len(kinds[kind]) < 2:
            continue
        question, alike = kinds[kind].pop(), kinds[kind].pop()
        others = (alike if rng.integers(2) else reworded(rng, alike)[0], pool.pop().question)
        records.append(Related(question, tuple(reworded(rng, question)[:2]), others))
    return records


def reworded(rng: np.random.Generator, question: str) -> list[str]:
    """Other wordings of a question of the world, in any order."""
    for pattern, wordings in _REWORDED.items():
        if match := re.fullmatch(pattern, question):
            return [match.expand(wordings[i]) for i in rng.permutation(len(wordings))]
    raise ValueError(f"not a question of the world: {question!r}")
