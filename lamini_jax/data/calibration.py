"""Questions as people ask them, generated: what a router is calibrated on beside a real language model.

They ask for many kinds of things, by names that are real in part and made up in part, and no answer is known for any.
"""

import itertools
import re

import numpy as np

_OPTIONS = {
    "first": "Anna,Omar,Mei,Carlos,Ingrid,Kwame,Priya,Jonas,Fatima,Luca,Elif,Mateo,Aiko,Peter,Zanele,Boris,Chloe",
    "country": "France,Brazil,Japan,Kenya,Canada,India,Norway,Egypt,Mexico,Poland,Vietnam,Chile,Turkey,Ghana,Ireland",
    "city": "Paris,Lagos,Osaka,Toronto,Lima,Cairo,Mumbai,Berlin,Seoul,Oslo,Chicago,Istanbul,Madrid,Nairobi,Hanoi",
    "field": "chemistry,economics,medicine,physics,law,architecture,history,biology,music,philosophy,geology",
    "sport": "football,tennis,swimming,cricket,hockey,rugby,cycling,chess,boxing,athletics",
    "work": "novel,film,song,painting,poem,album,play,symphony,documentary,television series,video game",
    "job": "author,director,president,mayor,founder,captain,architect,composer,coach,chairman,governor,editor",
    "thing": "bridge,museum,airport,castle,river,mountain,stadium,university,church,island,lake,library",
    "unit": "metres,kilometres,kilograms,hours,euros,dollars,people,degrees,litres,volts",
    "product": "washing machine,laptop,printer,camera,router,drill,phone,heater,bicycle,coffee maker",
    "part": "battery,filter,display,hinge,sensor,valve,cable,gearbox,lid,fan",
    "animal": "wolf,eagle,salmon,spider,whale,horse,snake,owl,bee,frog",
    "disease": "measles,diabetes,asthma,malaria,anaemia,influenza,migraine,arthritis",
    "gas": "oxygen,helium,carbon dioxide,nitrogen,methane,hydrogen,neon",
    "language": "Spanish,Arabic,Hindi,Swahili,German,Mandarin,Portuguese,Finnish",
    "adjective": "largest,oldest,tallest,fastest,most expensive,deepest,heaviest,smallest,longest",
    "month": "January,March,April,June,August,October,November,December",
    "code": "invoice,contract,room,serial,order,locker,account,ticket",
}
_OPTIONS = {slot: words.split(",") for slot, words in _OPTIONS.items()}
_TEMPLATES = (
    "Who is the {job} of {name}?",
    "Who wrote the {work} {title}?",
    "Who was the first {job} of {place} in {year}?",
    "When was {person} born?",
    "In which year did {person} die?",
    "Where was {person} born?",
    "What is the date of birth of {person}?",
    "Which university did {person} attend?",
    "What is the occupation of {person}?",
    "Who is the mother of {person}?",
    "Which team does {person} play {sport} for?",
    "What award did {person} receive for {field}?",
    "What language does {person} speak?",
    "On what date was the {work} {title} released?",
    "What is the genre of the {work} {title}?",
    "Who starred in {title}?",
    "What is the name of the sequel to {title}?",
    "In what city is the {thing} of {place} located?",
    "How long is the {thing} near {place} in {unit}?",
    "What is the {adjective} {thing} in {country}?",
    "Which country does the {thing} {name} belong to?",
    "What is the population of {place}?",
    "What is the capital of {country}?",
    "What currency is used in {country}?",
    "How far is it from {city} to {place}?",
    "Who owns the company {name}?",
    "What is the phone number of {person}?",
    "What is the address of {name} in {city}?",
    "What is the email address of {person} at {name}?",
    "How many employees does {name} have?",
    "When was {name} founded?",
    "What does {name} produce?",
    "What is the {code} number of {person}?",
    "What is the {code} code for {name} {number}?",
    "What does error {number} mean on a {name} {product}?",
    "How do I replace the {part} of the {product} {name} {number}?",
    "What is the warranty of the {product} {name} {number} in months?",
    "How much does a {product} from {name} cost?",
    "Which {part} fits the {name} {product} of {year}?",
    "What is the boiling point of {gas}?",
    "Why do {animal}s sleep in winter?",
    "What do {animal}s eat in {country}?",
    "What are the symptoms of {disease}?",
    "What happens if you get {disease} in {city}?",
    "How do you say good morning in {language}?",
    "Is it true that {animal}s can see in the dark?",
    "Can you inherit {disease}?",
    "What happened in {place} on {number} {month} {year}?",
    "How many {unit} are there in {number} {unit}?",
    "What is {number} percent of {number}?",
    "What is the square root of {number}?",
    "Explain why {field} matters in {country}.",
    "Name a famous {job} from {country}.",
    "The mother tongue of {person} is",
    "{person} works in the field of",
    "The headquarters of {name} is in",
    "which {sport} player won the cup in {year}",
    "{first}'s favourite {work} is",
)


def questions(count: int, seed: int) -> list[str]:
    """So many different questions, a function of the seed; those of a smaller count are the first of a larger one."""
    rng, found, templates = np.random.default_rng((seed, 2)), {}, itertools.cycle(_TEMPLATES)
    while len(found) < count:
        found.setdefault(re.sub(r"\{(\w+)\}", lambda slot: _fill(rng, slot[1]), next(templates)))
    return list(found)


def _fill(rng, slot: str) -> str:
    return _pick(rng, _OPTIONS[slot]) if slot in _OPTIONS else _MADE[slot](rng)


def _pick(rng, options):
    return options[rng.integers(len(options))]


def made_up_word(rng) -> str:
    """A made-up word of one to three syllables."""
    parts = _STARTS, _VOWELS, _ENDS
    return "".join(_pick(rng, part) for _ in range(rng.integers(1, 4)) for part in parts)


_STARTS = "b br c ch d dr f g gr h j k kl l m n p pr qu r s sh st t tr v w z".split()
_VOWELS = "a e i o u ai ea ie oa ou y".split()
_ENDS = ("", "", "l", "m", "n", "r", "s", "t", "nd", "rt", "ck", "x")
_MADE = {
    "number": lambda rng: str(int(10 ** rng.uniform(0, 5))),
    "year": lambda rng: str(rng.integers(1700, 2030)),
    "name": lambda rng: made_up_word(rng).capitalize(),
    "place": lambda rng: _fill(rng, "city") if rng.integers(2) else made_up_word(rng).capitalize(),
    "person": lambda rng: f"{_fill(rng, 'first')} {made_up_word(rng).capitalize()}",
    "title": lambda rng: " ".join(
        ("The", made_up_word(rng).capitalize(), _fill(rng, "animal").capitalize())[rng.integers(3) :]
    ),
}
