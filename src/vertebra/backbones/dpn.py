"""DPN: a residual path that is added to and a dense path that is concatenated to, in every block.

Each block reads both paths at once and writes to both, so features are reused as in ResNet and new ones are kept as
in DenseNet. The maps of the pyramid are both paths concatenated. The 3x3 convolutions are grouped; norms stand
before the convolutions, with eps 1e-3.

timm follows the authors' MXNet networks and carries their weights. 48b is timm's own, smaller; the `b` networks end
each block in two convolutions instead of one, at the same parameter count. The authors' pooling at test time (half
mean, half maximum of the class map) belongs to a classifier and is not part of the backbone.
"""

from typing import Unpack

from vertebra.backbones.timm import Timm, TimmOptions, build_variant
from vertebra.paper import Paper

PAPER = Paper(
    id="dpn",
    title="Dual Path Networks",
    year=2017,
    arxiv="1707.01629",
    reference="cypw/DPNs",
    licence="none stated",
    claim=(
        "DPN-98 beats ResNeXt-101 64x4d with a 26 % smaller model, 25 % less compute and 8 % less memory; ImageNet "
        "top-1 error 19.93 % (DPN-131)"
    ),
    note="The README's 2.5 GMACs for DPN-68 are 7 % above any count of the network; the released network is kept.",
)

VARIANTS = {
    "68": {"timm": "dpn68"},
    "48b": {"timm": "dpn48b"},
    "68b": {"timm": "dpn68b"},
    "92": {"timm": "dpn92"},
    "98": {"timm": "dpn98"},
    "131": {"timm": "dpn131"},
    "107": {"timm": "dpn107"},
}


def dpn(variant: str = "68", **options: Unpack[TimmOptions]) -> Timm:
    """Build a dual path network; options as in `TimmOptions`."""
    return build_variant(PAPER.id, VARIANTS, variant, options)
