"""A battle of eight contenders against plain scripts, one a contender and probe, that share nothing.

    python benchmarks/battle.py                        the shared data, 2,000 images or what there is
    python benchmarks/battle.py --images 200 --contenders 2 --probes knn linear

Both sides get the same images, the same weights, and the same number of processes with one thread each. The weights
are random with batch statistics from a few images: their values change no time. Scores differ where a rounded pixel
tips an image over; what counts is whether they stay within the error of n images. Two ratios are given:
`ratio`, of the time from start to end, and `ratio_of_work`, without starting and importing on either side (48 scripts
start, the battle once): seconds inside the plain scripts against seconds of the battle's cells. Target: 3 in both.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

NETWORKS = (
    "resnet10t",
    "regnetx_002",
    "convnext_atto",
    "resnet14t",
    "regnetx_004",
    "convnextv2_atto",
    "convnext_femto",
    "resnet18",
)
"""Small ones in which, under random weights, a rounded pixel stays small; the mobile families magnify it."""
PROBES = ("knn", "linear", "few_shot", "retrieval", "calibration", "corruption")
SCORES = {
    "knn": "knn_top1",
    "linear": "linear_top1",
    "few_shot": "fewshot_10",
    "retrieval": "map",
    "calibration": "ece",
    "corruption": "corruption_top1",
}
TARGET = 3.0
SHARED = Path(os.environ.get("VERTEBRA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@contextmanager
def folder_of(source: Path | None, images: int) -> Iterator[Path]:
    """A folder train/, val/, test/ with at most `images` images, the classes' mix kept."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if source is None:
            with zipfile.ZipFile(SHARED / "cls" / "clothing10-112.zip") as archive:
                archive.extractall(root / "all")
            source = root / "all" / "clothing10"
        files = [file for file in sorted(source.glob("*/*/*")) if file.parts[-3] in ("train", "val", "test")]
        if not files:
            raise SystemExit(f"{source} has no train/CLASS/, val/CLASS/ and test/CLASS/ with images")
        kept = files if len(files) <= images else [files[i] for i in np.linspace(0, len(files) - 1, images).astype(int)]
        for file in kept:
            target = root / "data" / Path(*file.parts[-3:])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        yield root / "data"


