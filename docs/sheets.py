"""Draw docs/images/sprites-*.png: one contact sheet a kind of annotation of the sprite world.

    python docs/sheets.py [FOLDER]

The same scenes whenever it runs; nothing but the package and Pillow is needed.
"""

import colorsys
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vertebra.data.sprites import COLOURS, DEGRADATIONS, GLYPHS, TEXTURES, degrade, psnr, quality, scene, sprites
from vertebra.data.sprites.scenes import Shift
from vertebra.data.sprites.shapes import digit_samples, draw, placed
from vertebra.data.sprites.textures import STRANGE, mixed, pattern, second_colour
from vertebra.data.sprites.things import Scene, Thing

ROOT = Path(__file__).parent
INK, GREY, PAPER = (28, 32, 40), (110, 116, 128), (255, 255, 255)
GAP = 10


def font(size: int = 13) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that sheets look the same on every machine."""
    return ImageFont.load_default(size)


def hue(number: int, saturation: float = 0.75, value: float = 0.95) -> tuple[int, int, int]:
    """Colours that differ, one after the other: steps of the golden ratio around the circle."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + number * 0.618034) % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def tile(pixels: np.ndarray) -> Image.Image:
    """Pixels (H, W, 3) of 0..255 as an image."""
    return Image.fromarray(np.ascontiguousarray(np.rint(pixels).astype(np.uint8)))


def captioned(image: Image.Image, lines: Sequence[str], size: int = 12, centred: bool = True) -> Image.Image:
    """An image with lines of text below it."""
    step = size + 4
    sheet = Image.new("RGB", (image.width, image.height + step * len(lines) + 2), PAPER)
    sheet.paste(image)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        left = (image.width - pen.textlength(line, font=font(size))) / 2 if centred else 0
        pen.text((left, image.height + 2 + step * number), line, fill=INK if number == 0 else GREY, font=font(size))
    return sheet


