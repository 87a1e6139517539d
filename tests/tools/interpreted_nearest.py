"""Run by test_nearest.py with TRITON_INTERPRET=1: the kernel against torch on CPU tensors."""

from __future__ import annotations

import torch

from percov2.triton_kernels import nearest_codes


def compare_random(rows: int, codes: int, dim: int) -> None:
    """Float inputs: the chosen code is as similar as the best one, up to rounding."""
    generator = torch.Generator().manual_seed(rows * 10007 + codes * 101 + dim)
    vectors = torch.randn(rows, dim, generator=generator)
    codebook = torch.nn.functional.normalize(torch.randn(codes, dim, generator=generator), dim=1)
    got = nearest_codes(vectors, codebook)
    assert got.dtype == torch.int32
    assert got.shape == (rows,)
    similarity = vectors.double() @ codebook.double().T
    chosen = similarity.gather(1, got.long()[:, None])[:, 0]
    assert (similarity.amax(1) - chosen).max() <= 1e-5
    clear = similarity.topk(min(2, codes)).values
    sure = clear[:, 0] - clear[:, -1] > 1e-5 if codes > 1 else torch.ones(rows, dtype=torch.bool)
    assert sure.float().mean() > 0.9
    assert torch.equal(got[sure].long(), similarity.argmax(1)[sure])


def compare_ties(rows: int, codes: int, dim: int) -> None:
    """Small integers: sums are exact, ties abound, within a tile and between tiles."""
    generator = torch.Generator().manual_seed(rows + codes + dim)
    vectors = torch.randint(-1, 2, (rows, dim), generator=generator).float()
    codebook = torch.randint(-1, 2, (codes, dim), generator=generator).float()
    similarity = vectors @ codebook.T
    best = similarity == similarity.amax(1, keepdim=True)
    assert (best.sum(1) > 1).any()
    lowest = best.int().argmax(1)
    assert torch.equal(nearest_codes(vectors, codebook).long(), lowest)


for shape in ((1, 1, 1), (5, 7, 3), (64, 64, 32), (65, 129, 33), (130, 256, 32), (7, 1000, 70)):
    compare_random(*shape)
for shape in ((3, 300, 2), (70, 200, 5), (64, 129, 40)):
    compare_ties(*shape)
assert nearest_codes(torch.zeros(0, 4), torch.ones(3, 4)).shape == (0,)
# A non-contiguous view is read as what it means.
wide = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
codes = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
assert torch.equal(nearest_codes(wide.T, codes), nearest_codes(wide.T.contiguous(), codes))
print("agreed")
