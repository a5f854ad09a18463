"""Multinomial logistic regression on features, with its strength chosen on validation data.

The objective is scikit-learn's, divided by n: mean loss + strength / 2 * |weight|^2 on standardised features,
the bias left free, so that `strength = 1 / (C n)`. It is convex: the result depends on no seed. Many labels an
image are one-vs-rest: the sum of the classes' binary losses.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from scipy import optimize
from torch import Tensor, nn

STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00003, 0.00001)
"""From a nearly constant classifier to a nearly free one; each fit starts where the one before ended."""
PATIENCE = 2
"""Strengths without a better validation loss after which the path ends."""


class Step(NamedTuple):
    """One strength of a path.

    Attributes:
        strength: weight of the penalty.
        nll: mean loss on the validation data.
    """

    strength: float
    nll: float


class Classifier(nn.Module):
    """A linear classifier on features as the backbone gives them: the standardisation is folded in.

    Attributes:
        linear: features (B, width) to logits (B, classes).
        strength: the penalty that was chosen.
        path: the strengths that were tried, with their validation losses.
    """

    def __init__(self, *, linear: nn.Linear, strength: float, path: tuple[Step, ...]) -> None:
        super().__init__()
        self.linear = linear
        self.strength = strength
        self.path = path

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, width) to logits (B, classes)."""
        return self.linear(features)


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each image, (n,).

    Args:
        logits: (n, classes).
        targets: (n,) int64 for one label, (n, classes) float for many.
    """
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


def minimise(features: Tensor, wanted: Tensor, multi: bool, strength: float, start: Tensor, steps: int = 300) -> Tensor:
    """The parameters at the objective's minimum, by full-batch L-BFGS with the gradient written out.

    scipy's, not torch's: `torch.optim` imports the compiler at its first step, which takes longer than the fit.

    Args:
        features: (n, width), standardised.
        wanted: (classes, n) 0 or 1.
        multi: whether the columns of `wanted` may hold many ones.
        strength: weight of the penalty.
        start: (classes, width + 1), the bias last.
        steps: most iterations.

    Returns:
        (classes, width + 1).
    """

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat).to(features).view_as(start)
        weight, bias = parameters[:, :-1], parameters[:, -1:]
        logits = torch.addmm(bias, weight, features.T)  # (classes, n); this way round is twice as fast
        if multi:
            normaliser, probabilities = F.softplus(logits).sum(0), logits.sigmoid()
        else:
            normaliser, probabilities = logits.logsumexp(0), logits.softmax(0)
        nll = (normaliser - (logits * wanted).sum(0)).mean(dtype=torch.float64)  # a line search sees the last digits
        loss = nll + strength / 2 * weight.square().sum(dtype=torch.float64)
        residual = (probabilities - wanted) / len(features)
        gradient = torch.cat([residual @ features + strength * weight, residual.sum(1, keepdim=True)], dim=1)
        return loss.item(), gradient.flatten().cpu().numpy().astype(np.float64)

    first = start.flatten().cpu().numpy().astype(np.float64)
    found = optimize.minimize(
        objective, first, jac=True, method="L-BFGS-B", options={"maxiter": steps, "gtol": 3e-5, "ftol": 1e-12}
    )
    return torch.from_numpy(found.x).to(features).view_as(start)


def fit(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: int, strengths: tuple[float, ...] = STRENGTHS
) -> Classifier:
    """Fit on the training data, one strength after the other, and keep the one with the lowest validation loss.

    The validation data choose and do not train, so that they stay fit for a temperature.

    Args:
        train: features (n, width) and targets.
        val: features and targets.
        classes: outputs, also for classes without an image in `train`.
        strengths: penalties to try, falling.
    """
    features, targets = train
    multi = targets.ndim == 2
    wanted = targets.T.contiguous() if multi else F.one_hot(targets, classes).T.contiguous().to(features)
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / deviation, 0)  # constant features say nothing
    features = (features - mean) * scale
    parameters = features.new_zeros(classes, features.shape[1] + 1)
    found: list[tuple[Step, nn.Linear]] = []
    for strength in strengths:
        parameters = minimise(features, wanted, multi, strength, parameters)
        layer = _folded(parameters, mean, scale)
        found.append((Step(strength, losses(layer(val[0]), val[1]).mean().item()), layer))
        chosen = min(range(len(found)), key=lambda i: found[i][0].nll)
        if len(found) - 1 - chosen >= PATIENCE:
            break
    step, layer = found[chosen]
    return Classifier(linear=layer, strength=step.strength, path=tuple(step for step, _ in found))


def _folded(parameters: Tensor, mean: Tensor, scale: Tensor) -> nn.Linear:
    """The linear layer that does the standardisation and the classification at once."""
    weight = parameters[:, :-1] * scale  # (classes, width)
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device).requires_grad_(False)
    linear.weight.copy_(weight)
    linear.bias.copy_(parameters[:, -1] - weight @ mean)
    return linear
