"""Weights: where they come from, under which licence, and how they get into a network of timm's.

safetensors only. A pickle is refused unless the caller allows it, and is then read as tensors only. The hub
is asked only for weights that the caller named, never when `HF_HUB_OFFLINE` or `VERTEBRA_OFFLINE` is set.
"""

import ast
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from timm.models import adapt_input_conv, get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import Tensor, nn

from vertebra.errors import UsageError, VertebraError, near

_PICKLES = (".pth", ".pt", ".th", ".bin", ".ckpt", ".tar", ".pkl")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "network.")
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model", "network_weights")


@dataclass(frozen=True)
class WeightsInfo:
    """Where weights come from.

    Attributes:
        source: "hf-hub:owner/name" or the file.
        tag: timm's tag, or "".
        revision: commit on the hub, or "".
        licence: as their publisher states it, or "" where nobody did.
        sha256: of the file.
    """

    source: str
    tag: str = ""
    revision: str = ""
    licence: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Opened:
    """A weight file that is on this machine.

    Attributes:
        path: the file.
        info: where it comes from.
        options: keywords that its network was built with.
        config: what it says of images and classes, in timm's keys.
    """

    path: Path
    info: WeightsInfo
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def offline() -> bool:
    """Whether the environment forbids asking the hub."""
    switches = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "VERTEBRA_OFFLINE"))
    return any(switch.lower() in ("1", "on", "yes", "true") for switch in switches)


def published(name: str) -> list[dict[str, Any]]:
    """Weights that timm publishes for a network, the default first.

    Returns:
        Rows with `tag`, `licence`, `source`, `size` (height, width) and `classes`.
    """
    architecture = name.partition(".")[0]
    rows = []
    for full_name, config in get_arch_pretrained_cfgs(architecture).items():
        if config.has_weights:
            source = f"hf-hub:{config.hf_hub_id}" if config.hf_hub_id else str(config.url)
            row = {"tag": full_name.partition(".")[2], "licence": config.license or "not stated", "source": source}
            rows.append({**row, "size": list(config.input_size[1:]), "classes": config.num_classes})
    return rows


def locate(name: str, weights: str, *, allow_pickle: bool = False) -> Opened:
    """Find a weight file; fetch it where it is named by tag or hub address and not here yet.

    Args:
        name: timm's name, with its tag if there is one.
        weights: "pretrained", a tag or "hf-hub:owner/name", each with "@revision" if wanted, or the path of a
            file or a folder.
        allow_pickle: whether a pickle may be read, as tensors only.

    Returns:
        The file with what it says of itself.

    Raises:
        UsageError: no such tag or file, or a pickle that is not allowed.
        VertebraError: the hub cannot be asked or does not have the file.
    """
    if weights.startswith("hf-hub:"):
        repository, _, revision = weights.removeprefix("hf-hub:").partition("@")
        _fetch(weights, repository, ("config.json",), revision, "its own licence")
        file, commit = _fetch(weights, repository, ("model.safetensors",), revision, "its own licence")
        return _open_folder(name, file.parent, WeightsInfo(weights, revision=commit), allow_pickle)
    path = Path(weights).expanduser()
    tags = {"pretrained", *(row["tag"] for row in published(name))}
    if weights.partition("@")[0] not in tags and path.exists():  # ./pretrained is a folder, pretrained is not
        opener = _open_folder if path.is_dir() else _open_file
        return opener(name, path, WeightsInfo(str(path)), allow_pickle)
    if path.suffix in (".safetensors", *_PICKLES) or "/" in weights:
        raise UsageError(f"weights {weights!r}: there is no such file or folder")
    return _open_published(name, weights)


