"""Quantized `nn.Conv2d` and `nn.ConvTranspose2d`."""
import torch
import torch.nn.functional as F
from torch import nn

from .base import QuantLayer, random_rows


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` with a quantized weight (out, in, kh, kw) and input (N, in, H, W)."""

    input_axis = 1

    def forward(self, x):
        return self._conv_forward(self.input_quantizer(x), self.quantized_weight(), self.bias)

    def weight_rows(self):
        return self.weight.flatten(1) if self.groups == 1 else None

    def input_rows(self, x, generator, limit):
        """Patches under the kernel, shape (n, in * kh * kw): sampled, never all unfolded."""
        if isinstance(self.padding, str) or self.padding_mode != 'zeros':
            x = F.pad(x, self._reversed_padding_repeated_twice,
                      mode='constant' if self.padding_mode == 'zeros' else self.padding_mode)
        else:
            x = F.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        count, _, height, width = x.shape
        rows = (height - dh * (kh - 1) - 1) // sh + 1
        columns = (width - dw * (kw - 1) - 1) // sw + 1
        total = count * rows * columns
        if total == 0:
            return x.new_zeros(0, x.shape[1] * kh * kw)
        pick = torch.randint(total, (min(limit, total),), generator=generator).to(x.device)
        image = pick // (rows * columns)
        top = (pick // columns) % rows * sh
        left = pick % columns * sw
        down = top[:, None, None] + dh * torch.arange(kh, device=x.device)[:, None]
        right = left[:, None, None] + dw * torch.arange(kw, device=x.device)
        patches = x[image[:, None, None], :, down, right]  # (n, kh, kw, in)
        return patches.permute(0, 3, 1, 2).flatten(1)


class QuantConvTranspose2d(QuantLayer, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a quantized weight (in, out, kh, kw) and input (N, in, H, W)."""

    weight_axis = 1
    input_axis = 1

    def forward(self, x, output_size=None):
        padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation)
        return F.conv_transpose2d(
            self.input_quantizer(x), self.quantized_weight(), self.bias, self.stride,
            self.padding, padding, self.groups, self.dilation)

    def weight_rows(self):
        # Every input pixel meets every kernel tap: one row a tap, out-channel major.
        return self.weight.flatten(1).t() if self.groups == 1 else None

    def set_weight_rows(self, rows):
        super().set_weight_rows(rows.t())

    def input_rows(self, x, generator, limit):
        return random_rows(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]), generator, limit)
