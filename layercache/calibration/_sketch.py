"""Count-sketches: short linear images of long vectors that keep inner products.

Each of the N coordinates is given a random sign and added to one of S random buckets. The inner
product of two sketches is an unbiased estimate of that of the vectors, with a standard deviation of
at most sqrt(2 / S) times the product of their norms (Charikar, Chen and Farach-Colton, 2002;
Weinberger et al., 2009).
"""

from __future__ import annotations

import torch
from torch import Tensor

from layercache.errors import StatsError

_PIECE = 1 << 20


class CountSketch:
    """A seeded linear map from N numbers to `size`.

    Where N <= `size` it is the identity, with N numbers, unless `exact` is False.

    Example:
        >>> sketch = CountSketch(numel=6, size=8, seed=0)
        >>> sketch(torch.arange(12.0).reshape(2, 2, 3)).shape
        torch.Size([2, 6])
    """

    def __init__(self, numel: int, size: int, seed: int, *, exact: bool = True) -> None:
        self.numel = numel
        self._exact = exact and numel <= size
        self.size = numel if self._exact else size
        # Drawn on the CPU, so that every device has the same ones.
        generator = torch.Generator().manual_seed(seed)
        bucket = torch.randint(self.size, (numel,), generator=generator)
        sign = torch.randint(2, (numel,), generator=generator) * 2 - 1
        self._bucket, self._sign = bucket.to(torch.int32), sign.to(torch.int8)

    def __call__(self, batch: Tensor) -> Tensor:
        """Sketch each item of a batch on its device: (B, ...) of N elements, to (B, S) float32."""
        flat = batch.reshape(len(batch), -1)
        if flat.shape[1] != self.numel:
            raise StatsError(
                f"a velocity has {flat.shape[1]} elements where {self.numel} were expected: the "
                "output's shape changed within a run"
            )
        if self._exact:
            return flat.float()
        self._bucket, self._sign = self._bucket.to(flat.device), self._sign.to(flat.device)
        result = flat.new_zeros(len(flat), self.size, dtype=torch.float32)
        # In pieces, so that the signed copy and the wide indices stay small.
        for start in range(0, self.numel, _PIECE):
            piece = slice(start, start + _PIECE)
            signed = flat[:, piece].float() * self._sign[piece]
            result.scatter_add_(1, self._bucket[piece].long().expand(len(flat), -1), signed)
        return result

    @property
    def nbytes(self) -> int:
        """Bytes of its tables."""
        return self._bucket.nbytes + self._sign.nbytes
