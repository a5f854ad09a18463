"""The battle: contenders x probes x seeds, each cell run once, stored at once, resumed after a kill.

    ranking = battle(["timm/resnet18", "timm/convnext_atto"], ["knn", "linear"], "my_images")
    ranking.pick, ranking.reasons

Everything is checked first: names, options, data, whether each contender can be built. Jobs (a contender with the
weights of one seed) then run in a pool; probes that measure time run last and alone.
"""

import json
import multiprocessing
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypedDict, Unpack

from vertebra.battle.contenders import Contender, defaults, parse, scratch_size
from vertebra.battle.pools import Pool, RayCluster, local_pool
from vertebra.battle.preparation import examined, prepare
from vertebra.battle.quantities import MEGABYTES, MILLIONS, MILLISECONDS, SECONDS, amount
from vertebra.battle.ranking import Constraints, Ranking
from vertebra.battle.running import Contest
from vertebra.battle.settings import Settings
from vertebra.config import split_address, to_json
from vertebra.data import read
from vertebra.data.dataset import Dataset
from vertebra.errors import Interrupted, Preempted, UsageError, near
from vertebra.paper import pages
from vertebra.spec import Spec, check_options
from vertebra.training.rundir import create, locked, read_run, surroundings, write_json

PROBES = ("linear", "knn", "few_shot", "retrieval", "calibration", "corruption", "grad_cam", "cost", "speed")
"""What a user who names no probe gets; fine-tuning costs too much to come unasked."""

SCORES: Mapping[str, tuple[str, ...]] = {
    "finetune": ("finetune_top1", "finetune_map"),
    "linear": ("linear_top1", "linear_map", "head_top1", "balanced_acc", "f1_macro"),
    "knn": ("knn_top1", "knn_map"),
    "few_shot": ("fewshot_10", "fewshot_5", "fewshot_1"),
    "retrieval": ("map", "recall@1"),
    "calibration": ("ece", "brier"),
    "corruption": ("corruption_top1",),
    "grad_cam": ("insertion_auc", "deletion_auc", "pointing", "box_iou50"),
}
"""Scores that may decide, those for one label an image first; the order is that of the default."""

SEEDS = (0, 1, 2)
NOT_KEPT = ("resume", "overwrite", "quiet", "jobs", "ray", "out", "name")
"""Options that say how a battle runs, not what it is."""

FREE_TO_CHANGE = ("budget", "constraints")
"""Settings that no finished cell depends on: a resumed battle may have others."""


class Options(TypedDict, total=False):
    """What `battle` takes beside what must be said.

    Attributes:
        test: data to test on instead of the data's own test split; classes are matched by name.
        max_latency: of the pick; milliseconds an image, or text such as "20ms".
        max_params: of the pick; millions, or text such as "30M".
        max_memory: of the pick; megabytes, or text such as "2GB".
        licence: "commercial" picks only weights whose licence is known to allow commercial use.
        primary: the score that decides, such as "linear_top1".
        weights: contender's address -> its weights.
        image_size: side in pixels for every contender.
        epochs: of training contenders from scratch; None takes the recipe's, or what the budget allows.
        jobs: processes; None takes one a core.
        ray: address of a Ray cluster, or "auto".
        pretrained: whether published weights are fetched: of the default contenders, and of those named without any.
        offline: whether nothing at all may be fetched.
        on_error: what an unreadable image does: "raise", or "skip", which leaves it out and says so.
        out: folder of all runs, where `run_dir` is not given.
        name: of the folder in out/battle; None takes the data's.
        resume: whether to go on in `run_dir`.
        overwrite: whether what is in `run_dir` may be deleted.
        quiet: shows no board.
    """

    test: str | os.PathLike[str] | Dataset | None
    max_latency: float | str | None
    max_params: float | str | None
    max_memory: float | str | None
    licence: Literal["any", "commercial"] | None
    primary: str | None
    weights: Mapping[str, str] | None
    image_size: int | None
    epochs: int | None
    jobs: int | None
    ray: str | None
    pretrained: bool
    offline: bool
    on_error: Literal["raise", "skip"] | None
    out: str | os.PathLike[str] | None
    name: str | None
    resume: bool
    overwrite: bool
    quiet: bool


