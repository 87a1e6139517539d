"""Bootstrap intervals of measures over crops, with resamples of photos.

Crops of one photo resemble each other, so resamples of crops would give too short intervals.
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
    """Measure over all photos (nan if there is none), and its value in each resample."""

    value: float
    resampled: Values

    @property
    def bias(self) -> float:
        """Return the mean of the resamples minus the value. Copies raise a Fréchet distance."""
        return float(np.nanmean(self.resampled)) - self.value

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval: percentiles of the resamples minus their bias."""
        low, high = np.nanpercentile(self.resampled, [2.5, 97.5]) - self.bias
        return float(low), float(high)

    def __sub__(self, other: Estimate) -> Estimate:
        """Return the paired difference of two estimates over the same photos and resamples."""
        return Estimate(self.value - other.value, self.resampled - other.resampled)


class PhotoBootstrap:
    """Resamples of photos, shared by all measures.

    ``photo`` is the number of each crop's photo, [N], ascending from 0 without gaps; ValueError for
    fewer than two photos. A Fréchet distance takes only the first ``frechet_resamples``.
    ``counts`` is how often each resample contains each photo, [resamples, photos].
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
        """Return the mean over crops, [N], that are not nan; None if all are nan."""
        known = ~np.isnan(values)
        if not known.any():
            return None
        sums = np.bincount(self._photo, np.where(known, values, 0), self._photos)
        sizes = np.bincount(self._photo, known, self._photos)
        with np.errstate(invalid="ignore"):  # nan for a resample without known values
            return Estimate(sums.sum() / sizes.sum(), self.counts @ sums / (self.counts @ sizes))

    def photo_mean(self, values: Values) -> Estimate:
        """Return the mean over photos, [photos]."""
        return Estimate(float(values.mean()), self.counts @ values / self._photos)

    def frechet(self, originals: Features, restored: Features) -> Estimate:
        """Return the Fréchet distance between features of the crops, [N, D] each."""
        chosen = self.counts[: self._frechet_resamples, self._photo]
        resampled = [frechet_distance(originals, restored, counts) for counts in chosen]
        return Estimate(frechet_distance(originals, restored), np.array(resampled))

    def kernel(self, originals: Features, restored: Features) -> Estimate:
        """Return the kernel distance (``KernelSums``) of features of the crops, [N, D] each."""
        sums = KernelSums(originals, restored, self._photo)
        return Estimate(sums.distance(), np.array([sums.distance(c) for c in self.counts]))
