"""Bootstrap intervals for measures of crops. The resamples choose photos, not crops.

Crops of one photo resemble each other, so resamples of crops would give intervals that are too
short.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from percov2.evaluation.realism import Features, KernelSums, frechet_distance

__all__ = ["Estimate", "PhotoBootstrap", "Values"]

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """The value of a measure over all photos, and its values in the resamples.

    The value is nan if the measure has none.
    """

    value: float
    resampled: Values

    @property
    def bias(self) -> float:
        """Return the mean of the resamples minus the value.

        Resamples contain copies of photos, which raise a Fréchet distance.
        """
        return float(np.nanmean(self.resampled)) - self.value

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval: two percentiles of the resamples, each minus the bias."""
        low, high = np.nanpercentile(self.resampled, [2.5, 97.5]) - self.bias
        return float(low), float(high)

    def __sub__(self, other: Estimate) -> Estimate:
        """Return the paired difference of two estimates over the same photos and resamples."""
        return Estimate(self.value - other.value, self.resampled - other.resampled)


class PhotoBootstrap:
    """Resamples of photos that all measures share.

    Args:
        photo: number of each crop's photo, [N], ascending from 0 without gaps.
        resamples: number of resamples.
        frechet_resamples: number of resamples that a Fréchet distance uses.
        seed: seed of the resamples.

    Attributes:
        counts: how often each resample contains each photo, [resamples, photos].

    Raises:
        ValueError: there are fewer than two photos.
    """

    def __init__(
        self,
        photo: NDArray[np.int64],
        resamples: int = 1000,
        frechet_resamples: int = 200,
        seed: int = 0,
    ) -> None:
        self._photo = photo
        self._photos = int(photo.max(initial=-1)) + 1
        if self._photos < 2:
            raise ValueError(f"intervals need at least two photos, not {self._photos}")
        picks = np.random.default_rng(seed).integers(0, self._photos, (resamples, self._photos))
        self.counts = np.stack([np.bincount(row, minlength=self._photos) for row in picks])
        self._frechet_resamples = frechet_resamples

    def mean(self, values: Values) -> Estimate | None:
        """Return the mean of the values of crops, [N], without nan, or None if all are nan."""
        known = ~np.isnan(values)
        if not known.any():
            return None
        sums = np.bincount(self._photo, np.where(known, values, 0), self._photos)
        sizes = np.bincount(self._photo, known, self._photos)
        with np.errstate(invalid="ignore"):  # nan for a resample without known values
            return Estimate(sums.sum() / sizes.sum(), self.counts @ sums / (self.counts @ sizes))

    def photo_mean(self, values: Values) -> Estimate:
        """Return the mean of the values of photos, [photos]."""
        return Estimate(float(values.mean()), self.counts @ values / self._photos)

    def frechet(self, originals: Features, restored: Features) -> Estimate:
        """Return the Fréchet distance between the crops' features, each [N, D]."""
        chosen = self.counts[: self._frechet_resamples, self._photo]
        resampled = [frechet_distance(originals, restored, counts) for counts in chosen]
        return Estimate(frechet_distance(originals, restored), np.array(resampled))

    def kernel(self, originals: Features, restored: Features) -> Estimate:
        """Return the kernel distance (``KernelSums``) between the crops' features, each [N, D]."""
        sums = KernelSums(originals, restored, self._photo)
        return Estimate(sums.distance(), np.array([sums.distance(c) for c in self.counts]))
