"""A moment in 8 bits, as bitsandbytes holds it, read and set as fp32 (Dettmers et al. 2022, arXiv:2110.02861).

    value = table[code] x scale of its block of 256

A checkpoint holds the values, so that any number of ranks can read them. Set again in the same blocks, they give the
same codes and scales, down to the smallest normal fp32 number.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

BLOCK = 256
"""Elements that share a scale; bitsandbytes has no other size for optimizers."""
AT_A_TIME = 2**22
"""Elements widened together, a multiple of BLOCK: 16 MiB of values, and twice that of indices."""


@dataclass(frozen=True)
class Quantised:
    """A 1-D run of values, with the methods of a tensor that saving and loading need."""

    codes: torch.Tensor
    """uint8, one for each value."""
    scales: torch.Tensor
    """fp32, one for each block of the whole tensor."""
    table: torch.Tensor
    """The 256 values of the codes, fp32, ascending, in [-1, 1]."""
    first: int = 0
    """Where this run begins in the whole tensor."""

    dtype = torch.float32

    def numel(self) -> int:
        """Number of values."""
        return self.codes.numel()

    def element_size(self) -> int:
        """Bytes of a value where it is saved."""
        return self.dtype.itemsize

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What changes during training."""
        return self.codes, self.scales

    @property
    def is_cuda(self) -> bool:
        """Whether it is on a GPU."""
        return self.codes.is_cuda

    def any(self) -> bool:
        """Whether a value is not zero."""
        return bool(self.scales.any())

    def zero_(self) -> None:
        """As it is before the first step."""
        self.codes.zero_()
        self.scales.zero_()

    def to(self, device: str, copy: bool = False) -> "Quantised":
        """The same on another device."""
        codes, scales, table = (part.to(device, copy=copy) for part in (*self.parts(), self.table))
        return Quantised(codes, scales, table, self.first)

    def copy_(self, values: "torch.Tensor | Quantised", non_blocking: bool = False) -> None:
        """Set all values of a whole tensor: exactly those of another one, or the nearest to fp32 values."""
        if isinstance(values, Quantised):
            self.codes.copy_(values.codes, non_blocking=non_blocking)
            self.scales.copy_(values.scales, non_blocking=non_blocking)
        else:
            self._quantise(values)

    def __getitem__(self, run: slice) -> "Quantised":
        return Quantised(self.codes[run], self.scales, self.table, self.first + run.indices(self.numel())[0])

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """The values, fp32, in tensors of `size` and one of the rest.

        A block's largest value decides its scale. The table has no -1, so that of a negative one the nearest code is
        -0.993: read as -1, which it stood for, it gives the scale again.
        """
        values = self.table.clone()
        if values[0] < 0:
            values[0] = -1
        for start in range(0, self.numel(), size):
            codes = self.codes[start : start + size]
            place = self.first + start + torch.arange(codes.numel(), device=codes.device)
            yield values[codes.int()] * self.scales[place // BLOCK]

    def _quantise(self, values: torch.Tensor) -> None:
        """The nearest codes, with a scale from the largest value of each block."""
        assert self.first == 0, "a block would be set in part"
        between = (self.table[1:] + self.table[:-1]) / 2
        for start in range(0, self.numel(), AT_A_TIME):
            part = values[start : start + AT_A_TIME].to(self.codes.device, torch.float32)
            blocks = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
            scales = blocks.abs().amax(1)
            codes = torch.bucketize(blocks / torch.where(scales == 0, 1, scales)[:, None], between, out_int32=True)
            self.codes[start : start + part.numel()] = codes.view(-1)[: part.numel()].to(torch.uint8)
            self.scales[start // BLOCK : start // BLOCK + len(blocks)] = scales
