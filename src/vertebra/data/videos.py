"""Videos: files, folders of clips, and clips as folders of frames. A clip's image is its middle frame.

Recognised are a file; clips in one folder (no labels), in a folder a class (`CLASS/clip.mp4`), each below folders of
splits where there are any; and folders of frames (`CLIP/frame_0001.jpg` or `CLASS/CLIP/frame_0001.jpg`), where the
files are called frame_N, or the folder above them frames or rawframes. Folders of numbered files may as well be
classes: say `layout="videos"` where they are clips.

====================  ==============================================================================
found                 what is made of it
====================  ==============================================================================
variable frame rate   each frame has its own time; at a time between two, the earlier one is shown
rotation tag          applied
edit list             frames that a player would not show are left out
cut off at the end    what is there is kept; `check` says how much is missing
damaged inside        the last good frame since the key frame stands for a broken one; without one, an error
no picture            an error; sound, and its absence, mean nothing
size changes          frames are resized to the size of the first
playlists             refused whatever their suffix: they lead to other files and to the network
holes in frames       the frames that are there, in the order of their numbers, and a note
====================  ==============================================================================

A clip in memory counts as one image: frames x height x width stay below $VERTEBRA_MAX_PIXELS. Video files need
PyAV: pip install 'vertebra[video]'; folders of frames do not.
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vertebra.data.annotations import starts
from vertebra.data.dataset import Dataset, Split, Store
from vertebra.data.folders import Folder
from vertebra.data.images import decode, pixel_limit
from vertebra.data.partners import checked, each, fresh, header, split_folder
from vertebra.data.splits import Found, OnError, assemble, split_of
from vertebra.errors import DataError, UsageError

if TYPE_CHECKING:
    from vertebra.data.checking import Finding

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp")
)
"""Suffixes, in lower case, of the files that readers take for videos."""

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegvideo,mpegts,asf,flv,ogg"
_FRAME = re.compile(r"frames?[_-]?\d+", re.IGNORECASE)
_FRAME_FOLDERS = {"frames", "rawframes", "video_frames"}
_HOLDERS = {*_FRAME_FOLDERS, "videos", "clips"}
_NUMBER = re.compile(r"(\d+)(?!.*\d)")
_MOST_FRAMES = 2_000_000


@dataclass(frozen=True)
class VideoPlan:
    """Clips by split.

    Attributes:
        clips: split -> (path relative to the root, class or None) of each clip; folders end with "/", but for the root.
        frames: a clip that is a folder -> names of its frames, in order.
    """

    clips: Mapping[str, Sequence[tuple[str, str | None]]]
    frames: Mapping[str, Sequence[str]]


@dataclass(frozen=True, eq=False)
class Timeline:
    """When a video file shows what.

    Attributes:
        stamps: (n,) int64 presentation stamps of the frames, rising.
        times: (n,) float64 seconds from the first frame.
        keys: stamps of the frames that decoding can begin at, rising.
        height: pixels, as stored.
        width: likewise.
        cut: what is missing at the end, in words, or "".
        counted: whether the file gives its frames no stamps of their own (AVI, MPEG programs), so that frames were
            decoded and counted, and stamps are positions.
    """

    stamps: np.ndarray
    times: np.ndarray
    keys: np.ndarray
    height: int
    width: int
    cut: str
    counted: bool = False


@dataclass(frozen=True, eq=False)
class VideoStore(Store):
    """Clips that are files or folders of frames below a root.

    Attributes:
        root: the folder.
        clips: (n,) paths relative to it; folders end with "/".
        first: (n + 1,) int64; `frames[first[i]:first[i + 1]]` are clip i's, none for a video file.
        frames: names of frames.
    """

    root: Path
    clips: np.ndarray
    first: np.ndarray
    frames: np.ndarray

    def image(self, index: int, least: tuple[int, int] | None = None) -> Image.Image:
        if files := self.files(index):
            file = files[len(files) // 2]
            return decode(file, name=str(file), least=least)
        middle = len(self.timeline(index).stamps) // 2
        image = Image.fromarray(self.clip(index, indices=[middle])[0])
        image.info["whole"] = image.size
        return image

    def size_bytes(self, index: int) -> int:
        return sum(file.stat().st_size for file in self.files(index) or [self.root / str(self.clips[index])])

    def files(self, index: int) -> list[Path]:
        """The frames of clip `index` where it is a folder."""
        names = self.frames[int(self.first[index]) : int(self.first[index + 1])]
        return [self.root / str(self.clips[index]) / str(name) for name in names]

    def timeline(self, index: int) -> Timeline:
        """When clip `index`, a video file, shows what; the file is read, but not decoded.

        Raises:
            DataError: the file cannot be read.
            UsageError: the clip is a folder of frames, which has no clock; or PyAV is not installed.
        """
        file = self.root / str(self.clips[index])
        if self.first[index] < self.first[index + 1]:
            raise UsageError(f"{file} is a folder of frames, which have no times; ask for indices")
        return timeline(file)

    def count(self, index: int) -> int:
        """Frames of clip `index`."""
        return len(self.files(index)) or len(self.timeline(index).stamps)

    def clip(
        self, index: int, *, indices: Sequence[int] | None = None, times: Sequence[float] | None = None
    ) -> np.ndarray:
        """Frames of clip `index`.

        Args:
            index: position in the store.
            indices: which frames, counted from 0, in any order.
            times: or when, in seconds from the first frame; the frame that is shown then.

        Returns:
            (T, H, W, 3) uint8.

        Raises:
            DataError: frames cannot be read, or take more pixels than $VERTEBRA_MAX_PIXELS.
            UsageError: neither or both are given, or there is no such frame; or PyAV is not installed.
        """
        name = self.root / str(self.clips[index])
        if (indices is None) == (times is None):
            raise UsageError(f"{name}: give indices, or times in seconds")
        if times is not None:
            wanted = _shown(self.timeline(index).times, np.asarray(times, dtype=np.float64), name)
        else:
            wanted = np.asarray(indices, dtype=np.int64)
        count = self.count(index)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < count:
            wrong = wanted[(wanted < 0) | (wanted >= count)][0]
            raise UsageError(f"{name} has no frame {wrong}; it has {count}, from 0")
        files = self.files(index)
        return _stacked([files[number] for number in wanted], name) if files else _decoded(name, wanted)


def _shown(clock: np.ndarray, times: np.ndarray, name: Path) -> np.ndarray:
    """Which frame is shown at each time."""
    last = clock[-1] + (np.median(np.diff(clock)) if len(clock) > 1 else 1.0)  # the last one is shown for a while
    wrong = times[~((times >= 0) & (times <= last))]  # NaN is wrong too
    if len(wrong):
        raise UsageError(f"{name} shows nothing at {wrong[0]:g} s; it lasts from 0 to {last:.3f} s")
    return np.searchsorted(clock, times + 1e-9, side="right") - 1  # stamps are rounded: a time is the frame's own


def _room(count: int, height: int, width: int, name: Path) -> None:
    """Raise before frames are allocated that no one allowed."""
    if count * height * width > (limit := pixel_limit()):
        raise DataError(
            f"{name}: {count} frames of {width} x {height} pixels are more than the {limit} pixels allowed; "
            "ask for fewer, or raise VERTEBRA_MAX_PIXELS"
        )


def _stacked(files: Sequence[Path], name: Path) -> np.ndarray:
    """Frames that are files."""
    if not files:
        return np.zeros((0, 0, 0, 3), np.uint8)
    height, width = header(files[0])[:2]
    _room(len(files), height, width, name)
    found = np.empty((len(files), height, width, 3), np.uint8)
    for place, file in enumerate(files):
        image = decode(file, name=str(file)).convert("RGB")
        if image.size != (width, height):
            raise DataError(
                f"{file} is {image.size[0]} x {image.size[1]} pixels, and {files[0].name} {width} x {height}"
            )
        found[place] = np.asarray(image)
    return found


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UsageError("videos need PyAV: pip install 'vertebra[video]'; folders of frames need nothing") from error
    return av


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its picture stream; decoders may allocate no more than is allowed."""
    av = _av()
    try:
        container = av.open(str(file.absolute()), options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"})
    except (av.FFmpegError, OSError, ValueError) as error:
        said = log[2] if (log := getattr(error, "log", None)) else getattr(error, "strerror", None) or str(error)
        reason = "is empty (0 bytes)" if file.is_file() and not file.stat().st_size else f"cannot be opened: {said}"
        raise DataError(f"{file}: {reason}; copy or download it again, or convert it to mp4") from error
    with container:
        if not container.streams.video:
            raise DataError(f"{file} has no picture, only {', '.join(s.type for s in container.streams) or 'nothing'}")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise DataError(f"{file}: the codec of its picture is not known; convert it to mp4")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > (limit := pixel_limit()):
            raise DataError(
                f"{file}: {width} x {height} pixels are more than the {limit} allowed (VERTEBRA_MAX_PIXELS)"
            )
        # decoders count with their margins; this bounds what a size that changes on the way may take
        stream.codec_context.options = {"max_pixels": str(min(4 * limit + (1 << 20), (1 << 31) - 1))}
        yield container, stream


def timeline(file: Path) -> Timeline:
    """Read, without decoding, when a video file shows what.

    Raises:
        DataError: it cannot be read, has no picture, or has more than two million frames.
        UsageError: PyAV is not installed.
    """
    if not file.is_file():
        raise DataError(f"{file}: there is no such file")
    status = file.stat()
    return _timeline(file, status.st_mtime_ns, status.st_size, pixel_limit())


@lru_cache(maxsize=256)
def _timeline(file: Path, changed: int, size: int, limit: int) -> Timeline:
    av = _av()
    stamps, keys, passed, cut = [], [], 0, ""
    with _opened(file) as (container, stream):
        try:
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard or packet.is_corrupt:
                    passed += packet.size > 0
                    cut = "the file ends inside a frame" if packet.is_corrupt else cut
                    continue
                stamps.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
                if len(stamps) > _MOST_FRAMES:
                    raise DataError(f"{file} has more than {_MOST_FRAMES} frames; cut it into pieces")
        except av.FFmpegError as error:
            cut = str(error)
        if not stamps:
            raise DataError(f"{file} has no frame; copy or download it again")
        base, rate = float(stream.time_base or 1), float(stream.average_rate or 1)
        size_now = (stream.codec_context.height, stream.codec_context.width)
        # the sample table of an mp4 knows what there should be; the counts of other headers are not to be trusted
        stated = stream.frames if container.format.name.startswith("mov") else 0
    if cut or stated > len(stamps) + passed:
        cut = f"{len(stamps)} {f'of {stated} ' if stated else ''}frames are there{cut and f' ({cut})'}"
    if None in stamps or len(set(stamps)) < len(stamps):
        with _opened(file) as (container, stream):
            count = sum(1 for _ in _frames(container, stream, len(stamps)))
        if not count:
            raise DataError(f"{file}: no frame decodes; copy or download it again")
        return Timeline(np.arange(count), np.arange(count) / rate, np.zeros(1, np.int64), *size_now, cut, True)
    ordered = np.sort(np.array(stamps, dtype=np.int64))
    keys = keys or [ordered[0]]  # damaged; decoding begins at the beginning
    return Timeline(ordered, (ordered - ordered[0]) * base, np.sort(np.array(keys, np.int64)), *size_now, cut)


def _decoded(file: Path, wanted: np.ndarray) -> np.ndarray:
    """Frames of a video file, (T, H, W, 3)."""
    line = timeline(file)
    _room(len(wanted), line.height, line.width, file)
    if not len(wanted):
        return np.zeros((0, line.height, line.width, 3), np.uint8)
    stamps = line.stamps[wanted]
    pixels: dict[int, np.ndarray] = {}
    begins = np.searchsorted(line.keys, stamps, side="right") - 1
    for begin in np.unique(begins):
        some = np.unique(stamps[begins == begin])
        found = _from(file, int(line.keys[begin]) if begin > 0 else None, some, line)
        if len(found) < len(some) and begin > 0:  # the index of the file may lead astray
            found = _from(file, None, some, line) | found
        pixels |= found
    for stamp, number in zip(stamps.tolist(), wanted.tolist(), strict=True):
        if stamp not in pixels:
            raise DataError(f"{file}: frame {number} ({line.times[number]:.2f} s) does not decode; it is damaged there")
    return np.stack([pixels[stamp] for stamp in stamps.tolist()])


def _from(file: Path, key: int | None, some: np.ndarray, line: Timeline) -> dict[int, np.ndarray]:
    """Stamp -> pixels (H, W, 3) of the wanted stamps (rising), decoded from a key frame or the beginning on.

    Of a stamp whose own frame is broken, the last good frame before it since the key frame before it.
    """
    found: dict[int, np.ndarray] = {}
    least = line.keys[(np.searchsorted(line.keys, some, side="right") - 1).clip(min=0)]
    shown: tuple[int, Any] | None = None
    place = 0
    with _opened(file) as (container, stream):
        if key is not None:
            container.seek(key, stream=stream, backward=True)
        for number, frame in enumerate(_frames(container, stream, len(line.stamps))):
            stamp = number if line.counted else frame.pts
            while place < len(some) and stamp > some[place]:
                if shown is not None and shown[0] >= least[place]:
                    found[int(some[place])] = _rgb(shown[1], line)
                place += 1
            if place == len(some):
                return found
            shown = (stamp, frame)
            if stamp == some[place]:
                found[int(some[place])] = _rgb(frame, line)
                place += 1
    rest = range(place, len(some)) if shown is not None else ()
    return found | {int(some[at]): _rgb(shown[1], line) for at in rest if shown and shown[0] >= least[at]}


def _frames(container: Any, stream: Any, most: int) -> Iterator[Any]:
    """Good frames in the order of showing; broken packets are passed over, and the loop is bounded."""
    av = _av()
    packets = container.demux(stream)
    for _ in range(2 * most + 64):  # packets that are passed over count too
        try:
            packet = next(packets, None)
            frames = packet.decode() if packet is not None else []
        except av.InvalidDataError:
            continue
        except (av.FFmpegError, EOFError):
            return
        if packet is None:
            return
        yield from (frame for frame in frames if not frame.is_corrupt)


def _rgb(frame: Any, line: Timeline) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24", width=line.width, height=line.height)
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))  # counter-clockwise, as FFmpeg counts


