"""Networks and pipelines of the diffusers library as denoisers; the only place that knows their conventions.

A pipeline folder holds ``model_index.json``, ``unet/`` and ``scheduler/``. Ours may add ``smcdiff.json`` with the
shape of one picture and the factor of a space-to-depth step in front of the U-Net, which diffusers itself does not
know: the U-Net then sees pictures of a quarter of the pixels with four times the channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SpaceToDepth"]


class SpaceToDepth(nn.Module):
    """A U-Net of the diffusers library run on blocks of pixels laid into channels.

    Args:
        unet: takes (batch, channels * factor^2, rows / factor, columns / factor) and a time, returns ``.sample``.
        factor: side of a block, in pixels; 1 leaves pictures as they are.
    """

    def __init__(self, unet: nn.Module, factor: int = 1) -> None:
        super().__init__()
        self.unet = unet
        self.factor = factor

    def forward(self, x_t: Tensor, index: Tensor | float) -> Tensor:
        blocks = functional.pixel_unshuffle(x_t, self.factor)
        return functional.pixel_shuffle(self.unet(blocks, index).sample, self.factor)
