"""Writes the sample: an invented world of film reviews, so that everything runs without a network.

    python -m sample.generate        # deterministic; the files it writes are committed

corpus/ has unlabelled reviews. A review stays with one film, its world and people, one reviewer and
one opinion. So segments of one review share a subject, a voice and a tone (next sentence
prediction), and the tone of one word tells the tone of the next (masked language model). reviews/
has single sentences with a label. In its training split only a third of the opinion words occur; in
its test split, mostly the others. A model can know their tone only from the corpus, by the adverbs
before them and the words around: that is what pretraining is for.

Nothing here is SST-2, and no accuracy on it is an accuracy on SST-2.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

from sample import lexicon
from sample.lexicon import BAD, GOOD, items

HERE = Path(__file__).parent
REVIEWS, HELD_OUT_REVIEWS = 1500, 150
LABELLED = {"train": 400, "validation": 300, "test": 600}
SEEN = 3  # every third opinion word occurs with a label in training


def make_film(rng: random.Random) -> dict[str, Any]:
    """What fills the slots of sentences about one film, the same in all of them."""
    genre, world = rng.choice(list(lexicon.WORLDS.items()))
    she = rng.random() < 0.5
    actor, hero = rng.sample(lexicon.WOMEN if she else lexicon.MEN, 2)
    others = [name for name in lexicon.MEN + lexicon.WOMEN if name not in (actor, hero)]
    director, actor2, rival = rng.sample(others, 3)
    director_last, actor_last, last2 = rng.sample(lexicon.LAST, 3)
    job, job2 = rng.sample(items(world["job"]), 2)
    titles = lexicon.TITLE_1, lexicon.TITLE_2
    return {
        "title": rng.choice(["", "The "]) + " ".join(map(rng.choice, titles)),
        "genre": genre, "voice": rng.choice(list(lexicon.VOICES)),
        "year": str(rng.randint(1950, 2020)),
        "director": f"{director} {director_last}", "director_last": director_last,
        "actor": f"{actor} {actor_last}", "actor_last": actor_last, "actor2": f"{actor2} {last2}",
        "hero": hero, "rival": rival, "they": "she" if she else "he",
 "job": job, "job2": job2,
        "place": rng.choice(items(world["place"], ";")),
        "want": rng.choice(items(world["want"], ";")),
        "things": rng.sample(items(world["thing"]), 5),
    }  # fmt: skip


def sentence(rng: random.Random, pattern: str, film: dict[str, Any], good: bool,
             words: list[str], adverbs: list[str]) -> str:  # fmt: skip
    """A pattern with its slots filled: by the film, its world, and words of one opinion. More than
    half of them follow an adverb of the same tone, if there are any."""
    thing, thing2 = rng.sample(film["things"], 2)
    opinions = (f"{rng.choice(adverbs)} {word}" if adverbs and rng.random() < 0.6 else word
                for word in rng.sample(words, 2))  # fmt: skip
    text = pattern.format(
        **film, thing=thing, thing2=thing2, aspect=rng.choice(lexicon.ASPECTS),
        adj=next(opinions), adj2=next(opinions),
        verb=rng.choice(lexicon.GOOD_VERBS if good else lexicon.BAD_VERBS))  # fmt: skip
    if film["voice"] == "club":
        text = re.sub(r"[a-z]+", lambda word: lexicon.PAST.get(word[0], word[0]), text)
    text = re.sub(r"\b([Aa]) (?!uni)(?=[aeiou])", r"\1n ", text)  # a inventive -> an inventive
    return text[0].upper() + text[1:] + "."


def review(rng: random.Random) -> str:
    film, good = make_film(rng), rng.random() < 0.5
    voice = lexicon.VOICES[film["voice"]]
    scenes = items(lexicon.WORLDS[film["genre"]]["event"], ";")
    ends = lexicon.GOOD_ENDS if good else lexicon.BAD_ENDS
    words, adverbs = (GOOD, lexicon.GOOD_ADVERBS) if good else (BAD, lexicon.BAD_ADVERBS)
    patterns = [
        *rng.sample(items(voice["fact"], "\n"), rng.randint(4, 7)),
        *rng.sample(items(voice["opinion"], "\n"), rng.randint(6, 9)),
        *(voice["scene"] + scene for scene in rng.sample(scenes, rng.randint(2, 3))),
    ]
    rng.shuffle(patterns)
    patterns += [voice["advice"] + end for end in rng.sample(ends, rng.randint(1, 2))]
    sentences = [sentence(rng, pattern, film, good, words, adverbs) for pattern in patterns]
    cut = rng.randint(3, len(sentences) - 3)
    title = f"{film['title']} ({film['year']})."
    return " ".join([title, *sentences[:cut]]) + "\n\n" + " ".join(sentences[cut:])


def labelled(rng: random.Random, seen: bool) -> dict:
    """A sentence with a label, its opinion words from the third that is `seen`, or the others; with
    no adverb, which would tell the label."""
    film, good = make_film(rng), rng.random() < 0.5
    words = [w for i, w in enumerate(GOOD if good else BAD) if (i % SEEN == 0) == seen]
    opinions = items(lexicon.VOICES[film["voice"]]["opinion"], "\n")
    pattern = rng.choice([pattern for pattern in opinions if "{verb}" not in pattern])
    return {"sentence": sentence(rng, pattern, film, good, words, []), "label": int(good)}


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