def videos_file(file: Path) -> tuple[Path, VideoPlan] | None:
    """The root and the plan for one video that was given by its path, known by its suffix; None where it is none."""
    return (file.parent, VideoPlan({"all": [(file.name, None)]}, {})) if _is_video(file.name) else None


def _is_video(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES


def find_videos(root: Path, top: Folder, *, certain: bool = False) -> VideoPlan | None:
    """Clips below a folder, by names; None where there are none.

    Args:
        root: the folder.
        top: what lies in it.
        certain: the user said that these are videos: numbered images are frames, whatever they are called.

    Raises:
        DataError: folders of frames lie at different depths, so that classes cannot be told.
    """
    files = {folder.path: [name for name in folder.others if _is_video(name)] for folder in top.walk()}
    if any(files.values()):
        if top.count and not certain:
            return None
        return VideoPlan(_by_split([folder + name for folder, names in files.items() for name in names]), {})
    if not top.count or not (certain or _are_frames(root, top)):
        return None
    clips = {folder.path: _in_order(folder.images) for folder in top.walk() if folder.images}
    return VideoPlan(_by_split([path or "" for path in clips]), clips)


def _are_frames(root: Path, top: Folder) -> bool:
    holders = [folder for folder in top.walk() if folder.images]
    if all(_FRAME.fullmatch(Path(name).stem) for folder in holders for name in folder.images):
        return True
    return root.name.lower() in _FRAME_FOLDERS or (
        not top.images and {name.lower() for name in top.filled} <= _FRAME_FOLDERS
    )


def _by_split(paths: Sequence[str]) -> dict[str, list[tuple[str, str | None]]]:
    """Clips with their classes, by split: [SPLIT/][CLASS/...]clip."""
    parts = _without_holder({path: path.rstrip("/").split("/") for path in paths})
    in_splits = all(len(words) > 1 and split_of(words[0]) for words in parts.values())
    places = _without_holder({path: words[1:] for path, words in parts.items()}) if in_splits else parts
    depths = {len(words) > 1 for words in places.values()}
    if len(depths) > 1:
        flat = next(path for path, words in places.items() if len(words) == 1)
        deep = next(path for path, words in places.items() if len(words) > 1)
        raise DataError(f"{flat} lies beside folders of clips, such as that of {deep}; move it into one of them")
    classes = {words[0] for words in places.values()} if depths == {True} else set()
    found: dict[str, list[tuple[str, str | None]]] = {}
    for path, words in places.items():
        split = (split_of(parts[path][0]) or "all") if in_splits else "all"
        found.setdefault(split, []).append((path, words[0] if len(classes) > 1 else None))
    return found


def _without_holder(parts: dict[str, list[str]]) -> dict[str, list[str]]:
    """The same without a first folder that but holds the clips."""
    firsts = {words[0].lower() for words in parts.values() if len(words) > 1}
    if len(firsts) == 1 and firsts <= _HOLDERS and all(len(words) > 1 for words in parts.values()):
        return {path: words[1:] for path, words in parts.items()}
    return parts


def _in_order(names: Sequence[str]) -> list[str]:
    """Frames by the last number in their names: frame_2 comes before frame_10."""
    return sorted(names, key=lambda name: (_number(name), name))


def _number(name: str) -> int:
    found = _NUMBER.search(Path(name).stem)
    return int(found.group(1)) if found else -1


def holes(names: Sequence[str]) -> list[int]:
    """Numbers that are missing between the frames of a clip, in order; every fifth frame is no hole."""
    numbers = np.unique([_number(name) for name in names])
    steps = np.diff(numbers)
    if not len(steps):
        return []
    usual = int(np.gcd.reduce(steps))
    wide = np.flatnonzero(steps > usual)[:100]
    return [number for at in wide for number in range(int(numbers[at]) + usual, int(numbers[at + 1]), usual)][:1000]


def read_videos(
    path: str, root: Path, plan: VideoPlan, *, on_error: OnError = "raise", notes: Iterable[str] = ()
) -> Dataset:
    """Read clips: names and classes now, frames when they are asked for.

    Args:
        path: the path as the user gave it.
        root: the folder.
        plan: what `find_videos` or `videos_file` found there.
        on_error: as in the other readers; clips that cannot be decoded show later.
        notes: what was said so far.

    Returns:
        A data set with one label a clip, or none; the store of its splits is a `VideoStore`.

    Raises:
        DataError: there is no clip, or one file is given and cannot be read.
    """
    notes = list(notes)
    found = {}
    for split, clips in plan.clips.items():
        paths = np.array([clip for clip, _ in clips], dtype=np.str_)
        names = [plan.frames.get(clip, ()) for clip, _ in clips]
        for clip, frames in zip(paths, names, strict=True):
            if missing := holes(frames):
                notes.append(
                    f"{clip or root.name}: {len(missing)} frames are missing in the numbering, such as {missing[0]}"
                )
        files = np.array([name for some in names for name in some], dtype=np.str_)
        store = VideoStore(root, paths, starts([len(some) for some in names]), files)
        labels = [str(label) for _, label in clips] if clips and clips[0][1] is not None else None
        shown = np.array([clip.rstrip("/") or root.name for clip, _ in clips], dtype=np.str_)
        found[split] = Found(shown, labels, store, np.arange(len(paths)))
    if Path(path).is_file():
        line = timeline(Path(path))
        notes += [f"the video is cut off: {line.cut}"] if line.cut else []
    return assemble(path, "videos", found, notes=notes)


def write_videos(dataset: Dataset, folder: Path) -> None:
    """Write a data set of clips so that `read_videos` reads it: `SPLIT/CLASS/clip.mp4`, files as they are.

    Clips that are folders of frames go below `frames`: `frames/SPLIT/CLASS/CLIP/x.jpg`.

    Raises:
        DataError: the data are no clips, or two would have one name.
        UsageError: there is something in the folder.
    """
    fresh(folder)
    for split in dataset.splits.values():
        store = split.store
        if not isinstance(store, VideoStore):
            raise DataError(f"{dataset.path}: the split {split.name!r} has no videos")
        for index, row in enumerate(split.rows.tolist()):
            last = checked(str(split.names[index]), f"split {split.name!r}").rpartition("/")[2]
            label = f"{split.classes[split.targets[index]]}/" if split.targets is not None else ""
            place = f"{split_folder(split)}{label}{last}"
            files = store.files(row)
            target = folder / "frames" / place if files else folder / place
            if target.exists():
                raise DataError(f"{split.names[index]} and another clip would both be {place}; rename one")
            target.parent.mkdir(parents=True, exist_ok=True)
            if files:
                target.mkdir()
                for file in files:
                    shutil.copyfile(file, target / file.name)
            else:
                shutil.copyfile(store.root / str(store.clips[row]), target)


def faults(split: Split) -> "Iterator[Finding]":
    """What is wrong with the clips of a split: unreadable, cut off, or frames that do not decode."""
    from vertebra.data.checking import Finding

    store = split.store
    if not isinstance(store, VideoStore):
        return

    def looked(index: int) -> tuple[str, str]:
        row = int(split.rows[index])
        try:
            if files := store.files(row):
                for file in files:
                    decode(file, name=str(file), least=(1, 1))
                return "", ""
            line = store.timeline(row)
            with _opened(store.root / str(store.clips[row])) as (container, stream):
                good = sum(1 for _ in _frames(container, stream, len(line.stamps)))
        except DataError as error:
            return "video", str(error)
        if not good:
            return "video", f"{store.clips[row]}: no frame decodes; copy or download it again"
        if good < len(line.stamps):
            return "video-cut", f"{good} of {len(line.stamps)} frames decode; the file is damaged"
        return ("video-cut", f"the video is cut off: {line.cut}") if line.cut else ("", "")

    for index, (kind, message) in enumerate(each(looked, len(split))):
        if kind:
            yield Finding(kind, str(split.names[index]), message)