def _open_published(name: str, weights: str) -> Opened:
    architecture, _, named_tag = name.partition(".")
    tag, _, revision = weights.partition("@")
    tag = named_tag if tag == "pretrained" else tag
    known = [row["tag"] for row in published(architecture)]
    if not known:
        raise UsageError(f"timm publishes no weights for {architecture}; leave weights out or give a file")
    if tag and tag not in known:
        raise UsageError(f"timm/{architecture} has no weights {tag!r}{near(tag, known)}; it has {', '.join(known)}")
    config = get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    assert config is not None
    if not config.hf_hub_id:
        raise UsageError(
            f"the weights {tag or 'pretrained'!r} of timm/{architecture} are no safetensors file ({config.url});"
            " download and convert them and give the file as weights=..."
        )
    licence = config.license or "licence not stated"
    files = _safe_names(config.hf_hub_filename)
    path, commit = _fetch(f"{architecture}.{config.tag}", config.hf_hub_id, files, revision, licence)
    info = WeightsInfo(f"hf-hub:{config.hf_hub_id}", config.tag or "", commit, config.license or "", _sha256(path))
    return Opened(path, info, config=config.to_dict())


def _safe_names(filename: str | None) -> tuple[str, ...]:
    """Names under which the hub may keep the safetensors twin of timm's file."""
    if filename and filename.endswith(".safetensors"):
        return (filename,)
    twins = (f"{filename.rpartition('.')[0]}.safetensors", "open_clip_model.safetensors") if filename else ()
    return (*twins, "model.safetensors")


def _fetch(what: str, repository: str, files: Iterable[str], revision: str, licence: str) -> tuple[Path, str]:
    """The first of `files` that the repository has, and its commit."""
    unreachable: Exception | None = None
    for file in files:
        try:
            path = hf_hub_download(repository, file, revision=revision or None, local_files_only=offline())
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            unreachable = error
        except EntryNotFoundError:
            continue
        except HfHubHTTPError as error:
            answer = str(error).strip().splitlines()[-1]
            raise VertebraError(f"the weights {what}: hf-hub:{repository} answers: {answer}") from error
        else:
            return Path(path), Path(path).parent.name
    wanted = " or ".join(files)
    if unreachable is None:
        raise VertebraError(
            f"the weights {what}: hf-hub:{repository} has no {wanted}; download and convert its pickle and give the"
            " file as weights=..."
        )
    reason = "HF_HUB_OFFLINE or VERTEBRA_OFFLINE is set" if offline() else "the hub cannot be reached"
    raise VertebraError(
        f"the weights {what} are not on this machine and {reason}; would download {wanted} of hf-hub:{repository}"
        f" ({licence}). Remedy: allow the network, or run `hf download {repository}` where there is one and give the"
        " folder as weights=..."
    ) from unreachable


def _open_folder(name: str, folder: Path, info: WeightsInfo, allow_pickle: bool) -> Opened:
    """Open the hub's layout (config.json, model.safetensors) or a checkpoint of ours."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", *_PICKLES))
    chosen = next((file for file in files if file.name == "model.safetensors"), files[0] if len(files) == 1 else None)
    if chosen is None:
        found = ", ".join(file.name for file in files) or "none"
        raise UsageError(f"weights {str(folder)!r}: no model.safetensors there; weight files found: {found}")
    opened = _open_file(name, chosen, info, allow_pickle)
    config, ours = _read_json(folder / "config.json"), _read_json(folder / "preprocess.json")
    _check_architecture(name, config.get("architecture"), folder)
    images = _from_preprocess(ours) if ours else config.get("pretrained_cfg", {})
    return replace(
        opened,
        info=replace(opened.info, licence=images.get("license") or opened.info.licence),
        options={**opened.options, **config.get("model_args", {})},
        config={**opened.config, **images},
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise VertebraError(f"{path}, line {error.lineno}: {error.msg}; the file is damaged") from error
    return found if isinstance(found, dict) else {}


def _from_preprocess(ours: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's preprocess.json (the fields of `contracts.Preprocess`) in timm's keys."""
    return {
        "input_size": (len(ours["mean"]), *ours["size"]),
        "mean": tuple(ours["mean"]),
        "std": tuple(ours["std"]),
        "interpolation": ours["interpolation"],
        "crop_pct": ours["crop"],
        "crop_mode": "squash" if ours["fit"] == "squash" else "center",
    }