def battle(
    contenders: Sequence[str | Spec] | None = None,
    probes: Sequence[str | Spec] | None = None,
    data: str | os.PathLike[str] | Dataset | None = None,
    *,
    seeds: int | Sequence[int] | None = None,
    budget: float | str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> Ranking:
    """Which backbone should I use for these images?

    Args:
        contenders: addresses, such as "timm/resnet18" or "swin/tiny?weights=pretrained"; None takes networks of
            different families, pretrained where their weights are on this machine.
        probes: names, such as "knn" or "linear"; None takes a broad choice.
        data: a path that `vertebra.data.read` knows, or a dataset.
        seeds: how many, or which; None takes 0, 1, 2.
        budget: seconds, or text such as "10m"; what does not fit is left out, and the report says what.
        run_dir: a folder that is not there yet; None makes one in runs/battle.
        options: see `Options`.

    Returns:
        The ranking, with the pick and its reasons; run_dir has report.html, report.json and every row.

    Raises:
        UsageError: an unknown name or option, or a folder that is in use or holds another battle.
        DataError: data without labels, or that cannot be read.
        VertebraError: every contender failed.
        Preempted: SIGTERM; everything finished is kept.
        Interrupted: Ctrl-C; likewise.
    """
    check_options("battle()", battle, options)
    _refuse_reimport()
    resume = options.get("resume", False)
    target = _target(run_dir, options)
    stored = read_run(target) if resume and target else {}
    call = {**stored.get("call", {}), **_given(contenders, probes, data, seeds, budget, options)}
    if call.get("on_error", "raise") not in ("raise", "skip"):
        raise UsageError(f"on_error is {call['on_error']!r}; it must be raise or skip")
    fighters, asked = _contenders(call), _probes(call)  # names are checked before any image is read
    make_pool = _pool_of(options)
    with _network(call):
        prepared = _data(call, data, options.get("test"))
        settings = _settings(call, fighters, asked, prepared)
        fingerprint = prepared.fingerprint
        if target and stored:
            _refuse_changes(target, settings, fingerprint, stored)
        folder = target or create(
            Path(options.get("out") or "runs"), "battle", options.get("name"), _default_name(call)
        )
        with _held(folder, fresh=not resume), _stoppable(folder):
            contest = Contest(folder, settings, prepared, fingerprint, command_of(call), stored.get("epochs"))
            contest.inspect()
            write_json(folder / "run.json", _document(call, settings, fingerprint, contest.epochs))
            return contest.run(make_pool, quiet=options.get("quiet", False))


def _refuse_reimport() -> None:
    """A spawned worker imports the caller's script again; one without a guard would start the battle again there."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing itself looks at
        raise UsageError(
            'battle() is called while a worker imports the script: put it under `if __name__ == "__main__":`'
        )


def _given(
    contenders: Any, probes: Any, data: Any, seeds: Any, budget: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What the caller said, as JSON values; what was not said is absent."""
    if isinstance(contenders, str) or isinstance(probes, str):
        raise UsageError("contenders and probes are lists of names, as ['timm/resnet18', 'timm/convnext_atto']")
    said = {name: value for name, value in options.items() if name not in NOT_KEPT}
    said |= {"contenders": contenders, "probes": probes, "seeds": seeds, "budget": budget}
    said |= {"data": _path(data), "test": _path(options.get("test"))}
    return {name: to_json(value) for name, value in said.items() if value is not None and value is not False}


def _path(data: Any) -> str | None:
    if isinstance(data, Dataset):
        return data.path
    return None if data is None else os.fspath(data)


def _target(run_dir: Any, options: Options) -> Path | None:
    """The folder that the caller names, if any: there to resume, else new, empty or to be overwritten."""
    name = options.get("name")
    named = Path(options.get("out") or "runs") / "battle" / name if name else None
    target = Path(run_dir) if run_dir is not None else named
    if options.get("resume"):
        if target is None:
            raise UsageError("resume needs run_dir, the folder of the battle to go on with")
        return target
    if target is None or not target.exists() or not any(target.iterdir()):
        return target
    if not options.get("overwrite"):
        raise UsageError(f"{target} exists; choose another name, say --overwrite, or go on with --resume {target}")
    if not (target / "run.json").is_file():
        raise UsageError(f"{target} is no run directory (it has no run.json), so --overwrite leaves it alone")
    return target


def _default_name(call: Mapping[str, Any]) -> str:
    return Path(call["data"]).resolve().name


def _document(call: Mapping[str, Any], settings: Settings, fingerprint: str, epochs: int) -> dict[str, Any]:
    """run.json: what starts this battle again."""
    return {
        "verb": "battle",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "call": call,
        "settings": to_json(settings),
        "epochs": epochs,
        "fingerprint": fingerprint,
        **surroundings(),
    }


def _refuse_changes(folder: Path, settings: Settings, fingerprint: str, stored: Mapping[str, Any]) -> None:
    """A resumed battle must be the battle that was begun."""
    if not stored:
        return
    if stored["fingerprint"] != fingerprint:
        raise UsageError(f"{folder}: the data have changed since the battle began; start another without --resume")
    now = to_json(settings)
    for name, before in stored["settings"].items():
        if name not in FREE_TO_CHANGE and json.dumps(before) != json.dumps(now[name]):
            raise UsageError(
                f"{folder}: {name} was {_short(before)} and is now {_short(now[name])}: finished cells would not "
                "compare; start another battle, or resume with what it had"
            )


def _short(value: Any) -> str:
    text = json.dumps(
        [item["name"] for item in value] if value and isinstance(value, list) and "name" in str(value) else value
    )
    return text if len(text) <= 120 else f"{text[:119]}…"


def _contenders(call: Mapping[str, Any]) -> tuple[Contender, ...] | None:
    """The contenders that the caller named, or None."""
    named = call.get("contenders")
    if named is None:
        if call.get("weights"):
            raise UsageError("weights name the contenders they are for; give contenders too (-m)")
        return None
    if not named:
        raise UsageError("contenders is empty; leave it out for the default ones")
    weights, size = call.get("weights", {}), call.get("image_size")
    return parse([_spec(one) for one in named], weights, size, pretrained=call.get("pretrained", False))


def _spec(one: Any, kind: str = "backbones") -> str | Spec:
    return one if isinstance(one, str) else Spec(one["address"], one["options"], kind)


def _probes(call: Mapping[str, Any]) -> dict[str, Spec]:
    """Probe name -> spec, with the probe that a constraint needs."""
    known = {page.name for page in pages() if page.kind == "probes"}
    named = call.get("probes") or [name for name in PROBES if name in known]
    found: dict[str, Spec] = {}
    for one in named:
        spec = _spec(one, "probes")
        if isinstance(spec, str):
            address, options = split_address(spec)
            if ":" not in address and address not in known:
                raise UsageError(
                    f"no probe is called {address!r}{near(address, known)}; probes: {', '.join(sorted(known))}"
                )
            spec, name = Spec(address, options, "probes"), spec
        else:
            name = spec.address
        if name in found:
            raise UsageError(f"probe {name} is given twice")
        found[name] = spec
    for option, probe in (("max_latency", "speed"), ("max_memory", "memory")):
        if call.get(option) is not None and probe not in {spec.address for spec in found.values()}:
            found[probe] = Spec(probe, {}, "probes")
    for spec in found.values():
        spec.build()  # options out of range are refused now
    return found


def _data(call: Mapping[str, Any], data: Any, test: Any) -> Dataset:
    """The data with train, val and test, checked for what would spoil the result."""
    if call.get("data") is None:
        raise UsageError("battle() needs data: a path, 'digits', or a dataset")
    first = data if isinstance(data, Dataset) else read(call["data"])
    second = test if isinstance(test, Dataset) else read(call["test"]) if call.get("test") else None
    return examined(prepare(first, second), call.get("on_error", "raise"))


def _settings(
    call: Mapping[str, Any], fighters: tuple[Contender, ...] | None, probes: Mapping[str, Spec], data: Dataset
) -> Settings:
    """Everything that was said and everything that was not, checked."""
    lineup = ""
    if fighters is None:
        fighters, lineup = defaults(
            call.get("image_size") or scratch_size(data), pretrained=call.get("pretrained", False)
        )
    units = {
        "max_latency": (MILLISECONDS, "ms", "20ms"),
        "max_params": (MILLIONS, "M", "30M"),
        "max_memory": (MEGABYTES, "MB", "2GB"),
    }
    limits = {
        name: amount(call[name], *how[:2], name, how[2]) for name, how in units.items() if call.get(name) is not None
    }
    seconds = None if call.get("budget") is None else amount(call["budget"], SECONDS, "s", "budget", "10m")
    if call.get("epochs", 1) < 1:
        raise UsageError(f"epochs is {call['epochs']}; it must be at least 1")
    return Settings(
        contenders=fighters,
        lineup=lineup,
        probes=probes,
        seeds=_seeds(call.get("seeds", SEEDS)),
        primaries=_primaries(call.get("primary"), probes, data),
        image_size=call.get("image_size"),
        epochs=call.get("epochs"),
        on_error=call.get("on_error", "raise"),
        budget=seconds,
        constraints=Constraints(**limits, licence=call.get("licence", "any")),
    )


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise UsageError(f"seeds is {seeds!r}; give how many (1 or more), or a list of different ones such as 0,1,2")
    return chosen


def _primaries(asked: str | None, probes: Mapping[str, Spec], data: Dataset) -> tuple[str, ...]:
    """The score that decides, as asked; or those of `SCORES` whose probe is in the battle, in order."""
    here = {spec.address for spec in probes.values()}
    if asked is None:
        kind = "_map" if data.label == "multi" else "_top1"
        found = [score for probe in SCORES if probe in here for score in SCORES[probe][:2] if score.endswith(kind)]
        if not found:
            raise UsageError(
                f"none of the probes {', '.join(probes)} can decide; add linear or knn, or say --primary SCORE"
            )
        return tuple(found)
    homes = {score: probe for probe, scores in SCORES.items() for score in scores}
    if asked in homes and homes[asked] not in here:
        raise UsageError(
            f"--primary {asked} comes from the probe {homes[asked]}, which is not in this battle ({', '.join(probes)})"
        )
    if asked not in homes and not any(":" in address for address in here):
        offered = [score for score, probe in homes.items() if probe in here]
        raise UsageError(f"no score is called {asked!r}{near(asked, offered)}; these probes have {', '.join(offered)}")
    return (asked,)


def _pool_of(options: Options) -> Callable[[int, float], Pool]:
    """What makes a pool for so many jobs of so many seconds."""
    jobs, ray = options.get("jobs"), options.get("ray")
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs is {jobs}; it must be at least 1")
    if ray is not None and jobs is not None:
        raise UsageError("jobs and ray exclude one another: a cluster knows its own size")
    if ray is not None:
        cluster = RayCluster(ray)
        return lambda count, seconds: cluster
    return lambda count, seconds: local_pool(jobs, count, seconds)


@contextmanager
def _network(call: Mapping[str, Any]) -> Iterator[None]:
    """Without --pretrained the hub is not asked for the default contenders; with --offline for none at all."""
    silent = call.get("offline") or (call.get("contenders") is None and not call.get("pretrained"))
    before = os.environ.get("VERTEBRA_OFFLINE")
    if silent:
        os.environ["VERTEBRA_OFFLINE"] = "1"
    try:
        yield
    finally:
        if silent and before is None:
            del os.environ["VERTEBRA_OFFLINE"]
        elif silent and before is not None:
            os.environ["VERTEBRA_OFFLINE"] = before


@contextmanager
def _held(folder: Path, *, fresh: bool) -> Iterator[None]:
    """Make the run directory and lock it; a fresh one that never got to run.json is removed again."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            if fresh:
                _clear(folder)
            yield
    finally:
        if fresh and {path.name for path in folder.iterdir()} <= {"LOCK"}:
            shutil.rmtree(folder)


def _clear(folder: Path) -> None:
    """Delete an earlier battle, but not the lock that is held."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "LOCK":
            path.unlink()


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the battle at once; what is finished is in the journal already."""
    remedy = f"what is finished is kept; go on with: vertebra battle --resume {shlex.quote(str(folder))}"

    def stop(number: int, _: FrameType | None) -> None:
        raise Preempted("") if number == signal.SIGTERM else Interrupted("")

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    try:
        yield
    except Preempted:
        raise Preempted(f"stopped by SIGTERM; {remedy}") from None
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"interrupted; {remedy}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_of(call: Mapping[str, Any]) -> str:
    """The command line that runs this battle again."""
    words = ["vertebra", "battle", str(call["data"])]
    for name, value in call.items():
        option = f"--{name.replace('_', '-')}"
        if name in ("contenders", "probes"):
            words += [option, ",".join(one if isinstance(one, str) else one["address"] for one in value)]
        elif name == "seeds":
            words += [option, str(value) if isinstance(value, int) else ",".join(map(str, value))]
        elif name == "weights":
            words += [word for address, path in value.items() for word in (option, f"{address}={path}")]
        elif value is True:
            words.append(option)
        elif name != "data":
            words += [option, str(value)]
    return shlex.join(words)
