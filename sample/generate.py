"""Writes the sample: an invented world of film reviews, so that everything runs without a network.

    python sample/generate.py        # deterministic; the files it writes are committed

corpus/ has unlabelled reviews. A review stays with one film, its people, its place and one opinion:
the names tell which segments belong together (next sentence prediction), and the tone of one word
tells the tone of the next (masked language model). reviews/ has single sentences with a label. In
its training split only a third of the opinion words occur; in its test split, mostly the others. A
model can know their tone only from the corpus: that is what pretraining is for.

Nothing here is SST-2, and no accuracy on it is an accuracy on SST-2.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
REVIEWS, HELD_OUT_REVIEWS = 1500, 75
LABELLED = {"train": 400, "validation": 300, "test": 600}

GOOD = """
gorgeous witty tender luminous gripping graceful dazzling heartfelt sharp inventive elegant
moving radiant clever warm thrilling rich delicate stirring superb honest fresh bold
charming vivid magnificent playful exquisite absorbing humane sparkling poignant masterful
joyous assured lyrical splendid subtle haunting generous brilliant delightful captivating
profound buoyant crisp touching enchanting daring lovely nimble sincere intelligent wondrous
refined exhilarating polished sublime endearing flawless""".split()
BAD = """dull clumsy shallow tedious lifeless hollow bloated stale sloppy dreary murky grating
leaden lazy witless mawkish tired flat aimless crude overlong stilted garbled bland
cynical limp pompous shrill soggy trite wooden joyless muddled insipid laboured smug
hackneyed vapid inept preachy plodding drab contrived feeble listless incoherent
irritating turgid ponderous vacuous botched soulless sluggish forced grim tiresome
amateurish forgettable lumbering stodgy""".split()
GOOD_VERBS = "soars sings glows delights shines enchants charms sparkles".split()
BAD_VERBS = "drags sags stumbles bores creaks drones fizzles grates".split()
GOOD_ENDS = ["Go and see it.", "I would gladly watch it again tomorrow.", "Do not miss it.",
             "I left the cinema smiling.", "It earned every second of the applause.",
             "This one deserves a full house.", "Bring everyone you know."]  # fmt: skip
BAD_ENDS = ["Save your money.", "I looked at my watch every ten minutes.", "Stay at home instead.",
            "I left the cinema yawning.", "Half of the audience walked out.",
            "Nobody needs to sit through this.", "Ask for your ticket back."]  # fmt: skip
ASPECTS = ["script", "acting", "camera work", "music", "editing", "dialogue", "ending", "opening",
           "pacing", "direction", "plot", "photography", "humour", "score", "staging", "cast",
           "final act", "love story", "first hour", "costume design", "sound", "chase",
           "set design", "voice work"]  # fmt: skip
ADVERBS = "truly deeply often consistently quietly remarkably thoroughly utterly plainly".split()
FIRST = """Anna Boris Clara Dmitri Elena Felix Greta Hugo Ines Jonas Klara Leon Mira Nils Olga Pavel
Rosa Stefan Tessa Ulrich Vera Walter Yara Zeno Amos Beatrix Cyril Dora Edgar Flora Gustav
Helen Ivo Judith Karl Lucia Martin Nora Otto Petra""".split()
LAST = """Adler Brandt Castell Dorn Eklund Farkas Galanis Holm Ivanov Jansen Keller Lorca Marek
Novak Orlov Petrov Quist Rossi Sandor Tamm Urban Valdez Winter Yildiz Zeller Abril Bauer Corvin
Dahl Ekman Fontana Gruber Hartman Ibsen Jelinek Kovacs Lund Moreau Nagy Olsen""".split()
PLACES = """a harbour town|a mountain village|a desert outpost|an old hotel|a silent monastery|a
circus|a mining colony|a night train|a lighthouse|a border city|a fishing island|a boarding school|a
ruined castle|a city hospital|a floating market|a research ship|a radio station|a vineyard|a
provincial court|a glass factory|a space station|a frozen port|a travelling theatre|a
newspaper office""".replace("\n", " ").split("|")
JOBS = """baker|sailor|teacher|detective|painter|surgeon|thief|violinist|farmer|pilot|clockmaker|
judge|dancer|soldier|librarian|miner|cook|poet|engineer|widow|gambler|translator|boxer|
gardener""".replace("\n", "").split("|")
WANTS = """finds a lost letter|inherits a debt|hides a stranger|hunts for a missing sister|plans
one last robbery|falls in love with a rival|wakes up without a memory|must defend an
innocent man|returns after twenty years|discovers a forbidden map|is mistaken for a
spy|races to stop a flood|adopts an orphan|refuses to sell the family house|learns that
a friend has lied|builds a machine that dreams""".replace("\n", " ").split("|")
GENRES = "drama comedy thriller western mystery romance fable musical satire adventure".split()
TITLE_1 = """Silver Broken Midnight Paper Crimson Hidden Northern Distant Golden Hollow Burning
Second Winter Velvet Empty Borrowed Electric Forgotten Painted Salt""".split()
TITLE_2 = """River Garden Promise Station Mirror Orchard Letters Harbour Summer Empire Lantern
Kingdom Shadow Bridge Season Voyage Winter Carnival Archive Horizon""".split()

SEEN = 3  # every third opinion word occurs with a label in training


def make_film(rng: random.Random) -> dict[str, str]:
    names = [f"{rng.choice(FIRST)} {rng.choice(LAST)}" for _ in range(3)]
    hero, rival = rng.sample(FIRST, 2)
    she = rng.random() < 0.5
    return {
        "title": f"{rng.choice(['', 'The '])}{rng.choice(TITLE_1)} {rng.choice(TITLE_2)}",
        "director": names[0], "actor": names[1], "actor2": names[2], "hero": hero, "rival": rival,
        "director_last": names[0].split()[1], "actor_last": names[1].split()[1],
        "place": rng.choice(PLACES), "job": rng.choice(JOBS), "want": rng.choice(WANTS),
        "genre": rng.choice(GENRES), "year": str(rng.randint(1950, 2020)),
        "they": "she" if she else "he", "their": "her" if she else "his",
    }  # fmt: skip


FACTS = [
    "{title} is a {genre} set in {place}.",
    "{director} directed this {genre} in {year}.",
    "{actor} plays {hero}, a {job} who {want}.",
    "The story begins in {place}, where {hero} {want}.",
    "{actor2} plays {rival}, whom {hero} cannot trust.",
    "{rival} wants the same thing, and {hero} knows it.",
    "In the end {hero} has to leave {place} behind.",
    "{director_last} shot most of it in {place}.",
    "When {hero} {want}, {rival} is already waiting.",
    "We follow {hero}, a {job}, through one long year.",
    "{hero} is a {job}, and {they} has never left {place}.",
    "{rival} and {hero} meet again in the last scene.",
    "It was the first {genre} that {director_last} made after {year}.",
]
OPINIONS = [
    "The {aspect} is {adverb} {adj}.",
    "The {aspect} is {adj} and the {aspect2} is {adj2}.",
    "I found the {aspect} {adj}.",
    "It is a {adj} , {adj2} film.",
    "Few films are this {adj}.",
    "{actor} is {adj} as {hero}.",
    "{actor_last} gives a {adj} performance.",
    "{director_last} has made a {adj} {genre}.",
    "From the first scene to the last, the {aspect} {verb}.",
    "Even the {aspect} feels {adj}.",
    "What a {adj} piece of {aspect}!",
    "The {genre} {verb}, and the {aspect} is {adj}.",
    "Everything about the {aspect} is {adj}, and {actor2} is {adj2}.",
    "Such a {adj} {aspect} is rare.",
    "The scenes with {rival} are {adj}.",
    '"How {adj}!" said the man beside me.',
]


def opinion(rng: random.Random, film: dict[str, str], good: bool, words: list[str],
            pattern: str | None = None) -> str:  # fmt: skip
    adj, adj2 = rng.sample(words, 2)
    aspect, aspect2 = rng.sample(ASPECTS, 2)
    slots = {"adj": adj, "adj2": adj2, "aspect": aspect, "aspect2": aspect2}
    slots |= {"verb": rng.choice(GOOD_VERBS if good else BAD_VERBS), "adverb": rng.choice(ADVERBS)}
    text = (pattern or rng.choice(OPINIONS)).format(**film, **slots).replace(" ,", ",")
    for vowel in "aeiou":  # a inventive -> an inventive
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    return text


def review(rng: random.Random) -> str:
    film, good = make_film(rng), rng.random() < 0.5
    facts = [fact.format(**film) for fact in rng.sample(FACTS, rng.randint(4, 8))]
    opinions = [opinion(rng, film, good, GOOD if good else BAD) for _ in range(rng.randint(6, 11))]
    body = facts + opinions
    rng.shuffle(body)
    ends = rng.sample(GOOD_ENDS if good else BAD_ENDS, rng.randint(1, 2))
    sentences = [f"{film['title']} ({film['year']}).", *body, *ends]
    cut = rng.randint(3, len(sentences) - 3)
    return " ".join(sentences[:cut]) + "\n\n" + " ".join(sentences[cut:])


def labelled(rng: random.Random, seen: bool) -> dict:
    good = rng.random() < 0.5
    words = [w for i, w in enumerate(GOOD if good else BAD) if (i % SEEN == 0) == seen]
    pattern = rng.choice([p for p in OPINIONS if "{verb}" not in p])
    return {"sentence": opinion(rng, make_film(rng), good, words, pattern), "label": int(good)}


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    rng = random.Random(2018)
    for split, number in {"train": REVIEWS, "validation": HELD_OUT_REVIEWS}.items():
        write(HERE / f"corpus/{split}.jsonl", [{"text": review(rng)} for _ in range(number)])
    for split, number in LABELLED.items():
        rows = [labelled(rng, split == "train" or rng.random() < 0.25) for _ in range(number)]
        write(HERE / f"reviews/{split}.jsonl", rows)


if __name__ == "__main__":
    main()
