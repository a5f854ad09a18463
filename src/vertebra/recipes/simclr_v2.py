"""Pretrain without labels by SimCLRv2 (arXiv 2006.10029): LARS, strong views, many epochs.

    vertebra pretrain DATA --method simclr_v2 --backbone sk_resnet/50_1x_sk

The paper's rate at a batch of 4,096 for 800 epochs is 0.1 times the batch's root; with fewer epochs the reference takes
0.075 times, as here. Small sets get about 20 thousand steps.
"""

import math

from vertebra.config import Plan, Run, Views
from vertebra.recipes import batch_for, epochs_for
from vertebra.spec import Spec

STEPS = 20_000


def simclr_v2(data: str, backbone: Spec, images: int) -> Run:
    """The run for a training set of `images` images."""
    batch = batch_for(images, most=256)
    epochs = epochs_for(images, batch, steps=STEPS, least=100, most=800)
    views = Views(
        scale=(0.08, 1.0),
        jitter=0.8,
        hue=0.2,
        jitter_chance=0.8,
        grey=0.2,
        blur=0.5,
    )
    plan = Plan(
        epochs=epochs,
        batch=batch,
        optimizer="lars",
        lr=0.075 * math.sqrt(batch),
        weight_decay=1e-4,
        warmup_epochs=0.05 * epochs,
        clip=None,
        views=views,
        more_views=(views,),
        evaluate_every=max(1, epochs // 20),
        precision="auto",
    )
    return Run(data=data, backbone=backbone, recipe="simclr_v2", plan=plan, method=Spec("simclr_v2", kind="methods"))
