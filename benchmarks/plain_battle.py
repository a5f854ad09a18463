"""The plain way to one number of a battle: one contender, one probe, timm + torchvision + scikit-learn, nothing shared.

    python benchmarks/plain_battle.py --network resnet10t --weights FILE.safetensors --data FOLDER --probe knn

This is the peer of `benchmarks/battle.py`: decode, forward, fit, print one line of JSON. `seconds` leaves out Python's
imports. FOLDER has train/, val/ and test/ with a folder a class. The corruptions come from vertebra, since no
installable package has them; here they are applied image by image in the loader, as such scripts do.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

from vertebra.probes.corruption import SEVERITIES, subset
from vertebra.probes.corruptions import CORRUPTIONS, corrupted
from vertebra.probes.logistic import STRENGTHS

Transform = Callable[[Image.Image], torch.Tensor]


class Script:
    """One contender and one folder, as a script has them at hand."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data: Path = arguments.data
        self.images: int = arguments.corrupted
        self.model = timm.create_model(arguments.network, num_classes=0)
        self.model.load_state_dict(load_file(arguments.weights))
        self.model.eval()
        config = timm.data.resolve_data_config({"input_size": (3, arguments.size, arguments.size)}, model=self.model)
        self.transform: Transform = timm.data.create_transform(**config)

    @torch.inference_mode()
    def features(
        self, split: str, transform: Transform | None = None, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decode, transform and forward a split."""
        data = ImageFolder(self.data / split, transform or self.transform)
        loader = DataLoader(data if rows is None else Subset(data, rows.tolist()), batch_size=64)
        pairs = [(self.model(images).numpy(), labels.numpy()) for images, labels in loader]
        return np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])

    def knn(self) -> float:
        """Weighted vote of 20 neighbours."""
        (train, labels), (test, truth) = self.features("train"), self.features("test")
        classifier = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
        return 100 * classifier.fit(train, labels).score(test, truth)

    def fitted(self) -> Callable[[np.ndarray], np.ndarray]:
        """Logistic regression, its strength chosen on val: features to probabilities."""
        (train, labels), (val, chosen_by) = self.features("train"), self.features("val")
        scaler = StandardScaler().fit(train)
        train, val = scaler.transform(train), scaler.transform(val)
        best, least = None, np.inf
        for strength in STRENGTHS:
            classifier = LogisticRegression(C=1 / (strength * len(train)), max_iter=1000).fit(train, labels)
            loss = log_loss(chosen_by, classifier.predict_proba(val), labels=classifier.classes_)
            if loss < least:
                best, least = classifier, loss
        assert best is not None
        return lambda features: best.predict_proba(scaler.transform(features))

    def linear(self) -> float:
        """Top-1 accuracy of the linear classifier."""
        predict = self.fitted()
        test, truth = self.features("test")
        return 100 * float((predict(test).argmax(1) == truth).mean())

    def calibration(self) -> float:
        """Expected calibration error of the linear classifier, 15 bins."""
        predict = self.fitted()
        test, truth = self.features("test")
        probabilities = predict(test)
        confidence, right = probabilities.max(1), probabilities.argmax(1) == truth
        bins = np.minimum((confidence * 15).astype(int), 14)
        return 100 * float(np.abs(np.bincount(bins, right - confidence, minlength=15)).sum() / len(truth))

    def few_shot(self) -> float:
        """Ridge classifier on 10 images a class, mean over 10 draws; and the same for 5 and 1."""
        (train, labels), (test, truth) = self.features("train"), self.features("test")
        rng = np.random.default_rng(0)
        found = {}
        for shots in (10, 5, 1):
            accuracy = []
            for _ in range(10):
                rows = np.concatenate(
                    [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
                )
                mean = train[rows].mean(0)
                wanted = np.eye(labels.max() + 1)[labels[rows]]
                classifier = Ridge(1.0, fit_intercept=False).fit(normalize(train[rows] - mean), wanted - wanted.mean(0))
                accuracy.append((classifier.predict(normalize(test - mean)).argmax(1) == truth).mean())
            found[shots] = 100 * float(np.mean(accuracy))
        return found[10]

    def retrieval(self) -> float:
        """Mean average precision of each test image among the others."""
        test, truth = self.features("test")
        similarity = normalize(test) @ normalize(test).T
        precision = []
        for i, label in enumerate(truth):
            relevant = np.delete(truth == label, i)
            if relevant.any():
                precision.append(average_precision_score(relevant, np.delete(similarity[i], i)))
        return 100 * float(np.mean(precision))

    def corruption(self) -> float:
        """Top-1 accuracy over the 15 corruptions, severities dealt out as the probe deals them."""
        predict = self.fitted()
        rows = subset(torch.tensor(ImageFolder(self.data / "test").targets), self.images).numpy()
        right = []
        for kind, name in enumerate(CORRUPTIONS):
            for level in range(SEVERITIES):
                shown = rows[(level - kind) % SEVERITIES :: SEVERITIES]
                if len(shown):
                    test, truth = self.features("test", self._corrupting(name, level + 1), shown)
                    right.append(predict(test).argmax(1) == truth)
        return 100 * float(np.concatenate(right).mean())

    def _corrupting(self, name: str, severity: int) -> Transform:
        """The network's transform with a corruption between the resize and the normalisation."""
        *before, to_tensor, normalise = self.transform.transforms  # type: ignore[attr-defined]

        def apply(image: Image.Image) -> torch.Tensor:
            for step in before:
                image = step(image)
            pixels = corrupted(np.asarray(image.convert("RGB"))[None], name, severity)[0]
            return normalise(to_tensor(Image.fromarray(pixels)))

        return apply


PROBES = ("knn", "linear", "few_shot", "retrieval", "calibration", "corruption")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True, help="timm's name")
    parser.add_argument("--weights", required=True, type=Path, help="safetensors without the classifier")
    parser.add_argument("--data", required=True, type=Path, help="folder with train/, val/ and test/")
    parser.add_argument("--size", type=int, default=112, help="side in pixels that the network sees")
    parser.add_argument("--corrupted", type=int, default=256, help="test images that are corrupted")
    parser.add_argument("--probe", required=True, choices=PROBES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    value = getattr(Script(arguments), arguments.probe)()
    print(json.dumps({"value": value, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
