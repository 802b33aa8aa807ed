"""EfficientNets in plain PyTorch, written from the published tables and from nothing of ours.

Two kinds of published files have no package that could be their peer: state dicts with `stem`,
`blocks` in one list and `head`, and the TensorFlow checkpoints of the authors. This network is
the peer of both: the first pad symmetrically, the second as TensorFlow. It needs torch alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

# (fused, repeats, kernel, stride, expansion, filters); Fused-MBConv has no squeeze-excitation.
# Tan & Le 2021, Table 4 (S), and automl efficientnetv2/effnetv2_configs.py (B0, M, L).
_TABLES = {
    "efficientnetv2-b0": (
        32,
        [
            (True, 1, 3, 1, 1, 16),
            (True, 2, 3, 2, 4, 32),
            (True, 2, 3, 2, 4, 48),
            (False, 3, 3, 2, 4, 96),
            (False, 5, 3, 1, 6, 112),
            (False, 8, 3, 2, 6, 192),
        ],
    ),
    "efficientnetv2-s": (
        24,
        [
            (True, 2, 3, 1, 1, 24),
            (True, 4, 3, 2, 4, 48),
            (True, 4, 3, 2, 4, 64),
            (False, 6, 3, 2, 4, 128),
            (False, 9, 3, 1, 6, 160),
            (False, 15, 3, 2, 6, 256),
        ],
    ),
    "efficientnetv2-m": (
        24,
        [
            (True, 3, 3, 1, 1, 24),
            (True, 5, 3, 2, 4, 48),
            (True, 5, 3, 2, 4, 80),
            (False, 7, 3, 2, 4, 160),
            (False, 14, 3, 1, 6, 176),
            (False, 18, 3, 2, 6, 304),
            (False, 5, 3, 1, 6, 512),
        ],
    ),
    "efficientnetv2-l": (
        32,
        [
            (True, 4, 3, 1, 1, 32),
            (True, 7, 3, 2, 4, 64),
            (True, 7, 3, 2, 4, 96),
            (False, 10, 3, 2, 4, 192),
            (False, 19, 3, 1, 6, 224),
            (False, 25, 3, 2, 6, 384),
            (False, 7, 3, 1, 6, 640),
        ],
    ),
    # Tan & Le 2019, Table 1.
    "efficientnet-b0": (
        32,
        [
            (False, 1, 3, 1, 1, 16),
            (False, 2, 3, 2, 6, 24),
            (False, 2, 5, 2, 6, 40),
            (False, 3, 3, 2, 6, 80),
            (False, 3, 5, 1, 6, 112),
            (False, 4, 5, 2, 6, 192),
            (False, 1, 3, 1, 6, 320),
        ],
    ),
}


class ConvNorm(nn.Module):
    """A convolution without bias, and batch normalisation with epsilon 1e-3."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, pad: str):
        super().__init__()
        self.stride, self.kernel, self.pad = stride, kernel, pad
        padding = kernel // 2 if pad == "symmetric" else 0
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [N, C, H, W] to [N, C_out, ceil(H / stride), ceil(W / stride)]."""
        if self.pad == "same":
            total = [
                max((math.ceil(size / self.stride) - 1) * self.stride + self.kernel - size, 0)
                for size in x.shape[2:]
            ]
            height, width = total
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
    """Squeeze-excitation with 1x1 convolutions."""

    def __init__(self, filters: int, squeezed: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(filters, squeezed, 1)
        self.conv_expand = nn.Conv2d(squeezed, filters, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keeps the shape."""
        gate = F.silu(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * self.conv_expand(gate).sigmoid()


class Block(nn.Module):
    """MBConv, or Fused-MBConv."""

    def __init__(
        self,
        fused: bool,
        kernel: int,
        stride: int,
        expansion: int,
        inputs: int,
        outputs: int,
        pad: str,
    ):
        super().__init__()
        self.has_skip = stride == 1 and inputs == outputs
        self.ends_active = fused and expansion == 1
        filters = inputs * expansion
        self.expand_conv = self.dwconv = self.se = None
        if fused and expansion == 1:
            self.project_conv = ConvNorm(inputs, outputs, kernel, stride, 1, pad)
            return
        if fused:
            self.expand_conv = ConvNorm(inputs, filters, kernel, stride, 1, pad)
        else:
            if expansion != 1:
                self.expand_conv = ConvNorm(inputs, filters, 1, 1, 1, pad)
            self.dwconv = ConvNorm(filters, filters, kernel, stride, filters, pad)
            self.se = SqueezeExcite(filters, inputs // 4)
        self.project_conv = ConvNorm(filters, outputs, 1, 1, 1, pad)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps [N, C, H, W] to [N, C_out, ceil(H / stride), ceil(W / stride)]."""
        x = images
        if self.expand_conv is not None:
            x = F.silu(self.expand_conv(x))
        if self.dwconv is not None:
            x = F.silu(self.dwconv(x))
        if self.se is not None:
            x = self.se(x)
        x = self.project_conv(x)
        if self.ends_active:
            x = F.silu(x)
        return x + images if self.has_skip else x


class Head(nn.Module):
    """1x1 convolution, mean over the image, classifier."""

    def __init__(self, inputs: int, num_classes: int, pad: str):
        super().__init__()
        self.project_conv = ConvNorm(inputs, 1280, 1, 1, 1, pad)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [N, C, H, W] to [N, classes]."""
        return self.classifier(F.silu(self.project_conv(x)).mean((2, 3)))


class PlainEfficientNet(nn.Module):
    """A network of `_TABLES`.

    Args:
      variant: a key of the tables.
      pad: `symmetric` as PyTorch, or `same` as TensorFlow.
      num_classes: width of the logits.
    """

    def __init__(self, variant: str, pad: str, num_classes: int = 1000):
        super().__init__()
        inputs, rows = _TABLES[variant]
        self.stem = ConvNorm(3, inputs, 3, 2, 1, pad)
        blocks = []
        for fused, repeats, kernel, stride, expansion, outputs in rows:
            for repeat in range(repeats):
                step = stride if repeat == 0 else 1
                blocks.append(Block(fused, kernel, step, expansion, inputs, outputs, pad))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = Head(inputs, num_classes, pad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps images [N, 3, H, W] to logits [N, classes]."""
        x = F.silu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)
