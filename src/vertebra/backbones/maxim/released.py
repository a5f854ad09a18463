"""The names and the layout of the authors' released weights, which are flax's, and ours.

Names are "a/b/c", kernels (height, width, inputs, outputs).
"""

import re

from torch import Tensor

from vertebra.backbones.maxim.stage import DEPTH
from vertebra.parity import Rules


def spread(name: str) -> str:
    """Flax numbers the projections of skips in the order of their making; here they get stage, level and number."""
    found = re.match(r"UpSampleRatio_(\d+)/Conv_0/", name)
    if not found:
        return name
    stage, place = divmod(int(found[1]), 2 * DEPTH**2)
    half, place = divmod(place, DEPTH**2)
    level, number = divmod(place, DEPTH)
    part = "decoders.{}.group.project" if half else "gates.{}.project_x"
    return f"stages.{stage}.{part.format(DEPTH - 1 - level)}.projections.{number}.{name[found.end() :]}"


def turned_kernel(name: str, value: Tensor) -> Tensor:
    """A kernel in torch's layout; anything else as it is."""
    if not name.endswith("kernel"):
        return value
    if value.ndim == 2:
        return value.mT
    if "ConvTranspose" in name:  # flax runs the kernel over the spread map, torch spreads the kernel: turned around
        return value.flip(0, 1).permute(2, 3, 0, 1)
    return value.permute(3, 2, 0, 1)


def rules() -> Rules:
    """The reference's names -> ours."""
    parts = [("input_conv", "entries.{}.conv"), ("input_fuse_sam", "entries.{}.fuse"), ("encoder_block", "encoders.{}")]
    parts += [("global_block", "bottleneck.{}"), ("cross_gating_block", "gates.{}")]
    parts += [("decoder_block", "decoders.{}"), ("supervised_attention_module", "attentions.{}")]
    places = [(rf"^stage_(\d+)_{theirs}_(\d+)/", r"stages.\1." + ours.format(r"\2") + "/") for theirs, ours in parts]
    groups = [
        (r"(decoders\.\d)/UNetEncoderBlock_0/Conv_0/", r"\1.group.project.mix."),
        (r"(decoders\.\d)/UNetEncoderBlock_0/", r"\1.group/"),
        (r"(decoders\.\d)/ConvTranspose_0/", r"\1.up."),
        (r"(encoders\.\d)/Conv_0/", r"\1.group.project."),
        (r"(encoders\.\d)/Conv_1/", r"\1.down."),
        (r"(encoders\.\d)/cross_gating_block/", r"\1.fuse/"),
        (r"(encoders\.\d)/", r"\1.group/"),
        (r"(bottleneck\.\d)/input_proj/", r"\1.project."),
    ]
    blocks = [(rf"SplitHeadMultiAxisGmlpLayer_{n}/", f"blocks.{2 * n}/") for n in range(9)]
    blocks += [(rf"channel_attention_block_1_?{n}/", f"blocks.{2 * n + 1}/") for n in range(9)]
    gating = [
        (r"(gates\.\d)/Conv_0/", r"\1.project_x.mix."),
        (r"(fuse)/Conv_0/", r"\1.project_x."),
        (r"(fuse|gates\.\d)/Conv_1/", r"\1.project_y."),
        (r"(gates\.\d)/ConvTranspose_0/", r"\1.upsample."),
        (r"SplitHeadMultiAxisGating_(x|y)/Dense_(\d)/", r"gates_\1.mixes.\2."),
        (r"SplitHeadMultiAxisGating_(x|y)/", r"gates_\1/"),
    ]
    leaves = [
        (r"attentions\.(\d)/Conv_0/", r"attentions.\1.features."),
        (r"attentions\.(\d)/Conv_1/", r"attentions.\1.image."),
        (r"attentions\.(\d)/Conv_2/", r"attentions.\1.gate."),
        (r"channel_attention/Conv_0/", "attention.squeeze."),
        (r"channel_attention/Conv_1/", "attention.excite."),
        (r"channel_mixing/Dense_0/", "inner."),
        (r"channel_mixing/Dense_1/", "outer."),
        (r"Grid(GmlpLayer|GatingUnit)/", r"\1_0/"),
        (r"Block(GmlpLayer|GatingUnit)/", r"\1_1/"),
        (r"GmlpLayer_(\d)/", r"mlps.\1/"),
        (r"GatingUnit_\d/intermediate_layernorm/", "gate_norm."),
        (r"GatingUnit_\d/Dense_0/", "mix."),
        (r"LayerNorm(_in)?/", "norm."),
        (r"LayerNorm_", "norm_"),
        (r"in_project", "expand"),
        (r"out_project", "reduce"),
        (r"/", "."),
        (r"\.(kernel|scale)$", ".weight"),
    ]
    return [*places, *groups, *blocks, *gating, *leaves]