def grid(tiles: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    """Tiles in rows, each row as high as its highest."""
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    width = columns * max(one.width for one in tiles) + gap * (columns - 1)
    heights = [max(one.height for one in row) for row in rows]
    sheet = Image.new("RGB", (width, sum(heights) + gap * (len(rows) - 1)), PAPER)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for place, one in enumerate(row):
            sheet.paste(one, (place * (max(t.width for t in tiles) + gap), top))
        top += height + gap
    return sheet


def titled(title: str, sheet: Image.Image) -> Image.Image:
    """A sheet with a heading and a margin."""
    whole = Image.new("RGB", (sheet.width + 2 * GAP, sheet.height + 2 * GAP + 28), PAPER)
    ImageDraw.Draw(whole).text((GAP, GAP - 2), title, fill=INK, font=font(16))
    whole.paste(sheet, (GAP, GAP + 28))
    return whole


def overlaid(found: Scene, colours: Sequence[tuple[int, int, int]], share: float = 0.62) -> np.ndarray:
    """The image in grey, its things tinted and outlined."""
    grey = found.image.astype(float).mean(2, keepdims=True).repeat(3, 2) * 0.75 + 40
    for thing, colour in zip(found.things, colours, strict=True):
        tint = grey[thing.visible] * (1 - share) + np.array(colour) * share
        grey[thing.visible] = tint
        grey[rim(thing.visible)] = np.array(colour)
    return grey


def rim(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that touch what is outside."""
    edged = np.pad(mask, 1)
    inner = edged[:-2, 1:-1] & edged[2:, 1:-1] & edged[1:-1, :-2] & edged[1:-1, 2:]
    return mask & ~inner


def scenes_of(count: int, start: int = 0, **options: Any) -> list[Scene]:
    """Consecutive scenes of the documentation's seed."""
    return [scene(7, index, **options) for index in range(start, start + count)]


def classes() -> Image.Image:
    """Every class, three scenes each, one thing a scene."""
    tiles = []
    for number, name in enumerate(GLYPHS):
        some = [tile(scene(number, index, size=84, objects=1, classes=(name,)).image) for index in range(3)]
        tiles.append(captioned(grid(some, 1, gap=2), [name]))
    return titled("Classes: ten handwritten digits and twelve shapes", grid(tiles, 11, gap=8))


def boxes() -> Image.Image:
    """Boxes with their labels."""
    tiles = []
    for found in scenes_of(8, 20, size=220, objects=(1, 5)):
        image = tile(found.image)
        pen = ImageDraw.Draw(image)
        for number, thing in enumerate(found.things):
            left, top, right, bottom = thing.box.tolist()
            pen.rectangle((left - 1, top - 1, right, bottom), outline=hue(number), width=2)
            width = pen.textlength(thing.name, font=font(12)) + 6
            above = top - 17 if top > 18 else bottom
            start = min(left - 1, 220 - width)
            pen.rectangle((start, above, start + width, above + 16), fill=hue(number))
            pen.text((start + 3, above), thing.name, fill=INK, font=font(12))
        tiles.append(image)
    return titled("Boxes and labels", grid(tiles, 4))


def instances() -> Image.Image:
    """Images over their instance masks."""
    tiles = []
    for found in scenes_of(4, 40, size=220, objects=(3, 6)):
        colours = [hue(number) for number in range(len(found.things))]
        tiles += [grid([tile(found.image), tile(overlaid(found, colours))], 1, gap=4)]
    return titled("Instance masks: what shows of each thing", grid(tiles, 4))


def semantic() -> Image.Image:
    """Images over their semantic masks."""
    tiles = []
    names = ("star", "heart", "ring", "seven", "cross")
    for found in scenes_of(4, 60, size=220, objects=(3, 6), classes=names):
        plane = np.full((*found.ids.shape, 3), 236.0)
        for thing in found.things:
            plane[thing.visible] = hue(thing.label)
        tiles.append(grid([tile(found.image), tile(plane)], 1, gap=4))
    return titled("Semantic masks: a class a pixel", under(grid(tiles, 4), legend((*names, "background"))))


def legend(names: Sequence[str]) -> Image.Image:
    """Colours of classes with their names, in a row."""
    strip = Image.new("RGB", (110 * len(names), 20), PAPER)
    pen = ImageDraw.Draw(strip)
    for number, name in enumerate(names):
        colour = (236, 236, 236) if name == "background" else hue(number)
        pen.rectangle((110 * number, 3, 110 * number + 14, 17), fill=colour, outline=GREY)
        pen.text((110 * number + 20, 2), name, fill=INK, font=font(13))
    return strip


def under(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """One image under another."""
    sheet = Image.new("RGB", (max(upper.width, lower.width), upper.height + GAP + lower.height), PAPER)
    sheet.paste(upper)
    sheet.paste(lower, (0, upper.height + GAP))
    return sheet


def panoptic() -> Image.Image:
    """Images over their numbered segments."""
    tiles = []
    for found in scenes_of(4, 80, size=220, objects=(3, 6), classes=("star", "ring", "seven")):
        plane = np.full((*found.ids.shape, 3), 225.0)
        seen: dict[int, int] = {}
        for thing in found.things:
            number = seen[thing.label] = seen.get(thing.label, -1) + 1
            plane[thing.visible] = hue(thing.label, 0.8 - 0.25 * (number % 3), 0.95 - 0.2 * (number % 2))
            plane[rim(thing.visible)] = (60, 60, 60)
        image = tile(plane)
        pen = ImageDraw.Draw(image)
        for number, thing in enumerate(found.things):
            rows, columns = np.nonzero(thing.visible)
            middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
            pen.text((columns[middle], rows[middle]), str(number + 1), fill=INK, font=font(13), anchor="mm")
        pen.text((5, 204), f"{len(found.things) + 1} background", fill=GREY, font=font(12))
        tiles.append(grid([tile(found.image), image], 1, gap=4))
    return titled("Panoptic masks: a segment number a pixel; hues are classes", grid(tiles, 4))


def points() -> Image.Image:
    """Crowds with their points."""
    tiles = []
    for number, count in enumerate((7, 18, 40, 90)):
        found = scene(7, 100 + number, size=220, objects=count)
        image = tile(found.image * 0.75 + 40)
        pen = ImageDraw.Draw(image)
        for thing in found.things:
            pen.ellipse((thing.x - 3, thing.y - 3, thing.x + 3, thing.y + 3), fill=(255, 40, 60), outline=PAPER)
        density = sum(
            np.exp(-((np.arange(220) - t.x) ** 2)[None] / 128 - ((np.arange(220) - t.y) ** 2)[:, None] / 128)
            for t in found.things
        )
        heat = np.clip(np.asarray(density) / 2.2, 0, 1)[:, :, None]
        plane = tile(np.array([24, 20, 60]) * (1 - heat) + np.array([255, 214, 90]) * heat)
        tiles.append(captioned(grid([image, plane], 1, gap=4), [f"{len(found.things)} things"]))
    return titled("Points and counts, and the density that the points make", grid(tiles, 4))


def depth() -> Image.Image:
    """Images over their depth order."""
    tiles = []
    crowded = scenes_of(48, 120, size=220, objects=(4, 6), overlap=0.45, touching=1.0)
    for found in [one for one in crowded if max(thing.hidden for thing in one.things) >= 0.3][:4]:
        plane = np.full((*found.ids.shape, 3), 30.0)
        count = len(found.things)
        for thing in found.things:
            near = 1 - thing.depth / max(1, count - 1)
            plane[thing.visible] = np.array([70, 60, 140]) * (1 - near) + np.array([255, 225, 130]) * near
        for thing in found.things:
            plane[rim(thing.whole >= 0.5) & ~thing.visible] = (255, 90, 90)
        image = tile(plane)
        pen = ImageDraw.Draw(image)
        for thing in found.things:
            rows, columns = np.nonzero(thing.visible)
            middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
            place = float(columns[middle]), float(rows[middle])
            pen.ellipse((place[0] - 9, place[1] - 9, place[0] + 9, place[1] + 9), fill=INK)
            pen.text(place, str(thing.depth), fill=PAPER, font=font(13), anchor="mm")
        most = max(found.things, key=lambda thing: thing.hidden)
        tiles.append(captioned(grid([tile(found.image), image], 1, gap=4), [f"{most.name}: {most.hidden:.0%} hidden"]))
    return titled("Depth order: 0 is nearest; red outlines are what others hide", grid(tiles, 4))


def words() -> Image.Image:
    """Images beside what is said of them."""
    tiles = []
    for found in [one for one in scenes_of(30, 180, size=210, objects=(2, 3)) if len(one.referring) > 5][:4]:
        chosen = [found.referring[place] for place in (0, 2, 5)]
        image = tile(found.image)
        pen = ImageDraw.Draw(image)
        for number, one in enumerate(chosen):
            spot(pen, found.things[one.thing], number)
        lines = [(INK, found.captions[0]), (INK, found.captions[2])]
        lines += [(GREY, f"not: {found.foils[0]}")] if found.foils[0] else []
        lines += [(hue(number, 0.9, 0.62), one.text) for number, one in enumerate(chosen)]
        forward = ("left of", "above", "in front of", "larger than")
        names = [thing.name for thing in found.things]
        edges = [f"{names[a]} {relation} {names[b]}" for a, relation, b in found.relations if relation in forward]
        lines += [(GREY, "graph: " + "; ".join(edges))]
        tiles.append(beside(image, lines, 270))
    return titled("Captions, a false one, referring sentences, and the scene graph", grid(tiles, 2))


def spot(pen: ImageDraw.ImageDraw, thing: Thing, number: int) -> None:
    """The box of a thing, one inside the other where several sentences mean it."""
    left, top, right, bottom = thing.box.tolist()
    out = 2 + 3 * number
    pen.rectangle((left - out, top - out, right + out - 1, bottom + out - 1), outline=hue(number, 0.9, 0.9), width=2)


def beside(image: Image.Image, lines: Sequence[tuple[tuple[int, int, int], str]], width: int) -> Image.Image:
    """An image with wrapped lines of text at its right."""
    sheet = Image.new("RGB", (image.width + GAP + width, 3 * image.height), PAPER)
    sheet.paste(image)
    pen, top = ImageDraw.Draw(sheet), 0
    for colour, line in lines:
        row = ""
        for word in [*line.split(), ""]:
            longer = f"{row} {word}".strip()
            if not word or pen.textlength(longer, font=font(13)) > width:
                pen.text((image.width + GAP, top), row, fill=colour, font=font(13))
                top, row = top + 16, word
            else:
                row = longer
        top += 5
    return sheet.crop((0, 0, sheet.width, max(image.height, top)))


def degradations() -> Image.Image:
    """One row a kind of degradation."""
    tiles = []
    for number, kind in enumerate(DEGRADATIONS):
        clean = scene(7, 210 + 3 * number, size=112, objects=(2, 3)).image
        row = []
        for severity in range(6):
            shown = degrade(clean, kind, severity, np.random.default_rng(0))
            ratio = psnr(clean, shown)
            told = f"{ratio:.1f} dB, quality {quality(ratio):.2f}" if severity else f"{kind}: clean"
            row.append(captioned(tile(shown), [told], 11))
        tiles += row
    return titled("Clean images and degradations at severities 1 to 5", grid(tiles, 6, gap=6))


def shifts() -> Image.Image:
    """The same scenes in four looks."""
    looks: tuple[Shift, ...] = ("none", "texture", "colour", "style")
    tiles = []
    for look in looks:
        row = grid([tile(one.image) for one in scenes_of(6, 240, size=144, objects=(1, 3), shift=look)], 6, gap=4)
        tiles.append(captioned(row, [{"none": "no shift"}.get(look, look)], 13, centred=False))
    return titled("Shifts of the domain: the same scenes, another look", grid(tiles, 1, gap=4))


def attributes() -> Image.Image:
    """Every texture in every colour, on a disc."""
    side, tiles = 64, []
    alpha = placed(draw("circle", 32, 32, 30), side, side)[2][:, :, None]
    columns, rows = np.arange(side, dtype=np.float32)[None] - 31.5, np.arange(side, dtype=np.float32)[:, None] - 31.5
    for texture in (*TEXTURES, *STRANGE):
        for colour in COLOURS.values():
            first = np.array(colour, dtype=np.float32)
            weights = pattern(texture, columns, rows, scale=18, angle=0.5)
            disc = np.full((side, side, 3), 255.0)
            here = mixed(weights, first, second_colour(first))
            rows_of, columns_of, _ = placed(draw("circle", 32, 32, 30), side, side)
            disc[rows_of, columns_of] += alpha * (here[rows_of, columns_of] - disc[rows_of, columns_of])
            tiles.append(captioned(tile(disc), [texture], 11))
    heads = [captioned(Image.new("RGB", (side, 1), PAPER), [name]) for name in COLOURS]
    table = under(grid(heads, 8, gap=16), grid(tiles, 8, gap=16))
    examples = []
    for wanted in ("small", "medium", "large"):
        found = next(
            one
            for one in scenes_of(90, 300, size=170, objects=(1, 2))
            if len(one.things) == 1 and one.things[0].size == wanted
        )
        thing = found.things[0]
        told = [f"{thing.size} {thing.colour} {thing.texture} {thing.name}", thing.position]
        examples.append(captioned(tile(found.image), told))
    sizes = grid(examples, 1)
    sheet = Image.new("RGB", (table.width + 2 * GAP + sizes.width, max(table.height, sizes.height)), PAPER)
    sheet.paste(table)
    sheet.paste(sizes, (table.width + 2 * GAP, 10))
    return titled("Attributes: colour, texture (the lower four only under a shift), size and position", sheet)


def tail() -> Image.Image:
    """Class counts of a long-tailed train split, over one scene of each class."""
    exponents, height, side = (0.0, 1.0, 1.6), 110, 40
    parts = []
    for exponent in exponents:
        counts = sprites(splits={"train": 3000}, objects=1, long_tail=exponent).split("train").counts
        chart = Image.new("RGB", (len(GLYPHS) * (side + 2), height + 16), PAPER)
        pen = ImageDraw.Draw(chart)
        for number, count in enumerate(counts.tolist()):
            left, top = number * (side + 2), 16 + height - round(height * count / max(counts))
            pen.rectangle((left + 5, top, left + side - 5, height + 16), fill=hue(0, 0.6, 0.85))
            pen.text((left + side / 2, top - 8), str(count), fill=INK, font=font(11), anchor="mm")
        parts.append(captioned(chart, [f"exponent {exponent:g}"], 12, centred=False))
    icons = []
    for name in GLYPHS:
        sample = int(digit_samples("train")[GLYPHS.index(name)][0]) if name in GLYPHS[:10] else 0
        rows, columns, alpha = placed(draw(name, 20, 20, 17, sample=sample), side, side)
        icon = np.full((side, side, 3), 255.0)
        icon[rows, columns] -= alpha[:, :, None] * (255 - np.array(INK))
        icons.append(tile(icon))
    return titled("Long tail: images a class among 3,000", under(grid(parts, 1), grid(icons, len(GLYPHS), gap=2)))


SHEETS: dict[str, Callable[[], Image.Image]] = {
    "classes": classes,
    "boxes": boxes,
    "instances": instances,
    "semantic": semantic,
    "panoptic": panoptic,
    "points": points,
    "depth": depth,
    "words": words,
    "attributes": attributes,
    "degradations": degradations,
    "shifts": shifts,
    "tail": tail,
}


def main() -> None:
    """Draw all sheets."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in SHEETS.items():
        path = folder / f"sprites-{name}.png"
        make().quantize(256, Image.Quantize.MEDIANCUT, kmeans=8, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
