"""Clips as files: a folder of frames with masks and what is known, or a video."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from vertebra.data.sprites.clips.drawing import Clip
from vertebra.data.sprites.clips.motions import MOTIONS
from vertebra.data.sprites.textures import COLOURS
from vertebra.errors import UsageError


def save_frames(seen: Clip, folder: str | Path) -> Path:
    """Write `frames/00000.png ...`, `masks/00000.png ...` and `clip.json`.

    A mask is a palette image whose values are tracks, 0 for the background. `clip.json` says of each thing its track,
    class, colour and sentences, and of each frame its box (xyxy pixels, null where nothing shows), the box of all of
    it, how much shows (0..1) and its motion.

    Args:
        seen: the clip.
        folder: made where it is not there.

    Returns:
        The folder.

    Raises:
        UsageError: the folder holds a clip already.
    """
    root = Path(folder)
    if (root / "clip.json").exists():
        raise UsageError(f"{root} holds a clip already; give another folder")
    for name in ("frames", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    palette = [0, 0, 0, *(level for colour in COLOURS.values() for level in colour)]
    for number, (frame, ids) in enumerate(zip(seen.frames, seen.ids, strict=True)):
        Image.fromarray(frame).save(root / "frames" / f"{number:05d}.png")
        mask = Image.fromarray(ids)
        mask.putpalette(palette)  # which makes it a palette image
        mask.save(root / "masks" / f"{number:05d}.png")
    (root / "clip.json").write_text(json.dumps(_known(seen), indent=1) + "\n", encoding="utf-8")
    return root


def _known(seen: Clip) -> dict[str, object]:
    colours = tuple(COLOURS)
    things = []
    for thing, track in enumerate(seen.tracks.tolist()):
        shows = seen.visibility[:, thing] > 0
        boxes = [box if there else None for box, there in zip(seen.boxes[:, thing].tolist(), shows, strict=True)]
        things.append(
            {
                "track": track,
                "class": seen.classes[seen.labels[thing]],
                "colour": colours[seen.colours[thing]],
                "sentences": list(seen.sentences[thing]),
                "motions": [MOTIONS[motion] for motion in seen.motions[:, thing]],
                "boxes": boxes,
                "whole": seen.whole[:, thing].tolist(),
                "visibility": np.round(seen.visibility[:, thing].astype(float), 4).tolist(),
            }
        )
    return {"frames": len(seen), "size": seen.frames.shape[1], "action": MOTIONS[seen.action], "things": things}


def save_video(seen: Clip, file: str | Path, *, rate: int = 8) -> Path:
    """Write the frames as a video with H.264 at a quality that the eye takes for the original.

    Args:
        seen: the clip; its side must be even.
        file: such as `clip.mp4`; its folder is made where it is not there.
        rate: frames a second.

    Returns:
        The file.

    Raises:
        UsageError: the extra `video` is missing, the side is odd, or the file is there already.
    """
    try:
        import av
    except ImportError as missing:
        raise UsageError("videos are written with PyAV; install it with: pip install 'vertebra[video]'") from missing
    path, side = Path(file), seen.frames.shape[1]
    if side % 2:
        raise UsageError(f"the frames have a side of {side} pixels; H.264 takes even ones only")
    if path.exists():
        raise UsageError(f"{path} is there already; give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "veryfast"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for frame in seen.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path