def _open_file(name: str, path: Path, info: WeightsInfo, allow_pickle: bool) -> Opened:
    if path.suffix in _PICKLES:
        if not allow_pickle:
            raise UsageError(
                f"weights {str(path)!r} are a pickle, which can run code when it is read; convert it to safetensors,"
                " or give allow_pickle=True to read it as tensors only (torch.load, weights_only=True)"
            )
        return Opened(path, replace(info, sha256=_sha256(path)))
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
    except SafetensorError as error:
        raise VertebraError(f"{path} is no safetensors file: {error}") from error
    architecture, options = _read_call(said.get("architecture", ""))
    _check_architecture(name, architecture, path)
    licence = info.licence or said.get("licence") or said.get("license") or ""
    return Opened(path, replace(info, licence=licence, sha256=_sha256(path)), options, _from_metadata(said))


def _from_metadata(said: Mapping[str, str]) -> dict[str, Any]:
    """Normalisation as a file's metadata states it, in timm's keys."""
    found: dict[str, Any] = {key: tuple(map(float, said[key].split(","))) for key in ("mean", "std") if key in said}
    if "input" in said:
        side = int(said["input"])
        found["input_size"] = (len(found.get("mean", "rgb")), side, side)
    if "crop_pct" in said:
        found["crop_pct"] = float(said["crop_pct"])
    return {**found, **{key: said[key] for key in ("interpolation", "crop_mode") if key in said}}


def _read_call(text: str) -> tuple[str, dict[str, Any]]:
    """Name and keywords of an architecture written as `create_model(name, key=value)` or as a bare name."""
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        return "", {}
    if isinstance(call, ast.Name):
        return call.id, {}
    if not isinstance(call, ast.Call) or not call.args:
        return "", {}
    words = {keyword.arg: _word(keyword.value) for keyword in call.keywords if keyword.arg}
    return str(_word(call.args[0])), words


