"""Draw docs/images/sprites-clips.png, sprites-orbits.png and sprites-rooms.png: the sprite world as it moves.

    python docs/sheets_moving.py [FOLDER]

The same clips, things and houses whenever it runs; nothing but the package and Pillow is needed.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sheets import GREY, INK, PAPER, captioned, font, grid, hue, tile, titled, under

from vertebra.data.sprites.clips import MOTIONS, Clip, clip
from vertebra.data.sprites.orbits import THINGS, Orbit, look_at, orbit, projected
from vertebra.data.sprites.rooms import House, Rooms, Sights, house, look

ROOT = Path(__file__).parent
SHADES = 256
"""Colours of a sheet, which keeps it small."""


def clips() -> Image.Image:
    """Every motion in four frames, then two clips with what is known of them."""
    strips = [captioned(strip(number), [name]) for number, name in enumerate(MOTIONS)]
    shown = clip(11, 4, objects=(3, 3), crossings=1.0, size=104), clip(12, 5, objects=(4, 4), entries=1.0, size=104)
    rows = grid([known(one) for one in shown], 1)
    return titled("Clips: twelve motions, and what is known of every frame", under(grid(strips, 3), rows))


def strip(motion: int) -> Image.Image:
    """Four frames of one thing."""
    name = ("arrow", "star", "heart", "seven", "arrow", "cross")[motion % 6]
    seen = clip(7, 42 + motion, objects=(1, 1), classes=[name], motions=[MOTIONS[motion]], size=70)
    return grid([tile(seen.frames[frame]) for frame in (0, 5, 10, 15)], 4, gap=2)


def known(seen: Clip) -> Image.Image:
    """Every other frame with boxes over its masks, and a sentence a thing."""
    pairs = []
    for frame in range(0, len(seen), 2):
        image = tile(seen.frames[frame])
        pen = ImageDraw.Draw(image)
        plane = np.full((*seen.ids.shape[1:], 3), 236.0)
        for thing, (left, top, right, bottom) in enumerate(seen.boxes[frame].tolist()):
            plane[seen.masks[frame, thing]] = hue(thing)
            if seen.visibility[frame, thing] > 0:
                pen.rectangle((left - 1, top - 1, right, bottom), outline=hue(thing))
        least = int(seen.visibility[frame].argmin())
        told = [f"{least + 1}: {100 * seen.visibility[frame, least]:.0f} % shows"]
        pairs.append(captioned(grid([image, tile(plane)], 1, gap=2), told, 11))
    strip = grid(pairs, 8, gap=4)
    words = Image.new("RGB", (strip.width, 20), PAPER)
    pen, left = ImageDraw.Draw(words), 0.0
    for thing, many in enumerate(seen.sentences):
        pen.rectangle((left, 4, left + 11, 15), fill=hue(thing))
        pen.text((left + 16, 2), f"{thing + 1}: {many[0]}", fill=INK, font=font(12))
        left += pen.textlength(f"{thing + 1}: {many[0]}", font=font(12)) + 34
    return under(strip, words)


def orbits() -> Image.Image:
    """A few views of each class, then all that is known of one view."""
    rows = []
    for number, name in enumerate(THINGS):
        seen = orbit(3, 20 + number, views=8, size=200, label=name)
        rows.append(captioned(grid([smooth(image) for image in seen.images[:4]], 4, gap=2), [name]))
    seen = orbit(3, 5, views=12, size=320, things=(3, 3), points=6000)
    return titled("Orbits: ten classes of things from known cameras", under(grid(rows, 2), channels(seen)))


def smooth(image: np.ndarray) -> Image.Image:
    """An image at half its size."""
    side = len(image) // 2
    return tile(image.reshape(side, 2, side, 2, 3).mean((1, 3)))


def channels(seen: Orbit, view: int = 1) -> Image.Image:
    """Colour, depth, masks, normals and points of one view, side by side."""
    side = seen.images.shape[1]
    metres = np.where(seen.depth[view] > 0, seen.depth[view], np.inf)
    near = (np.clip((7.5 - metres) / 4, 0, 1) ** 1.2)[..., None]
    depth = np.array([40, 30, 90]) * (1 - near) + np.array([255, 230, 140]) * near
    masks = np.full((side, side, 3), 236.0)
    for thing in range(1, len(seen.labels) + 1):
        masks[seen.masks[view] == thing] = hue(thing)
    normals = 127.5 + 127.5 * seen.normals[view]
    tiles = [seen.images[view], depth, masks, normals, cloud(seen)]
    names = ("colour", "depth", "masks", "normals", "points, from above")
    return grid([captioned(smooth(pixels), [name]) for pixels, name in zip(tiles, names, strict=True)], 5)


def cloud(seen: Orbit) -> np.ndarray:
    """The points, from a camera that none of the views has."""
    side = seen.images.shape[1]
    middle = seen.points.mean(0)
    pose = look_at((middle + np.array([2.6, 1.4, 5.6]))[None], middle)[0]
    pixels, depth = projected(seen.points.astype(float), pose, seen.intrinsics)
    shown = np.full((side, side, 3), 250.0)
    for number in np.argsort(-depth):
        column, row = np.floor(pixels[number]).astype(int)
        if 2 <= column < side - 2 and 2 <= row < side - 2:
            shown[row - 1 : row + 2, column - 1 : column + 2] = seen.point_colours[number]
    return shown


def rooms() -> Image.Image:
    """Views with depth and things, then the oracle's way through a house."""
    tiles = []
    for number in (0, 5, 9, 12, 30, 41):
        home = house(2, number)
        seen = best_view(home)
        metres = np.clip(1 - seen.depth[0] / 6, 0, 1)[..., None]
        depth = np.array([40, 30, 90]) * (1 - metres) + np.array([255, 230, 140]) * metres
        masks = np.full((*seen.things.shape[1:], 3), 236.0)
        for thing in np.unique(seen.things)[1:]:
            masks[seen.things[0] == thing] = hue(int(thing))
        tiles.append(grid([smooth(pixels) for pixels in (seen.images[0], depth, masks)], 1, gap=2))
    walks = [walk(episode) for episode in (3, 8)]
    return titled("Rooms: what a walker sees, and the oracle's way to a thing", under(grid(tiles, 6), grid(walks, 1)))


