"""What a scene says in words: relations, captions, their foils, and sentences that are true of one thing alone.

Words come last: relations are read off the drawn geometry, sentences off relations and attributes. What a word means
is written beside it, and holds by construction.

=============  ======================================================================================================
relation       of a to b
=============  ======================================================================================================
left of        the middle of a's whole box is left of b's by more than `MARGIN` of the image's side; right of,
               above and below likewise
in front of    a is nearer and their whole masks share a pixel; behind is the reverse
larger than    a's radius is more than `RATIO` times b's; smaller than is the reverse
=============  ======================================================================================================
"""

from typing import NamedTuple

import numpy as np

from vertebra.data.sprites.pictures import Part
from vertebra.data.sprites.rendering import Render
from vertebra.data.sprites.scenes import ATTRIBUTES, World, generator

RELATIONS = ("left of", "right of", "above", "below", "in front of", "behind", "larger than", "smaller than")
"""Names; 2k and 2k + 1 are each other's reverse."""

MARGIN, RATIO = 0.08, 1.2

CAPTIONS = 5
"""Captions a scene."""

_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "larger than": ("larger than", "bigger than"),
}
_SIZES = {"small": ("small", "little"), "large": ("large", "big")}
_SUPERLATIVES = ("leftmost", "rightmost", "highest", "lowest", "largest", "smallest")
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_TOLD = 4  # things that a caption tells one by one; more are counted

# Attributes that tell a thing apart: columns of `Facts.values`, shortest first.
_CLASS, _COLOUR, _SIZE, _TEXTURE, _POSITION = range(5)
_TRAITS = (
    *((_CLASS,), (_COLOUR,), (_TEXTURE,), (_SIZE,)),
    *((_COLOUR, _CLASS), (_SIZE, _CLASS), (_TEXTURE, _CLASS)),
    *((_COLOUR, _TEXTURE, _CLASS), (_SIZE, _COLOUR, _CLASS), (_SIZE, _COLOUR, _TEXTURE, _CLASS)),
)
_PLACED = ((_POSITION,), (_CLASS, _POSITION), (_COLOUR, _CLASS, _POSITION), (_SIZE, _COLOUR, _CLASS, _POSITION))


class Facts(NamedTuple):
    """What words are made of.

    Attributes:
        names: per thing its class, colour, size, texture and position in words; "" where it has none.
        values: (n, 5) int64, the same as numbers; -1 where it has none.
        related: (8, n, n) bool, whether relation r holds of thing i to thing j.
        extremes: (6, n) float, what the superlatives compare; the largest has it.
    """

    names: list[tuple[str, ...]]
    values: np.ndarray
    related: np.ndarray
    extremes: np.ndarray


class Referring(NamedTuple):
    """A sentence that is true of exactly one thing.

    Attributes:
        text: such as "the striped star left of the red heart".
        thing: index of the thing.
    """

    text: str
    thing: int


def whole_boxes(render: Render) -> np.ndarray:
    """Boxes (n, 4) float32 xyxy of the things as if nothing were in front."""
    boxes = np.empty((len(render.stamps), 4), dtype=np.float32)
    for place, stamp in enumerate(render.stamps):
        solid = stamp.alpha >= min(0.5, float(stamp.alpha.max()))
        rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
        boxes[place] = (
            stamp.left + columns[0],
            stamp.top + rows[0],
            stamp.left + columns[-1] + 1,
            stamp.top + rows[-1] + 1,
        )
    return boxes


def related(render: Render) -> np.ndarray:
    """Which relations hold, (8, n, n) bool: `related[r, i, j]` of thing i to thing j."""
    boxes, side, count = whole_boxes(render), render.ids.shape[1], len(render.boxes)
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    solid = np.stack([render.alpha(thing) for thing in range(count)]).reshape(count, -1)
    solid = (solid >= np.minimum(0.5, solid.max(1, keepdims=True))).astype(np.float32)
    depth, radius = render.plan.depth, render.plan.radius
    left = x[:, None] + MARGIN * side < x[None, :]
    above = y[:, None] + MARGIN * side < y[None, :]
    front = (depth[:, None] < depth[None, :]) & (solid @ solid.T > 0)
    larger = radius[:, None] > RATIO * radius[None, :]
    return np.stack([left, left.T, above, above.T, front, front.T, larger, larger.T])