def _word(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _check_architecture(name: str, stated: str | None, where: Path) -> None:
    architecture = name.partition(".")[0]
    if stated and stated.partition(".")[0] != architecture:
        raise UsageError(f"weights {str(where)!r} belong to {stated}, not to {architecture}; build timm/{stated}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(opened: Opened) -> dict[str, Tensor]:
    """All tensors of a weight file, on the CPU; nested state dicts of old checkpoints are unpacked."""
    if opened.path.suffix not in _PICKLES:
        with safe_open(opened.path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    found = torch.load(opened.path, map_location="cpu", weights_only=True)
    for nest in _NESTS:
        found = found[nest] if isinstance(found.get(nest), Mapping) else found
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def load(network: nn.Module, opened: Opened, channels: int) -> None:
    """Put a weight file's tensors into a network, all of them or none.

    Wrappers' prefixes ("module.", "model.", "backbone.") are taken off and classifiers left out. Where that is
    not enough, timm's own conversions, or `published` of the network's page, rename old keys and resize position
    tables, and the first convolution is adapted.

    Args:
        network: timm's module, without its classifier, or a backbone with a `pretrained_cfg`.
        opened: what `locate` found.
        channels: image channels of the network.

    Raises:
        VertebraError: keys missing, left over or of the wrong shape; the message names the first few.
    """
    wanted = network.state_dict()
    state = _without_heads(_stripped(read(opened), wanted), wanted, network)
    problems = _misfits(state, wanted)
    if problems:
        try:
            state = _without_heads(_converted(state, network, channels), wanted, network)
        except Exception as error:
            # timm's conversions raise whatever a foreign state dict makes them raise
            raise _unfit(opened, network, problems) from error
        problems = _misfits(state, wanted)
    if problems:
        raise _unfit(opened, network, problems)
    network.load_state_dict(state)


def _unfit(opened: Opened, network: nn.Module, problems: list[str]) -> VertebraError:
    what = f"weights {opened.info.source} do not fit {type(network).__name__} as it is built"
    return VertebraError(f"{what}: {'; '.join(problems)}")


def _converted(state: dict[str, Tensor], network: Any, channels: int) -> dict[str, Tensor]:
    module = sys.modules[type(network).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "published", None)  # timm's word, ours
    state = convert(state, network) if convert else dict(state)
    for name in _names(network.pretrained_cfg.get("first_conv")):
        key = f"{name}.weight"
        if key in state and state[key].shape != network.get_submodule(name).weight.shape:
            state[key] = adapt_input_conv(channels, state[key])
    return state


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _stripped(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the prefixes of wrappers, each taken off only where what remains is a key of the network."""
    if any(key.startswith("backbone.") for key in state):
        # a task's checkpoint: what stands beside its backbone is a head
        state = {key: tensor for key, tensor in state.items() if key.startswith("backbone.")}
    return {_strip(key, wanted): tensor for key, tensor in state.items()}


def _strip(key: str, wanted: Mapping[str, Tensor]) -> str:
    short = key
    while short not in wanted:
        prefix = next((p for p in _PREFIXES if short.startswith(p)), None)
        if prefix is None:
            return key
        short = short.removeprefix(prefix)
    return short


def _without_heads(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
    classifiers = _names(network.pretrained_cfg.get("classifier"))
    heads = {f"{name}.{kind}" for name in classifiers for kind in ("weight", "bias")} - set(wanted)
    return {key: tensor for key, tensor in state.items() if key not in heads}


def _misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from loading, one clause a kind, the first few keys each."""
    # batch counters are younger than many checkpoints; torch fills them in
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in wanted]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, wanted {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    kinds = {"missing": missing, "left over": extra, "of the wrong shape": shapes}
    return [f"{len(keys)} {kind}: {', '.join(keys[:3])}" for kind, keys in kinds.items() if keys]


def classifier(name: str, weights: str, *, allow_pickle: bool = False) -> nn.Linear:
    """The linear classifier that a weight file carries beside its network; it takes `Features.pooled`.

    Raises:
        UsageError: the file has no linear classifier under the name that timm gives it.
    """
    opened = locate(name, weights, allow_pickle=allow_pickle)
    config = get_pretrained_cfg(name)
    head = opened.config.get("classifier") or (config.classifier if config else None)
    state = read(opened)
    key = next((key for key in state if isinstance(head, str) and key.endswith(f"{head}.weight")), None)
    if key is None:
        raise UsageError(f"weights {weights!r} hold no linear classifier {head!r}; keys end in {list(state)[-2:]}")
    weight = state[key].flatten(1).float()  # a 1x1 convolution (DPN) is a linear layer too
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    bias = state.get(f"{key.removesuffix('weight')}bias", torch.zeros(len(weight)))
    linear.load_state_dict({"weight": weight, "bias": bias.float()})
    return linear


def describe(address: str) -> dict[str, Any]:
    """Facts about a backbone, JSON-ready; nothing real is built and nothing is downloaded.

    Args:
        address: `page/variant`, `timm/NAME` or `module:callable`.

    Returns:
        Input, levels, width, parameters (M), MACs and activations (G, M), and rows of published weights.
    """
    from vertebra.spec import Spec
    from vertebra.training.cost import count

    spec = Spec(address, {"weights": "random"} if address.startswith("timm/") else {})
    with torch.device("meta"):
        backbone = spec.build()
    cost, images = count(backbone), backbone.preprocess
    name = backbone.name if hasattr(backbone, "name") else ""
    return {
        "address": address,
        "network": f"timm/{name}" if name else type(backbone).__name__,
        "size": list(images.size),
        "channels": images.channels,
        "mean": list(images.mean),
        "std": list(images.std),
        "interpolation": images.interpolation,
        "crop": images.crop,
        "levels": [{"channels": level.channels, "stride": level.stride} for level in backbone.levels],
        "width": backbone.width,
        "params": cost.params,
        "macs": cost.macs,
        "activations": cost.activations,
        "weights": published(name) if name else [],
    }
