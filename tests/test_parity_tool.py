"""The parity tool must see what a careless re-implementation gets wrong, and must not see what is the same."""

import json

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

from vertebra import parity
from vertebra.backbones.timm import timm
from vertebra.errors import DataError, ParityError, UsageError
from vertebra.parity import check_golden, compare, convert, fill, fill_as, golden, images, store, stored

SHAPE = (2, 3, 32, 31)


class Small(nn.Module):
    """A convolution, a norm, two residual blocks with attention over channels, a linear layer."""

    def __init__(self, *, scale: float = 1.0, flip: bool = False, late_bias: bool = False) -> None:
        super().__init__()
        self.scale, self.flip, self.late_bias = scale, flip, late_bias
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.table = nn.Parameter(torch.zeros(1, 8, 1, 1))
        self.head = nn.Linear(8, 5)
        self.register_buffer("mask", torch.full((4,), -100.0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.stem(x)).relu()
        for block in reversed(self.blocks) if self.flip else self.blocks:
            y = nn.functional.conv2d(x, block.weight, None, padding=1) if self.late_bias else block(x)
            x = x + self.scale * y.relu()
            x = x + block.bias[:, None, None] if self.late_bias else x
        return {"map": x * self.table, "logits": self.head(x.mean((2, 3)))}


class Renamed(Small):
    """The same computation under other names, its head as a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn = self.stem, self.norm
        self.stages, self.fc = self.blocks, nn.Conv2d(8, 5, 1)
        del self.stem, self.norm, self.blocks, self.head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bn(self.conv_stem(x)).relu()
        for block in self.stages:
            x = x + block(x).relu()
        return x * self.table, self.fc(x.mean((2, 3), keepdim=True)).flatten(1)


RULES = [("^conv_stem", "stem"), ("^bn", "norm"), ("^stages", "blocks"), ("^fc", "head")]


def one_weight_moved() -> Small:
    small = fill(Small())
    with torch.no_grad():
        small.blocks[1].weight[3, 2, 1, 1] *= 1.05
    return small


def channels_permuted() -> Small:
    small = fill(Small())
    with torch.no_grad():
        small.stem.weight.copy_(small.stem.weight.flip(1))  # BGR in place of RGB
    return small


MISTAKES = {
    "weight": one_weight_moved,
    "order of channels": channels_permuted,
    "order of blocks": lambda: fill(Small(flip=True)),
    "place of the bias": lambda: fill(Small(late_bias=True)),
    "scale": lambda: fill(Small(scale=1.001)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen_by_compare_and_by_golden_numbers(mistake):
    ours, reference = MISTAKES[mistake](), fill(Small())
    assert compare(reference, fill(Small()), images(SHAPE)) == {"map": 0, "logits": 0}
    found = compare(ours, reference, images(SHAPE))
    assert min(found.values()) > parity.TOLERANCE
    with torch.inference_mode():
        expected = golden(reference.eval()(images(SHAPE)))
        assert max(check_golden(reference(images(SHAPE)), expected).values()) < 1e-7
        with pytest.raises(ParityError, match=r"is not the golden"):
            check_golden(ours.eval()(images(SHAPE)), expected)


def test_what_leaks_between_images_is_seen():
    class Leaky(Small):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            found = super().forward(x)
            return {**found, "logits": found["logits"] - 0.01 * found["logits"].mean(0)}

    found = compare(fill(Leaky()), fill(Small()), images(SHAPE))
    assert found["map"] == 0 and found["logits"] > 1e-3


def test_fill_depends_on_names_and_shapes_alone():
    torch.manual_seed(1)
    one = fill(Small()).state_dict()
    torch.manual_seed(2)
    other = fill(Small()).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    # fixed for ever: golden numbers of every page hang on these
    assert one["stem.weight"].flatten()[:3].tolist() == pytest.approx(STEM, rel=1e-6)
    assert one["norm.running_var"].min() > 0.5 and one["norm.running_mean"].abs().max() < 0.03
    assert torch.equal(one["mask"], torch.full((4,), -100.0)) and one["steps"] == 0
    assert (one["table"] > 0.5).all(), "a gain lies around 1, whatever its dimensions of 1"
    assert not torch.equal(one["blocks.0.weight"], one["blocks.1.weight"])


STEM = [0.073381528, 0.45745793, -0.139417365]


def test_images_are_the_same_everywhere_and_differ_from_each_other():
    found = images((2, 3, 24, 20))
    assert found.flatten()[[0, 700, 2879]].tolist() == pytest.approx(PIXELS, abs=1e-6)
    assert abs(found.mean()) < 0.2 and found.std() == pytest.approx(1, abs=0.15)
    assert (found[0] - found[1]).abs().mean() > 0.5


PIXELS = [-1.393062, 0.556659, -1.72448]


def test_a_reference_with_other_names_computes_the_same():
    ours, reference = fill(Small()), fill_as(Renamed(), RULES)
    found = compare(ours, reference, images(SHAPE), read_reference=lambda out: {"map": out[0], "logits": out[1]})
    assert max(found.values()) < 1e-6
    mapping = {name: name for name, _ in Renamed().named_parameters()}
    wrong = compare(ours, fill_as(Renamed(), mapping), images(SHAPE), read=lambda out: list(out.values()))
    with pytest.raises(UsageError, match=r"both become 'same'"):
        fill_as(Renamed(), lambda name: "same")
    assert min(wrong.values()) > 0.1


def test_compare_refuses_what_proves_nothing():
    small, dead = fill(Small()), fill(Small())
    with torch.no_grad():
        dead.head.weight.zero_()
    with pytest.raises(ParityError, match="logits of the reference hardly depends on the image"):
        compare(small, dead, images(SHAPE))
    with pytest.raises(ParityError, match="hardly depends on the image"):
        compare(small, Small(), images((1, 3, 32, 32)).repeat(2, 1, 1, 1))
    with pytest.raises(ParityError, match=r"ours alone: map; the reference's alone: none"):
        compare(small, fill(Small()), images(SHAPE), read_reference=lambda out: {"logits": out["logits"]})
    with pytest.raises(UsageError, match="output 0 is a str"):
        compare(small, fill(Small()), images(SHAPE), read=list)
    with pytest.raises(UsageError, match="parity is compared in 32 bit"):
        compare(small.bfloat16(), Small(), images(SHAPE))
    with pytest.raises(UsageError, match="needs inputs for a Small"):
        compare(Small(), Small())


def test_compare_evaluates_and_gives_modes_back():
    ours, reference = fill(Small()).train(), fill(Small()).train()
    ours.norm.eval()
    before = ours.norm.running_mean.clone()
    assert max(compare(ours, reference, images(SHAPE)).values()) == 0
    assert ours.training and not ours.norm.training and reference.norm.training
    assert torch.equal(ours.norm.running_mean, before)


def test_not_a_number_is_infinitely_far():
    reference = fill(Small())
    ours = fill(Small())
    with torch.no_grad():
        ours.head.bias[0] = float("nan")
    assert compare(ours, reference, images(SHAPE)) == {"map": 0, "logits": float("inf")}


def test_backbones_are_compared_at_their_own_and_at_an_odd_size():
    ours, theirs = fill(timm("test_resnet", image_size=48)), fill(timm("test_resnet", image_size=48))
    sizes = []
    theirs.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    found = compare(ours, theirs)
    assert found == {f"pyramid.{i}": 0 for i in range(len(ours.levels))} | {"pooled": 0}
    assert sizes == [(2, 3, 48, 48), (2, 3, 47, 33)]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("resnet18", 0.1, 100),
        ("vovnet39a", 0.1, 100),
        ("efficientnet_b0", 0.01, 100),
        ("densenet121", 0.01, 100),
        ("vit_tiny_patch16_224", 0.1, 10),
        ("resnet152", 1, 1e6),
    ],
)
def test_signals_of_deep_networks_neither_die_nor_explode(name, least, most):
    keywords = {"img_size": 48} if "vit" in name else {}
    network = fill(create_model(name, num_classes=0, **keywords)).eval()
    with torch.inference_mode():
        found = network.forward_features(images((2, 3, 48, 48)))
    assert least < found.std() < most
    assert parity.difference(found[0], found[1]) > 0.02


def test_golden_numbers_are_small_and_kept_beside_what_is_there(tmp_path):
    file = tmp_path / "page.json"
    file.write_text('{\n  "source": "paper",\n  "variants": {\n    "a": {"params_m": 1.0}\n  }\n}\n')
    with torch.inference_mode():
        found = golden(fill(Small()).eval()(images(SHAPE)))
    store(file, "a", found, shape=SHAPE, source="owner/name at 1234567")
    store(file, "b", found, shape=SHAPE, source="owner/name at 1234567")
    whole = json.loads(file.read_text())
    assert whole["variants"] == {"a": {"params_m": 1.0}} and set(whole["parity"]) == {"a", "b"}
    assert len(file.read_text().splitlines()) == 10 and len(json.dumps(found)) < 700
    kept = stored(file, "a")
    assert kept.shape == SHAPE and kept.source.endswith("1234567")
    with torch.inference_mode():
        check_golden(fill(Small()).eval()(images(kept.shape)), kept.golden)
        with pytest.raises(ParityError, match=r"missing: logits; new: none"):
            check_golden({"map": torch.zeros(1)}, kept.golden)
        with pytest.raises(ParityError, match=r"map has shape"):
            check_golden({"map": torch.zeros(1), "logits": torch.zeros(1)}, kept.golden)
    with pytest.raises(DataError, match=r"no parity numbers of 'c'.*it has a, b"):
        stored(file, "c")


def test_published_names_become_ours():
    published = fill_as(Renamed(), RULES).state_dict()
    published["aux.weight"] = torch.zeros(3)
    del published["bn.num_batches_tracked"]  # as checkpoints from before torch 0.4.1
    ours = Small()
    ours.load_state_dict(convert(published, [*RULES, ("^aux", None)], ours))
    assert all(torch.equal(value, fill(Small()).state_dict()[name]) for name, value in ours.state_dict().items())


def test_what_does_not_fit_is_listed_on_both_sides():
    published = {**Renamed().state_dict(), "aux.weight": torch.zeros(3), "fc.bias": torch.zeros(7)}
    with pytest.raises(ParityError) as caught:
        convert(published, RULES[:2] + RULES[3:], Small())
    said = str(caught.value)
    assert "left over in the checkpoint: aux.weight, stages.0.bias" in said
    assert "missing from it: blocks.0.bias" in said
    assert "other shapes: fc.bias (7,) -> head.bias (5,)" in said
    with pytest.raises(ParityError, match=r"two become one: .*stages\.1\.bias -> blocks\.0\.bias"):
        convert(published, [*RULES, (r"^blocks\.1", "blocks.0")], Small())