def write_weights(network: str, folder: Path, data: Path, size: int) -> Path:
    """Seeded random weights of a timm network, with batch statistics of a few training images."""
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(network, num_classes=0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain average
    files = sorted((data / "train").glob("*/*"))[::8][:64]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB").resize((size, size))) for file in files])
    with torch.no_grad():
        model.train()(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    path = folder / f"{network}.safetensors"
    save_file(model.state_dict(), path)
    return path


def run_battle(weights: dict[str, Path], data: Path, arguments: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Seconds and scores of `vertebra.battle`, in a process of its own, as a user would have them."""
    call = {
        "contenders": [f"timm/{name}?weights={path}&image_size={arguments.size}" for name, path in weights.items()],
        "probes": [_asked(probe, arguments.corrupted) for probe in arguments.probes],
        "data": str(data),
        "run_dir": str(out / f"battle-{time.time_ns()}"),
        "jobs": arguments.jobs,
    }
    code = (
        "import json, sys; from vertebra.battle.contest import battle\n"
        "if __name__ == '__main__': battle(**json.loads(sys.argv[1]), seeds=[0], quiet=True)"
    )
    script = out / "one_battle.py"
    script.write_text(code, encoding="utf-8")
    start = time.perf_counter()
    subprocess.run([sys.executable, str(script), json.dumps(call)], check=True, env=_environment())
    seconds = time.perf_counter() - start
    lines = (Path(call["run_dir"]) / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {(row["contender"], row["probe"].partition("?")[0]): row for row in map(json.loads, lines)}
    scores = {}
    for (contender, probe), row in rows.items():
        if row["state"] != "done":
            raise SystemExit(f"{contender}, {probe}: {row['state']}: {row['error']}")
        scores[contender.partition("?")[0].removeprefix("timm/"), probe] = row["scores"][SCORES[probe]]
    work = sum(row["seconds"] for row in rows.values()) / arguments.jobs
    return {"seconds": seconds, "work": work, "scores": scores}


def _asked(probe: str, corrupted: int) -> str:
    return f"corruption?images={corrupted}" if probe == "corruption" else probe


def run_plain(weights: dict[str, Path], data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and scores of one script a contender and probe, `jobs` of them at a time."""

    def one(job: tuple[str, str]) -> tuple[tuple[str, str], float, float]:
        network, probe = job
        command = [sys.executable, str(Path(__file__).with_name("plain_battle.py")), "--network", network]
        command += ["--weights", str(weights[network]), "--data", str(data), "--size", str(arguments.size)]
        command += ["--corrupted", str(arguments.corrupted), "--probe", probe]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=_environment())
        found = json.loads(done.stdout.splitlines()[-1])
        return job, found["value"], found["seconds"]

    jobs = [(network, probe) for network in weights for probe in arguments.probes]
    start = time.perf_counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(one, jobs))
    seconds = time.perf_counter() - start
    work = sum(entry[2] for entry in found) / arguments.jobs
    return {"seconds": seconds, "work": work, "scores": {job: value for job, value, _ in found}}


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VERTEBRA_OFFLINE": "1"}


def compare(battles: list[dict[str, Any]], plains: list[dict[str, Any]], jobs: int) -> dict[str, Any]:
    """The ratio, and how far the scores of the two sides are apart."""
    ours, theirs = (
        {key: float(np.median([run[key] for run in runs])) for key in ("seconds", "work")} for runs in (battles, plains)
    )
    ratio, ratio_of_work = theirs["seconds"] / ours["seconds"], theirs["work"] / ours["work"]
    gaps: dict[str, list[float]] = {}
    outside = []
    for (network, probe), value in plains[0]["scores"].items():
        score = battles[0]["scores"][network, probe]
        gap = abs(score["value"] - value)
        gaps.setdefault(probe, []).append(gap)
        if gap > 2 * _standard_error(score):
            outside.append(f"{network}, {probe}: {score['value']:.2f} here, {value:.2f} plain")
    return {
        "jobs": jobs,
        "battle_seconds": round(ours["seconds"], 1),
        "plain_seconds": round(theirs["seconds"], 1),
        "battle_work_seconds": round(ours["work"], 1),
        "plain_work_seconds": round(theirs["work"], 1),
        "ratio": round(ratio, 2),
        "ratio_of_work": round(ratio_of_work, 2),
        "target": TARGET,
        "reached": min(ratio, ratio_of_work) >= TARGET,
        "largest_gap_of_scores": {probe: round(max(values), 2) for probe, values in gaps.items()},
        "beyond_two_standard_errors": outside,
    }


def _standard_error(score: dict[str, Any]) -> float:
    """Of a share of n images, or a quarter of the interval's width."""
    if score["interval"]:
        return (score["interval"][1] - score["interval"][0]) / 4
    share = score["value"] / 100
    return 100 * float(np.sqrt(max(share * (1 - share), 0.01) / score["n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/, val/, test/; default: the shared clothing10")
    parser.add_argument("--images", type=int, default=2000, help="images of all splits, at most")
    parser.add_argument("--contenders", type=int, default=len(NETWORKS), help="how many of the networks")
    parser.add_argument("--probes", nargs="+", default=list(PROBES), choices=PROBES)
    parser.add_argument("--corrupted", type=int, default=256, help="test images that are corrupted")
    parser.add_argument("--size", type=int, default=112, help="side in pixels that the networks see")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of either side")
    parser.add_argument("--rounds", type=int, default=1, help="times that the two sides take turns")
    arguments = parser.parse_args()
    with folder_of(arguments.data, arguments.images) as data, tempfile.TemporaryDirectory() as name:
        out = Path(name)
        weights = {net: write_weights(net, out, data, arguments.size) for net in NETWORKS[: arguments.contenders]}
        battles, plains = [], []
        for turn in range(arguments.rounds):
            battles.append(run_battle(weights, data, arguments, out))
            print(f"round {turn + 1}: battle {battles[-1]['seconds']:.1f} s", file=sys.stderr)
            plains.append(run_plain(weights, data, arguments))
            print(f"round {turn + 1}: plain {plains[-1]['seconds']:.1f} s", file=sys.stderr)
        images = len(list(data.glob("*/*/*")))
        found = {"contenders": len(weights), "probes": arguments.probes, "images": images, "size": arguments.size}
        print(json.dumps({**found, **compare(battles, plains, arguments.jobs)}, indent=2))


if __name__ == "__main__":
    main()