def best_view(home: House, tries: int = 60) -> Sights:
    """The view, out of a few, that shows most things."""
    free, random = home.nodes[home.free.ravel()], np.random.default_rng(0)
    places, headings = free[random.integers(len(free), size=tries)], random.uniform(0, 2 * np.pi, tries)
    things = look([home], places, headings, size=32).things
    shown = [len(np.unique(one)) + 1.5 * min((one > 0).mean(), 0.2) for one in things]
    best = int(np.argmax(shown))
    return look([home], places[best : best + 1], headings[best : best + 1], size=272)


def walk(episode: int) -> Image.Image:
    """The plan of a house with the oracle's way, and what the walker sees on it."""
    env = Rooms(size=272, things=7)
    env.begin(seed=1, options={"episode": episode})
    places, frames, over = [env.place], [env.render()], False
    while not over:
        _, over, _ = env.act(env.oracle())
        places.append(env.place)
        frames.append(env.render())
    chosen = np.linspace(0, len(frames) - 1, 5).round().astype(int)
    info = env.info()
    told = [f"to the {info['goal']}", f"{info['shortest']:.1f} m, SPL {info['spl']:.2f}"]
    views = [captioned(smooth(frames[step]), [f"step {step}"]) for step in chosen]
    return grid([captioned(plan(env, np.array(places)), told), *views], 6)


def plan(env: Rooms, places: np.ndarray, side: int = 136) -> Image.Image:
    """A house from above, with a way through it."""
    home, wide = env.house, 4 * side
    scale = (wide - 16) / home.tiles

    def spot(point: np.ndarray) -> tuple[float, float]:
        return 8 + scale * float(point[0]), wide - 8 - scale * float(point[1])

    image = Image.new("RGB", (wide, wide), PAPER)
    pen = ImageDraw.Draw(image)
    for i in range(home.tiles):
        for j in range(home.tiles):
            left, low = spot(np.array([i, j]))
            floor = tuple(home.palettes[home.rooms[i, j], 1, 4].astype(int).tolist())
            pen.rectangle((left, low - scale, left + scale, low), fill=floor)
    for left, low, right, high in home.walls:
        pen.line((*spot(np.array([left, low])), *spot(np.array([right, high]))), fill=INK, width=12)
    for thing, (x, y) in enumerate(home.places):
        reach, colour = scale * home.halves[thing, 0], tuple(home.colours[thing, 0].astype(int).tolist())
        middle = spot(np.array([x, y]))
        box = (middle[0] - reach, middle[1] - reach, middle[0] + reach, middle[1] + reach)
        pen.ellipse(box, fill=colour, outline=INK, width=4)
    pen.line([spot(place) for place in places], fill=(255, 255, 255), width=14, joint="curve")
    pen.line([spot(place) for place in places], fill=(220, 30, 50), width=8, joint="curve")
    x, y = spot(places[0])
    pen.ellipse((x - 16, y - 16, x + 16, y + 16), fill=(255, 255, 255), outline=GREY, width=4)
    return image.resize((side, side), Image.Resampling.LANCZOS)


SHEETS: dict[str, Callable[[], Image.Image]] = {"clips": clips, "orbits": orbits, "rooms": rooms}


def main() -> None:
    """Draw all sheets."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in SHEETS.items():
        path = folder / f"sprites-{name}.png"
        sheet = make()
        shaded = sheet.quantize(SHADES, Image.Quantize.MEDIANCUT, kmeans=4, dither=Image.Dither.NONE)
        shaded.save(path, optimize=True)
        print(f"{path}  {sheet.width} x {sheet.height}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