def facts(world: World, render: Render) -> Facts:
    """What words about a scene are made of."""
    planned = render.plan
    positions = planned.positions(world.size)
    values = np.stack([planned.labels, planned.colours, planned.sizes, planned.textures, positions], 1)
    spelled = (world.classes, *(world.values(attribute) for attribute in ATTRIBUTES))
    names = [
        tuple("" if number < 0 else words[number] for words, number in zip(spelled, row, strict=True))
        for row in values.tolist()
    ]
    boxes, side = whole_boxes(render), world.size
    x, y = (boxes[:, 0] + boxes[:, 2]) / (2 * side), (boxes[:, 1] + boxes[:, 3]) / (2 * side)
    size = np.log(planned.radius)
    return Facts(names, values, related(render), np.stack([-x, x, -y, y, size, -size]))


def _noun_phrase(names: tuple[str, ...], shown: tuple[int, ...]) -> str:
    """Such as "large red striped star"; the noun is "thing" where the class is not told."""
    words = [names[column] for column in (_SIZE, _COLOUR, _TEXTURE) if column in shown and names[column]]
    phrase = " ".join([*words, names[_CLASS] if _CLASS in shown else "thing"])
    return f"{phrase} {_place(names[_POSITION])}" if _POSITION in shown else phrase


def _place(position: str) -> str:
    side = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
    return side.get(position, f"in the {position}")


def with_article(phrase: str) -> str:
    """Such as "an eight" and "a one"."""
    return f"an {phrase}" if phrase[0] in "aeiou" and not phrase.startswith("one") else f"a {phrase}"


def _said(word: str, random: np.random.Generator) -> str:
    choices = _PHRASES.get(word) or _SIZES.get(word) or (word,)
    return choices[int(random.random() * len(choices))]


# Captions


