"""Parameters, multiply-accumulates and activations for one image at the network's own size."""

from vertebra.contracts import Backbone, Probe, Report, Score
from vertebra.probes.evidence import Evidence
from vertebra.training.cost import count

VARIANTS: dict[str, dict[str, object]] = {}


def cost() -> "CostProbe":
    """The probe; the classifier that a task adds is not counted."""
    return CostProbe()


class CostProbe(Probe):
    """Counts, exact and without noise."""

    weightless = True

    def __call__(self, model: Backbone, data: Evidence) -> Report:
        counted = count(model)
        scores = {
            "params_m": Score(counted.params / 1e6, 1, "lower", "M"),
            "gmacs": Score(counted.macs / 1e9, 1, "lower", "G"),
            "activations_m": Score(counted.activations / 1e6, 1, "lower", "M"),
        }
        return Report(scores, {"resolution": list(counted.resolution)})
