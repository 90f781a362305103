"""Writes the sample: an invented world of film reviews, so that everything runs without a network.

    python -m sample.generate        # deterministic; the files it writes are committed

corpus/ has unlabeled reviews. A review stays with one film, its world and people, one reviewer and
one opinion. So segments of one review share a subject, a voice and a tone (for next sentence
prediction), and the tone of one word predicts that of the next (for the masked language model).
reviews/ has single sentences with a label. Its training split uses only a third of the opinion
words; its test split uses mostly the others. A model can learn their tone only from the corpus, by
the adverbs before them and the words around them: that is what pretraining is for.

The words are in lexicon.json:
    worlds    where a film is set, who is in it, what things there are, what is wanted, what happens
    tones     the words of good and bad opinions, and how reviews of each kind end
    voices    eight reviewers: how they introduce scenes and advice, how they tell a film's story
              and give their opinion
    past      the verbs of the "club" voice, which talks about films in the past tense

Nothing here is SST-2, and no accuracy on it is an accuracy on SST-2.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LEXICON = json.loads((HERE / "lexicon.json").read_text(encoding="utf-8"))
REVIEWS, HELD_OUT_REVIEWS = 1500, 150
LABELLED = {"train": 400, "validation": 300, "test": 600}
SEEN = 3  # every third opinion word occurs with a label in training


def make_film(rng: random.Random) -> dict[str, Any]:
    """Returns what fills the slots of sentences about one film, the same in all of them."""
    genre, world = rng.choice(list(LEXICON["worlds"].items()))
    she = rng.random() < 0.5
    actor, hero = rng.sample(LEXICON["women" if she else "men"], 2)
    names = LEXICON["men"] + LEXICON["women"]
    others = [name for name in names if name not in (actor, hero)]
    director, actor2, rival = rng.sample(others, 3)
    director_last, actor_last, last2 = rng.sample(LEXICON["last_names"], 3)
    job, job2 = rng.sample(world["job"], 2)
    article = rng.choice(["", "The "])
    title = [rng.choice(LEXICON[part]) for part in ("title_1", "title_2")]
    return {
        "title": article + " ".join(title),
        "genre": genre,
        "voice": rng.choice(list(LEXICON["voices"])),
        "year": str(rng.randint(1950, 2020)),
        "director": f"{director} {director_last}",
        "director_last": director_last,
        "actor": f"{actor} {actor_last}",
        "actor2": f"{actor2} {last2}",
        "hero": hero,
        "rival": rival,
        "they": "she" if she else "he",
        "job": job,
        "job2": job2,
        "place": rng.choice(world["place"]),
        "want": rng.choice(world["want"]),
        "things": rng.sample(world["thing"], 5),
    }


def sentence(rng: random.Random, pattern: str, film: dict[str, Any], tone: dict) -> str:
    """Returns a pattern with its slots filled: by the film, its world, and words of one tone. More
    than half of them follow an adverb of the same tone, if it has any.
    """
    thing, thing2 = rng.sample(film["things"], 2)
    words = rng.sample(tone["words"], 2)
    slots = {"thing": thing, "thing2": thing2, "aspect": rng.choice(LEXICON["aspects"])}
    for slot, word in zip(("adj", "adj2"), words, strict=True):
        slots[slot] = word
        if tone["adverbs"] and rng.random() < 0.6:
            adverb = rng.choice(tone["adverbs"])
            slots[slot] = f"{adverb} {word}"
    slots["verb"] = rng.choice(tone["verbs"])
    text = pattern.format(**film, **slots)
    if film["voice"] == "club":
        past = LEXICON["past"]
        text = re.sub(r"[a-z]+", lambda verb: past.get(verb[0], verb[0]), text)
    text = re.sub(r"\b([Aa]) (?!uni)(?=[aeiou])", r"\1n ", text)  # a inventive -> an inventive
    return text[0].upper() + text[1:] + "."


def review(rng: random.Random) -> str:
    film = make_film(rng)
    tone = LEXICON["tones"]["good" if rng.random() < 0.5 else "bad"]
    voice = LEXICON["voices"][film["voice"]]
    facts = rng.sample(voice["fact"], rng.randint(4, 7))
    opinions = rng.sample(voice["opinion"], rng.randint(6, 9))
    world = LEXICON["worlds"][film["genre"]]
    scenes = rng.sample(world["event"], rng.randint(2, 3))
    patterns = [*facts, *opinions, *(voice["scene"] + scene for scene in scenes)]
    rng.shuffle(patterns)
    ends = rng.sample(tone["ends"], rng.randint(1, 2))
    patterns += [voice["advice"] + end for end in ends]
    sentences = [sentence(rng, pattern, film, tone) for pattern in patterns]
    cut = rng.randint(3, len(sentences) - 3)
    title = f"{film['title']} ({film['year']})."
    first = " ".join([title, *sentences[:cut]])
    second = " ".join(sentences[cut:])
    return f"{first}\n\n{second}"


def labeled(rng: random.Random, seen: bool) -> dict:
    """Returns a labeled sentence. If `seen`, its opinion words are from the third that the training
    split uses, else from the others. It has no adverb, which would reveal the label.
    """
    film = make_film(rng)
    is_good = rng.random() < 0.5
    tone = LEXICON["tones"]["good" if is_good else "bad"]
    words = [word for i, word in enumerate(tone["words"]) if (i % SEEN == 0) == seen]
    opinions = LEXICON["voices"][film["voice"]]["opinion"]
    pattern = rng.choice([pattern for pattern in opinions if "{verb}" not in pattern])
    text = sentence(rng, pattern, film, {**tone, "words": words, "adverbs": []})
    return {"sentence": text, "label": int(is_good)}


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main(folder: Path = HERE) -> None:
    rng = random.Random(2018)
    for split, number in {"train": REVIEWS, "validation": HELD_OUT_REVIEWS}.items():
        rows = [{"text": review(rng)} for _ in range(number)]
        write(folder / f"corpus/{split}.jsonl", rows)
    for split, number in LABELLED.items():
        rows = []
        for _ in range(number):
            seen = split == "train" or rng.random() < 0.25
            rows.append(labeled(rng, seen))
        write(folder / f"reviews/{split}.jsonl", rows)


if __name__ == "__main__":
    main()
