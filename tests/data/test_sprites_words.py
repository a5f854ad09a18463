"""Relations, captions, foils and referring sentences, judged by a reader that knows the geometry only."""

import re

import numpy as np
import pytest

from vertebra.data.sprites import COLOURS, POSITIONS, RELATIONS, language, scene
from vertebra.data.sprites.textures import STRANGE, TEXTURES

SIDE = 72
SCENES = [scene(seed, index, size=SIDE, objects=(1, 5)) for seed in (0, 1) for index in range(60)]
ALIKE = [scene(2, index, size=SIDE, objects=(3, 4), classes=("star", "ring")) for index in range(40)]
SIZE_WORDS = {"small": "small", "little": "small", "medium": "medium", "large": "large", "big": "large"}
RELATION_WORDS = {"to the left of": "left of", "to the right of": "right of", "bigger than": "larger than"}
PLACES = {"on the left": "left", "on the right": "right", "at the top": "top", "at the bottom": "bottom"} | {
    f"in the {position}": position for position in POSITIONS
}


def middle(thing):
    """The middle of the box of the whole mask."""
    rows, columns = np.nonzero(thing.whole >= 0.5)
    return (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2


def holds(relation, one, other):
    """Whether a relation is true of two things, from masks, depths and radii."""
    (x, y), (other_x, other_y) = middle(one), middle(other)
    margin = language.MARGIN * SIDE
    touching = bool(((one.whole >= 0.5) & (other.whole >= 0.5)).any())
    return {
        "left of": x + margin < other_x,
        "right of": x > other_x + margin,
        "above": y + margin < other_y,
        "below": y > other_y + margin,
        "in front of": touching and one.depth < other.depth,
        "behind": touching and one.depth > other.depth,
        "larger than": one.radius > language.RATIO * other.radius,
        "smaller than": other.radius > language.RATIO * one.radius,
    }[relation]


def fits(phrase, thing):
    """Whether a noun phrase such as "large red striped star" fits a thing."""
    *adjectives, noun = phrase.split()
    for word in adjectives:
        if word in SIZE_WORDS:
            known = thing.size == SIZE_WORDS[word]
        elif word in COLOURS:
            known = thing.colour == word
        else:
            assert word in (*TEXTURES, *STRANGE), phrase
            known = thing.texture == word
        if not known:
            return False
    return noun in ("thing", thing.name)


def extremes(word, things):
    """Things that lead by the superlative, with those that come close."""
    value = {
        "leftmost": lambda thing: -middle(thing)[0],
        "rightmost": lambda thing: middle(thing)[0],
        "highest": lambda thing: -middle(thing)[1],
        "lowest": lambda thing: middle(thing)[1],
        "largest": lambda thing: thing.radius,
        "smallest": lambda thing: -thing.radius,
    }[word]
    return [thing for thing in things if value(thing) >= max(map(value, things))]


def denoted(phrase, things):
    """Things that "large red star in the upper left", "leftmost star" or "star above the heart" fit."""
    for relation in RELATIONS:
        head, found, rest = phrase.partition(f" {relation} the ")
        if found:
            others = denoted(rest, things)
            return [a for a in denoted(head, things) if any(holds(relation, a, b) for b in others if b is not a)]
    for words, position in PLACES.items():
        if phrase.endswith(f" {words}"):
            kept = denoted(phrase.removesuffix(f" {words}"), things)
            return [thing for thing in kept if thing.position == position]
    first, _, rest = phrase.partition(" ")
    if first in language._SUPERLATIVES:
        return extremes(first, denoted(rest, things))
    return [thing for thing in things if fits(phrase, thing)]


def stated(caption, things):
    """Whether a caption is true: every phrase fits something, and so do the two that are related."""
    bare = caption
    for spelled, relation in RELATION_WORDS.items():
        bare = bare.replace(spelled, relation)
    bare = re.sub(r"\b(an|a) ", "", bare)
    head, _, rest = bare.partition(", and ")
    tail = re.split(r", | and ", rest) if rest else []
    for relation in RELATIONS:
        first, found, second = head.partition(f" {relation} ")
        if found:
            pairs = [(a, b) for a in things for b in things if a is not b and fits(first, a) and fits(second, b)]
            return any(holds(relation, a, b) for a, b in pairs) and all(any(denoted(one, things)) for one in tail)
    return all(any(denoted(one, things)) for one in re.split(r", | and ", bare))


@pytest.mark.parametrize("found", SCENES[:40] + ALIKE[:10])
def test_the_scene_graph_holds_what_geometry_shows_and_nothing_else(found):
    told = set(found.relations)
    assert len(told) == len(found.relations)
    for i, one in enumerate(found.things):
        for j, other in enumerate(found.things):
            for relation in RELATIONS:
                assert ((i, relation, j) in told) == (i != j and holds(relation, one, other)), (i, relation, j)


def test_relations_come_with_their_reverse():
    reverse = dict(zip(RELATIONS[::2], RELATIONS[1::2], strict=True))
    told = {relation for found in SCENES for _, relation, _ in found.relations}
    assert told == set(RELATIONS)
    for found in SCENES:
        forward = {(a, reverse[relation], b) for b, relation, a in found.relations if relation in reverse}
        assert forward == {one for one in found.relations if one[1] in reverse.values()}


@pytest.mark.parametrize("scenes", [SCENES, ALIKE], ids=["usual", "alike"])
def test_referring_sentences_are_true_of_exactly_one_thing(scenes):
    kinds = {"relation": 0, "superlative": 0, "place": 0}
    for found in scenes:
        for text, thing in found.referring:
            assert text.startswith("the ")
            fitting = denoted(text.removeprefix("the "), found.things)
            assert [found.things.index(one) for one in fitting] == [thing], (text, [t.name for t in found.things])
            kinds["relation"] += any(f" {relation} the " in text for relation in RELATIONS)
            kinds["superlative"] += text.split()[1] in language._SUPERLATIVES
            kinds["place"] += any(text.endswith(words) for words in PLACES)
    assert min(kinds.values()) > 20, kinds


def test_nearly_every_thing_is_referred_to():
    referred = [len({one.thing for one in found.referring}) / len(found.things) for found in SCENES]
    assert np.mean(referred) > 0.97


def test_captions_are_true_and_their_foils_false():
    captions = [
        (found, caption, foil) for found in SCENES for caption, foil in zip(found.captions, found.foils, strict=True)
    ]
    told = [one for one in captions if len(one[0].things) <= 4]
    foils = [one for one in told if one[2]]
    assert len(foils) > 150
    for found, caption, foil in told:
        assert stated(caption, found.things), caption
        if foil:
            assert not stated(foil, found.things), foil
            assert sorted(re.findall(r"\w+", foil)) == sorted(re.findall(r"\w+", caption)), (caption, foil)
            assert foil != caption


def test_the_first_caption_tells_every_thing_with_all_that_is_worth_telling():
    for found in SCENES:
        if len(found.things) <= 4:
            for thing in found.things:
                assert thing.name in found.caption
                assert thing.colour in found.caption
                assert (thing.texture in found.caption) or thing.texture == "plain"


def test_many_things_are_counted():
    found = scene(0, 1, size=128, objects=(9, 9), classes=("six", "cross", "star"))
    counts = {name: sum(thing.name == name for thing in found.things) for name in ("six", "cross", "star")}
    plural = {"six": "sixes", "cross": "crosses", "star": "stars"}
    assert found.caption.startswith("nine things: ")
    for name, count in counts.items():
        if count:
            word = language._COUNTS[count]
            assert (f"{word} {plural[name]}" if count > 1 else f"a {name}") in found.caption
    assert set(found.foils) == {""}


def test_articles_sound_right():
    assert [language.with_article(word) for word in ("eight", "one", "orange star", "star")] == [
        *("an eight", "a one", "an orange star", "a star")
    ]


def test_the_graph_is_plain_data():
    graph = SCENES[7].graph
    assert [thing["name"] for thing in graph["things"]] == [thing.name for thing in SCENES[7].things]
    assert graph["things"][0]["box"] == SCENES[7].things[0].box.tolist()
    assert [(one["subject"], one["relation"], one["object"]) for one in graph["relations"]] == list(SCENES[7].relations)


def test_unequal_scenes_get_unequal_words():
    captions = {found.caption for found in SCENES}
    assert len(captions) > 0.97 * len(SCENES)
