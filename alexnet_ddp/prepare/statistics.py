"""Exact sums over the pixels of a data set: added shard by shard, in any order, to the same integers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

_AT_ONCE = 1 << 20  # pixels


@dataclass
class Statistics:
    """Integer sums over RGB values in 0..255. Python's integers have no largest one."""

    images: int = 0
    pixels: int = 0
    sums: list[int] = field(default_factory=lambda: [0] * 3)
    products: list[list[int]] = field(
        default_factory=lambda: [[0] * 3 for _ in range(3)]
    )  # sums of R*R, R*G, ...
    widths: list[int] = field(default_factory=lambda: [0, 0, 0])  # sum, smallest, largest
    heights: list[int] = field(default_factory=lambda: [0, 0, 0])

    def add(self, image: np.ndarray) -> None:
        """image: uint8 [height, width, 3]."""
        flat = image.reshape(-1, 3)
        sums, products = np.zeros(3), np.zeros((3, 3))
        for start in range(0, len(flat), _AT_ONCE):
            planes = flat[start : start + _AT_ONCE].T.astype(np.float64, order="C")
            sums += planes.sum(1)  # whole numbers below 2^53: still exact
            products += planes @ planes.T
        height, width = image.shape[:2]
        self.merge(
            Statistics(
                1,
                len(flat),
                [int(value) for value in sums],
                [[int(value) for value in row] for row in products],
                [width] * 3,
                [height] * 3,
            )
        )

    def merge(self, other: "Statistics") -> None:
        for mine, theirs in ((self.widths, other.widths), (self.heights, other.heights)):
            if other.images:
                smallest = min(mine[1], theirs[1]) if self.images else theirs[1]
                mine[:] = [mine[0] + theirs[0], smallest, max(mine[2], theirs[2])]
        self.images += other.images
        self.pixels += other.pixels
        self.sums = [a + b for a, b in zip(self.sums, other.sums)]
        self.products = [
            [a + b for a, b in zip(row, more)] for row, more in zip(self.products, other.products)
        ]

    def summary(self) -> dict[str, Any]:
        """Mean, standard deviation and covariance of RGB in [0, 1], over all pixels; its eigenvectors as columns.

        They are what Krizhevsky 2012, section 4.1, needs for its colour noise. Divisors are the number of pixels.
        """
        n = max(1, self.pixels)
        covariance = [
            [
                (n * self.products[i][j] - self.sums[i] * self.sums[j]) / (n * n) / 255**2
                for j in range(3)
            ]
            for i in range(3)
        ]
        values, vectors = np.linalg.eigh(np.array(covariance))
        order = np.argsort(-values)
        vectors = vectors[:, order]
        vectors = vectors * np.where(
            vectors[np.abs(vectors).argmax(0), np.arange(3)] < 0, -1, 1
        )  # a sign for all
        return {
            "mean": [value / n / 255 for value in self.sums],
            "std": [max(0.0, covariance[i][i]) ** 0.5 for i in range(3)],
            "covariance": covariance,
            "eigenvalues": np.maximum(0.0, values[order]).round(12).tolist(),
            "eigenvectors": vectors.round(9).tolist(),
            "mean_width": self.widths[0] / max(1, self.images),
            "mean_height": self.heights[0] / max(1, self.images),
        }