def captions(world: World, part: Part, index: int, known: Facts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions of a scene, and a foil of each.

    Up to four things are told one by one, the first two in a relation; more are counted. The first caption tells all
    attributes, the others some of them.

    Returns:
        `CAPTIONS` captions; and of each the same words in another order that are false of the scene, "" where there
        are none.
    """
    random = generator(world.seed, part, index, "words")
    if len(known.names) > _TOLD:
        return (counted(known),) * CAPTIONS, ("",) * CAPTIONS
    pairs = [_caption(known, random, detailed=number == 0) for number in range(CAPTIONS)]
    return tuple(caption for caption, _ in pairs), tuple(foil for _, foil in pairs)


def counted(known: Facts) -> str:
    """A caption that counts, such as "five things: two stars, a heart and two sixes"."""
    numbers, counts = np.unique(known.values[:, _CLASS], return_counts=True)
    first = {int(number): int(np.argmax(known.values[:, _CLASS] == number)) for number in numbers}
    told = []
    for number, count in sorted(zip(numbers.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1]):
        name = known.names[first[number]][_CLASS]
        told.append(with_article(name) if count == 1 else f"{_number(count)} {_plural(name)}")
    return f"{_number(len(known.names))} things: {_listed(told)}"


def _number(count: int) -> str:
    return _COUNTS[count] if count < len(_COUNTS) else str(count)


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith(("s", "x", "ch", "sh")) else f"{name}s"


def _listed(told: list[str]) -> str:
    return f"{', '.join(told[:-1])} and {told[-1]}" if len(told) > 1 else told[0]


def _caption(known: Facts, random: np.random.Generator, detailed: bool) -> tuple[str, str]:
    """A caption, and its foil."""
    dropped = [column for column in (_COLOUR, _TEXTURE, _SIZE) if not detailed and random.random() < 0.4]
    shown = [_telling(names, dropped) for names in known.names]
    order = random.permutation(len(shown)).tolist()
    phrases = [
        with_article(_noun_phrase(_reworded(names, random), told))
        for names, told in zip(known.names, shown, strict=True)
    ]
    held = np.argwhere(known.related)
    if not len(held):
        return _listed([f"{phrases[thing]} {_place(known.names[thing][_POSITION])}" for thing in order]), ""
    relation, first, second = held[int(random.random() * len(held))].tolist()
    rest = [phrases[thing] for thing in order if thing not in (first, second)]
    word, more = _said(RELATIONS[relation], random), f", and {_listed(rest)}" if rest else ""
    foil = f"{phrases[second]} {word} {phrases[first]}{more}"
    true_too = _told_of(known, relation, second, first, shown)
    return f"{phrases[first]} {word} {phrases[second]}{more}", "" if true_too else foil


def _telling(names: tuple[str, ...], dropped: list[int]) -> tuple[int, ...]:
    """Columns that a caption tells of a thing: "medium" goes without saying, and so does "plain"."""
    unsaid = [column for column, word in ((_SIZE, "medium"), (_TEXTURE, "plain")) if names[column] == word]
    return tuple(c for c in (_SIZE, _COLOUR, _TEXTURE, _CLASS) if c not in dropped and c not in unsaid)


def _reworded(names: tuple[str, ...], random: np.random.Generator) -> tuple[str, ...]:
    """The names, with one of the words for the size."""
    return (*names[:_SIZE], _said(names[_SIZE], random), *names[_SIZE + 1 :])


def _told_of(known: Facts, relation: int, first: int, second: int, shown: list[tuple[int, ...]]) -> bool:
    """Whether a relation holds of any two things that the phrases for `first` and `second` fit."""
    alike = [(known.values[:, shown[thing]] == known.values[thing, shown[thing]]).all(1) for thing in (first, second)]
    return bool((known.related[relation] & alike[0][:, None] & alike[1][None, :]).any())


# Referring


def referring(world: World, part: Part, index: int, known: Facts) -> tuple[Referring, ...]:
    """Sentences that are true of exactly one thing: by attributes, by place or rank, and by relation.

    Up to three a thing, fewer where a kind finds none: two equal things in one place have none at all.
    """
    random = generator(world.seed, part, index, "referring")
    unique = [_unique(known, thing, _TRAITS) for thing in range(len(known.names))]
    found = []
    for thing, traits in enumerate(unique):
        kinds = [
            [f"the {_noun_phrase(known.names[thing], shown)}" for shown in _shortest(traits)],
            _by_place(known, thing),
            _by_relation(known, thing, unique),
        ]
        found += [Referring(some[int(random.random() * len(some))], thing) for some in kinds if some]
    return tuple(found)


def _matches(known: Facts, thing: int, shown: tuple[int, ...]) -> np.ndarray:
    """Things that share the attributes at `shown`, (n,) bool; none where the thing lacks one of them."""
    wanted = known.values[thing, shown]
    return (known.values[:, shown] == wanted).all(1) & (wanted >= 0).all()


def _unique(known: Facts, thing: int, choices: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    """The choices of attributes that tell a thing from all others."""
    return [shown for shown in choices if _matches(known, thing, shown).sum() == 1]


def _shortest(choices: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [shown for shown in choices if len(shown) == len(choices[0])]


def _by_place(known: Facts, thing: int) -> list[str]:
    """Sentences with a position or a superlative."""
    found = [f"the {_noun_phrase(known.names[thing], shown)}" for shown in _unique(known, thing, _PLACED)[:1]]
    for shown in ((), (_CLASS,)):
        rivals = _matches(known, thing, shown) if shown else np.ones(len(known.names), dtype=bool)
        rivals[thing] = False
        if not rivals.any():
            continue
        margins = known.extremes[:, thing] - known.extremes[:, rivals].max(1)
        noun = _noun_phrase(known.names[thing], shown)
        clear = margins > np.array([MARGIN] * 4 + [np.log(RATIO)] * 2)
        found += [f"the {word} {noun}" for word, told in zip(_SUPERLATIVES, clear, strict=True) if told]
    return found


def _by_relation(known: Facts, thing: int, unique: list[list[tuple[int, ...]]]) -> list[str]:
    """Sentences with another thing, which is described so that it can be no third one."""
    found = []
    for shown in ((), (_CLASS,), (_COLOUR, _CLASS)):
        alike = _matches(known, thing, shown) if shown else np.ones(len(known.names), dtype=bool)
        counts = (known.related & alike[None, :, None]).sum(1)  # (8, n): things like it in relation to each thing
        for relation, other in np.argwhere(known.related[:, thing] & (counts == 1)).tolist():
            if unique[other]:
                noun = _noun_phrase(known.names[thing], shown)
                found.append(
                    f"the {noun} {RELATIONS[relation]} the {_noun_phrase(known.names[other], unique[other][0])}"
                )
        if found:
            return found
    return found
