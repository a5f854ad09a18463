"""CBNet: copies of one network in a row, each fed at the door of its stages by what the copy before has found.

The first members assist, the last one leads: its maps are the composite's. To the input of each stage of a member, maps
of the member before are added, through 1 x 1 convolutions and resized to the nearest: those of the same stage and of
all deeper ones (dense higher-level composition, DHLC), unless `links` says otherwise. Members start as copies, from the
same weights, and the links at zero. Early parts may be shared by all members.

    cbnet("resnet50", weights="a1_in1k")               # both members from the same weights
    cbnet(member="timm/convnext_tiny", members=3)      # any network with stages

The network decides the form of the links. With batch norms: a 1 x 1 convolution without bias and a batch norm that
keeps its statistics and starts at zero, added before a stage shrinks the map; the lead starts as the single network.
Without (Swin, ConvNeXt): a 1 x 1 convolution that starts at zero, or nothing at all where the channels agree, added
after the map has shrunk, and a layer norm on every map that leaves a stage. There the lead does not start as the single
network, since the assistant's map of the same level is added as it is.

mmdetection's Res2Net, which the authors use, has no average over the last group in the first stage; ours is that of
Res2Net's authors. Training may add the assistants' losses, through the same head: `vertebra.methods.assisted`.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from vertebra.backbones.building import BackboneOptions, check_at_least, check_images, load
from vertebra.backbones.cbnet.members import Parts, Sizes, apart, has_batch_norms, map_norm
from vertebra.backbones.twin import FAILURES
from vertebra.contracts import Backbone, Effect, Features
from vertebra.data.dataset import Dataset
from vertebra.errors import UsageError, near
from vertebra.paper import Paper
from vertebra.parity import Rules, convert
from vertebra.shipping.weights import Opened, WeightsInfo, read
from vertebra.spec import Spec

PAPER = Paper(
    id="cbnet",
    title="CBNet: A Composite Backbone Network Architecture for Object Detection",
    year=2021,
    arxiv="2107.00420",
    reference="VDIGPKU/CBNetV2",
    licence="Apache-2.0",
    claim=(
        "Two linked Swin-L reach 59.4 box and 51.6 mask AP on COCO test-dev (a single one 57.7 and 50.2) after a "
        "schedule a sixth as long, from the same ImageNet weights"
    ),
    builds_on=("res2net", "swin"),
    note=(
        "The backbones without detectors, and DB-Res2Net101 without deformable convolutions. The effect is the paper's "
        "comparison on classification; that of detectors, where both pyramids pass one neck and one head, awaits them."
    ),
)

VARIANTS = {
    "resnet50": {"member": "timm/resnet50"},
    "swin_tiny": {"member": "swin/tiny"},
    "swin_small": {"member": "swin/small"},
    "swin_base": {"member": "swin/base"},
    "swin_large": {"member": "swin/large"},
    "res2net101": {"member": "res2net/101_v1b"},
    "nano": {"member": "cifar_resnet/nano"},
}

Links = Literal["dense_higher", "higher", "same", "lower", "full"]

_SOURCES = {
    "dense_higher": lambda stage, deepest: range(stage, deepest + 1),
    "higher": lambda stage, deepest: range(stage, stage + 1),
    "same": lambda stage, deepest: range(stage - 1, stage),
    "lower": lambda stage, deepest: range(max(-1, stage - 2), stage - 1),
    "full": lambda stage, deepest: range(deepest + 1),
}
"""Composition -> the stages of the member before whose outputs are added to the input of a stage; -1 is the stem."""


class CBNetOptions(BackboneOptions, total=False):
    """Options; a variant sets the first.

    Attributes:
        weights: of the member, as its page takes them ("pretrained", a tag, a file), from which all members start; or
            the file of a whole composite.
        member: address of the network that is copied.
        members: how many; the last one leads.
        links: which maps of the member before are added to the input l of a stage, the output of stage l being one
            level deeper: "dense_higher" all deeper ones (DHLC, the released one), "higher" the next deeper one (AHLC),
            "same" that of its own level (SLC), "lower" the one before (ALLC), "full" all (FCC).
        shared: leading parts that the members have in common: 0 none, 1 the stem, 2 the stem and the first stage, ...;
            None takes the authors': 2 for networks with batch norms, 1 for others.
        network: further options of the member's page.
    """

    member: str
    members: int
    links: Links
    shared: int | None
    network: Mapping[str, Any]


def cbnet(variant: str = "resnet50", **options: Unpack[CBNetOptions]) -> "CBNet":
    """Build a composite.

    Args:
        variant: one of `VARIANTS`; `member=...` takes its place.
        options: as in `CBNetOptions`.

    Raises:
        UsageError: an unknown variant or member, a network that cannot be taken apart, or an option out of range.
        VertebraError: weights that do not fit.
    """
    if variant not in VARIANTS:
        raise UsageError(f"cbnet has no variant {variant!r}{near(variant, VARIANTS)}; it has {', '.join(VARIANTS)}")
    chosen: dict[str, Any] = {**VARIANTS[variant], **options}
    weights, allow_pickle = chosen.pop("weights", None) or "random", chosen.pop("allow_pickle", False)
    whole = _of_composite(weights, allow_pickle)
    composition = {key: chosen.pop(key) for key in ("members", "links", "shared") if key in chosen}
    _check(**composition)
    address = chosen.pop("member")
    single = _member(address, {**chosen, "weights": "random" if whole else weights, "allow_pickle": allow_pickle})
    parts, sizes = apart(single, address)
    composite = CBNet(single=single, parts=parts, sizes=sizes, address=address, **composition)
    composite.weights_info = getattr(single, "weights_info", None)
    if whole:
        composite.weights_info = load(composite, f"cbnet/{variant}", weights, allow_pickle)
    return composite


def _check(members: int = 2, links: str = "dense_higher", shared: int | None = None) -> None:
    check_at_least("cbnet", 2, members=members)
    check_at_least("cbnet", 0, shared=shared or 0)
    if links not in _SOURCES:
        raise UsageError(f"cbnet has no links {links!r}{near(links, _SOURCES)}; it has {', '.join(_SOURCES)}")


def _of_composite(weights: str, allow_pickle: bool) -> bool:
    """Whether these are a file or folder of a whole composite, ours or the authors'; else they are its member's."""
    path = Path(weights).expanduser()
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file() or (file.suffix != ".safetensors" and not allow_pickle):
        return False
    return any("links." in name or "cb_linears." in name for name in read(Opened(file, WeightsInfo(str(file)))))


def _member(address: str, options: dict[str, Any]) -> Backbone:
    """The network to be copied."""
    if address.partition("/")[0] == "cbnet":
        raise UsageError(
            f"cbnet: a composite of composites is not taken; name a network and members=..., not {address!r}"
        )
    further = options.pop("network", None) or {}
    defaults = {"weights": "random", "allow_pickle": False, "drop_path": 0.0, "image_size": None}
    given = {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}
    return Spec(address, {**given, **further}).build()


class Column(nn.Module):
    """One stage of all members.

    Attributes:
        enters: a module a member that has this stage's door of its own: the signal so far to the one that is added to.
        members: the stage itself, of each member that has its own.
        norms: from the signal behind the stage to a member's map; shared stages too have one a member.
    """

    def __init__(self, enter: nn.Module, stage: nn.Module, norm: nn.Module, last: bool) -> None:
        super().__init__()
        self.enters, self.members, self.norms = (nn.ModuleList([module]) for module in (enter, stage, norm))
        self.last = last

    def forward(self, x: Tensor, member: int, feeds: Sequence[Tensor]) -> Tensor:
        """The signal of a member at the door, and maps of the same shape, to the signal behind the stage."""
        for feed in feeds:
            x = x + feed
        return self.members[member](x)

    def map_of(self, x: Tensor, member: int) -> Tensor:
        """The signal behind the stage to a map (B, C, H, W)."""
        x = self.norms[member](x)
        return x.permute(0, 3, 1, 2) if self.last else x


class _Pass(NamedTuple):
    """What one member made of the images.

    Attributes:
        stem: the stem's output, (B, C, H, W).
        entered: the signals at the doors of the stages, before anything was added; those of shared stages too.
        signals: behind the stages.
        maps: of the stages, (B, C_i, H_i, W_i).
    """

    stem: Tensor
    entered: tuple[Tensor, ...]
    signals: tuple[Tensor, ...]
    maps: tuple[Tensor, ...]


class CBNet(Backbone):
    """Members in a row; build it with `cbnet`.

    Attributes:
        stems: of the members that have their own.
        stages: the columns.
        links: links[k][i]: what leads from the maps of member k to the door of stage i of member k + 1.
        pool: the last signal or map to pooled features; one for all members, as heads are.
        sources: sources[i]: the stages whose maps are added at the door of stage i; -1 is the stem.
        address: the member's.
        members: how many.
        weights_info: where the weights come from, or None where they are random.
    """

    pretrained_cfg: Mapping[str, Any] = {
        "first_conv": ("stems.0.0", "stems.0.0.0", "stems.0.0.proj"),  # plain, deep, of patches: whichever there is
        "classifier": (),
    }

    def __init__(
        self,
        *,
        single: Backbone,
        parts: Parts,
        sizes: Sizes,
        address: str,
        members: int = 2,
        links: Links = "dense_higher",
        shared: int | None = None,
    ) -> None:
        deepest, normed = len(parts.stages) - 1, has_batch_norms(parts)
        shared = (2 if normed else 1) if shared is None else shared
        if shared > deepest + 1:
            raise UsageError(
                f"cbnet: shared is {shared}; members of {address} share {deepest + 1} parts at most, the stem and all"
                " stages but the last"
            )
        super().__init__()
        self.address, self.members, self.last = address, members, parts.last
        self.levels, self.width, self.preprocess = single.levels[-deepest - 1 :], single.width, single.preprocess
        norms: list[nn.Module] = [
            nn.Identity() if normed else map_norm(channels, parts.last) for channels in sizes.given
        ]
        norms[-1] = parts.norm or norms[-1]
        self.stems = nn.ModuleList([parts.stem])
        columns = zip(parts.enters, parts.stages, norms, strict=True)
        self.stages: Any = nn.ModuleList(Column(*column, parts.last) for column in columns)
        for _ in range(members - 1):
            self._add_member(shared)
        self.sources = tuple(
            tuple(_SOURCES[links](stage, deepest)) if stage >= shared - 1 else () for stage in range(deepest + 1)
        )
        self.links: Any = nn.ModuleList(_links(self.sources, sizes, normed) for _ in range(members - 1))
        self.pool = parts.pool
        self.pools_maps = parts.norm is not None
        self.weights_info: WeightsInfo | None = None
        self._shown: Features | None = None

    def _add_member(self, shared: int) -> None:
        """A copy of the first member's own parts; a lead's first own stage takes the signal at its door from before."""
        if shared == 0:
            self.stems.append(copy.deepcopy(self.stems[0]))
        for stage, column in enumerate(self.stages):
            if stage >= shared:
                column.enters.append(copy.deepcopy(column.enters[0]))
            if stage >= shared - 1:
                column.members.append(copy.deepcopy(column.members[0]))
            column.norms.append(copy.deepcopy(column.norms[0]))

    def forward(self, images: Tensor) -> Features:
        """Images (B, channels, H, W) to the features of the lead.

        Raises:
            UsageError: images that the member cannot take.
        """
        return self._shown or self._features(self._passes(images)[-1])

    def each(self, images: Tensor) -> tuple[Features, ...]:
        """Images (B, channels, H, W) to the features of every member, the lead's last."""
        return tuple(self._features(found) for found in self._passes(images))

    def pyramids(self, images: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """Images (B, channels, H, W) to the pyramid of every member, the lead's last."""
        return tuple(found.maps for found in self._passes(images))

    @contextmanager
    def showing(self, features: Features) -> Iterator[None]:
        """For a while the backbone gives these features whatever the images: so a task model sees an assistant's."""
        self._shown = features
        try:
            yield
        finally:
            self._shown = None

    def trunk(self) -> list[nn.Module]:
        """The stems, the stages of all members one after the other, the links, and the pooling where it has weights.

        A part holds one stage of every member, so that what is frozen, or slowed down, is so in all of them.
        """
        parts = [self.stems, *self.stages, self.links, self.pool]
        return [part for part in parts if next(part.parameters(), None) is not None]

    def train(self, mode: bool = True) -> "CBNet":
        """Training mode, but for the norms of the links: their statistics never change."""
        super().train(mode)
        for module in self.links.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def _features(self, found: _Pass) -> Features:
        last = found.maps[-1].permute(0, 2, 3, 1) if self.last else found.maps[-1]
        return Features(found.maps, self.pool(last if self.pools_maps else found.signals[-1]))

    def _passes(self, images: Tensor) -> list[_Pass]:
        check_images(self, images)
        if torch.compiler.is_compiling():
            return self._chained(images)
        try:
            return self._chained(images)
        except FAILURES as error:
            if self._runs(images):  # then it is not the size that is to blame
                raise
            height, width = self.preprocess.size
            raise UsageError(
                f"cbnet of {self.address} is built for images of {height}x{width} pixels and cannot take"
                f" {images.shape[2]}x{images.shape[3]}; build it with image_size=..., or give a multiple of its"
                f" largest stride, {self.levels[-1].stride} ({error})"
            ) from error

    def _runs(self, images: Tensor) -> bool:
        """Whether shapes alone let the members take such images."""
        twin = copy.deepcopy(self).to("meta")
        try:
            twin._chained(images.to("meta"))
        except FAILURES:
            return False
        return True

    def _chained(self, images: Tensor) -> list[_Pass]:
        found: list[_Pass] = []
        for member in range(self.members):
            found.append(self._pass(images, member, found[-1] if found else None))
        return found

    def _pass(self, images: Tensor, member: int, before: _Pass | None) -> _Pass:
        """One member's way through the stages; what it shares comes from the member before."""
        x: Any = self.stems[member](images) if member < len(self.stems) else None
        stem = before.stem if before is not None and x is None else self._plane(x)
        entered: list[Tensor] = []
        signals: list[Tensor] = []
        for stage, column in enumerate(self.stages):
            if before is not None and member >= len(column.members):
                entered.append(before.entered[stage])
                signals.append(before.signals[stage])
                continue
            shared = before.entered[stage] if before is not None and member >= len(column.enters) else None
            entered.append(column.enters[member](x) if shared is None else shared)
            x = column(entered[-1], member, self._feeds(entered[-1], member, stage, before))
            signals.append(x)
        maps = [column.map_of(signal, member) for column, signal in zip(self.stages, signals, strict=True)]
        return _Pass(stem, tuple(entered), tuple(signals), tuple(maps))

    def _feeds(self, x: Tensor, member: int, stage: int, before: _Pass | None) -> list[Tensor]:
        """What the member before adds to the signal `x` at the door of a stage, in its shape."""
        if before is None:
            return []
        feeds, size = [], self._plane(x).shape[2:]
        for link, source in zip(self.links[member - 1][stage], self.sources[stage], strict=True):
            feed = link(before.stem if source < 0 else before.maps[source])
            feed = feed if feed.shape[2:] == size else F.interpolate(feed, size, mode="nearest")
            feeds.append(feed.permute(0, 2, 3, 1) if self.last else feed)
        return feeds

    def _plane(self, x: Tensor) -> Tensor:
        """A signal as a map (B, C, H, W)."""
        return x.permute(0, 3, 1, 2) if self.last else x


def _links(sources: tuple[tuple[int, ...], ...], sizes: Sizes, normed: bool) -> nn.ModuleList:
    """What leads from one member to the next: links[i] are those to the door of stage i, one a source."""
    return nn.ModuleList(
        nn.ModuleList(
            _link(sizes.stem if source < 0 else sizes.given[source], sizes.entered[stage], normed) for source in places
        )
        for stage, places in enumerate(sources)
    )


def _link(inputs: int, outputs: int, normed: bool) -> nn.Module:
    """A 1 x 1 convolution that starts at zero."""
    if normed:
        norm = nn.BatchNorm2d(outputs)
        nn.init.zeros_(norm.weight)
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), norm.eval())
    if inputs == outputs:
        return nn.Identity()
    conv = nn.Conv2d(inputs, outputs, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def published(state: Mapping[str, Tensor], backbone: CBNet) -> dict[str, Tensor]:
    """A detector's or backbone's released weights (VDIGPKU/CBNetV2, Apache-2.0) under our names.

    Args:
        state: tensors of a released checkpoint, as `torch.load(..., weights_only=True)` gives them.
        backbone: of `cbnet`, the same composite.

    Raises:
        ParityError: they are of another network; the message lists what is left over on both sides.
    """
    return convert(state, rules(), backbone)


def rules() -> Rules:
    """The authors' parameter names -> ours."""
    member = r"^cb_modules\.(\d+)\."
    renamed: list[tuple[str, str | None]] = [
        (r"^(module\.)?backbone\.", ""),
        (r"^(?!cb_)", None),  # a detector's neck and heads
        (r"^cb_modules\.[1-9]\d*\.bn1\.", None),  # the lead's stem norm outlives its stem, and is never used
        (r"relative_position_index$", None),  # a constant
        (r"^cb_linears\.", "links.0."),
        (member + r"conv1\.", r"stems.\1.0."),
        (member + r"bn1\.", r"stems.\1.1."),
        (member + r"stem\.([0134])\.", r"stems.\1.0.\2."),
        (member + r"stem\.6\.", r"stems.\1.0.6."),
        (member + r"stem\.7\.", r"stems.\1.1."),
        (member + r"patch_embed\.", r"stems.\1.0."),
    ]
    for stage in range(4):  # the authors' Swin merges patches at the end of a stage, timm's at the start of the next
        renamed += [
            (member + rf"layer{stage + 1}\.", rf"stages.{stage}.members.\1."),
            (member + rf"layers\.{stage}\.downsample\.", rf"stages.{stage + 1}.enters.\1."),
            (member + rf"layers\.{stage}\.blocks\.", rf"stages.{stage}.members.\1."),
            (member + rf"norm{stage}\.", rf"stages.{stage}.norms.\1."),
        ]
    return renamed


def effect(scale: Literal["toy", "gpu"], data: Dataset | None) -> Effect:
    """Two linked copies, with and without the assistant's loss, beside one of them and one twice as deep."""
    from vertebra.backbones.cbnet.experiment import experiment

    return experiment(scale, data)
