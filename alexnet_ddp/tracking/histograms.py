"""A histogram of the values of a tensor, for the destinations that can show it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Histogram:
    """counts: of values in bins of equal width from low to high. Values are finite."""

    low: float
    high: float
    counts: list[int]
    sum: float
    sum_of_squares: float

    @property
    def limits(self) -> list[float]:
        """The upper ends of the bins."""
        width = (self.high - self.low) / len(self.counts)
        return [self.low + width * k for k in range(1, len(self.counts))] + [self.high]
