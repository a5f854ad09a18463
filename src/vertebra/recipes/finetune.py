"""Fine-tune pretrained weights on a small set of images: the default wherever weights are given.

    vertebra train DATA --backbone timm/convnext_nano.in12k_ft_in1k --recipe finetune

Expected: 69.4 % top-1 on the test split (372 images) of the clothing dataset (900 training images, 10 garments) with
`timm/test_resnet` at 64 pixels, from weights that 8 epochs of CIFAR-10 had made; `scratch`, with twice the steps,
comes to 63.2 %.

AdamW with the rate falling by a quarter for each part from the head back, so that what the weights know is
kept where it is general; averaged weights; mild views; epochs such that small sets get about a thousand steps.
"""

from vertebra.config import Plan, Run, Views
from vertebra.recipes import batch_for, epochs_for
from vertebra.spec import Spec

STEPS = 1000


def finetune(data: str, backbone: Spec, images: int) -> Run:
    """The run for a training set of `images` images."""
    batch = batch_for(images, most=32)
    plan = Plan(
        epochs=epochs_for(images, batch, steps=STEPS, least=8, most=60),
        batch=batch,
        lr=1e-3,
        weight_decay=0.05,
        layer_decay=0.75,
        warmup_epochs=2.0,
        ema=0.998,
        views=Views(scale=(0.4, 1.0), jitter=0.2),
        precision="auto",
    )
    return Run(data=data, backbone=backbone, recipe="finetune", plan=plan)
