"""The sample's world: what its generator promises, and what `make run` shows of it."""

import json
import re
from pathlib import Path


from experiments import story
from sample import generate
from experiments.curves import HERE, best_accuracies, read_lines

SAMPLE = Path(__file__).parents[1] / "sample"
WORLDS = generate.LEXICON["worlds"]
GOOD = generate.LEXICON["tones"]["good"]
BAD = generate.LEXICON["tones"]["bad"]


def rows(file: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / file).read_text().splitlines()]


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_the_files_are_those_that_the_generator_writes(tmp_path):
    generate.main(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("**/*.jsonl"))
    assert len(written) == 5
    for path in written:
        assert (tmp_path / path).read_bytes() == (SAMPLE / path).read_bytes()


def test_a_review_has_one_tone_one_world_and_one_voice():
    """It has no word of the other tone, and no thing or job of another world but for words that
    both have."""
    assert not set(GOOD["words"]) & set(BAD["words"])
    own = {
        genre: words_of(str([world[kind] for kind in ("job", "thing", "place", "event")]))
        for genre, world in WORLDS.items()
    }
    things = {genre: words_of(str(world["thing"])) for genre, world in WORLDS.items()}
    for row in rows("corpus/train.jsonl"):
        words = words_of(row["text"])
        tones = [words & set(adjectives) for adjectives in (GOOD["words"], BAD["words"])]
        assert sum(map(bool, tones)) == 1
        genre = max(things, key=lambda genre: len(words & things[genre]))
        assert len(words & things[genre]) >= 3
        alien = set.union(*(things[other] for other in things if other != genre)) - own[genre]
        assert len(words & alien) <= 3


def test_most_opinion_words_of_the_test_split_never_had_a_label():
    """Nor does an adverb tell the tone of a labelled sentence."""
    opinions = set(GOOD["words"] + BAD["words"])
    adverbs = set(GOOD["adverbs"] + BAD["adverbs"])
    train, test = (
        [words_of(row["sentence"]) & opinions for row in rows(f"reviews/{split}.jsonl")]
        for split in ("train", "test")
    )
    seen = set.union(*train)
    unseen = [words for words in test if not words & seen]
    assert len(seen) <= len(opinions) / 3 + 1
    assert 0.7 < len(unseen) / len(test) < 0.8
    for split in ("train", "validation", "test"):
        assert not any(words_of(r["sentence"]) & adverbs for r in rows(f"reviews/{split}.jsonl"))


def test_the_recorded_run_shows_what_make_run_promises():
    """The raw lines of that run are what the README's table and figure are made of."""
    folder = HERE / "story"
    pretrain = read_lines(folder / "pretrain", split="validation")
    assert max(pretrain["most_frequent_prediction"]) > 0.9  # the same token everywhere,
    assert pretrain["most_frequent_prediction"][-1] < 0.3  # and not any more
    assert 100 * pretrain["mlm_accuracy"][-1] >= story.accuracy_of_most_frequent_token() + 30
    assert pretrain["nsp_accuracy"][-1] >= 0.85
    pretrained, scratch = (best_accuracies(folder / run) for run in ("pretrained", "scratch"))
    assert len(pretrained) == len(scratch) == 3
    assert sum(pretrained) / 3 >= sum(scratch) / 3 + 8
