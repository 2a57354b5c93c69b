"""Graphs in integers by the doing of another tool, which a delegate would refuse or compute wrongly."""

import torch
from torch import nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401

Q = torch.ops.quantized_decomposed


def fake(x, scale=0.02, zero_point=0):
    limits = (scale, zero_point, -128, 127, torch.int8)
    return Q.dequantize_per_tensor.default(Q.quantize_per_tensor.default(x, *limits), *limits)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("weight", torch.randint(-127, 128, (4, 4, 3, 3), dtype=torch.int8))
        self.register_buffer("square", self.weight[:, :, 0, 0].clone())
        self.register_buffer("bias", torch.linspace(-1, 1, 4))

    def forward(self, x):
        return self.function(self, x)


def conv(m, x):
    weight = Q.dequantize_per_tensor.default(m.weight, 0.01, 0, -127, 127, torch.int8)
    return fake(nn.functional.conv2d(fake(x), weight, padding=1), 0.05)


def dense(m, x):
    weight = Q.dequantize_per_tensor.default(m.square, 0.01, 0, -127, 127, torch.int8)
    return fake(nn.functional.linear(x, weight, m.bias), 0.05)


def mish(m, x):  # decomposed behind an int8 convolution, its parts share a dequantize
    return fake(nn.functional.mish(conv(m, x)))


# Each is integers by another tool's doing. With executorch's own partitioner, those to another grid (but for pad and slice),
# cat, mish and softplus fail to load or give other numbers; the rest would with one that only admitted int8.
HAZARDS = {
    "cat of unequal grids": lambda m, x: fake(torch.cat([fake(x, 0.02), fake(x + 1, 0.05)], 1), 0.05),
    "view to another grid": lambda m, x: fake(fake(x).reshape(2, -1), 0.05),
    "permute to another grid": lambda m, x: fake(fake(x).permute(0, 2, 3, 1), 0.05, 3),
    "pad to another grid": lambda m, x: fake(nn.functional.pad(fake(x), (1, 1)), 0.05),
    "max pool to another grid": lambda m, x: fake(nn.functional.max_pool2d(fake(x), 2), 0.05),
    "unsqueeze to another grid": lambda m, x: fake(fake(x).unsqueeze(-1), 0.05),
    "slice to another grid": lambda m, x: fake(fake(x)[:, 1:3], 0.05),
    "squeeze": lambda m, x: fake(fake(x[:, :1]).squeeze(1)),
    "average pool": lambda m, x: fake(nn.functional.avg_pool2d(fake(x), 2)),
    "softmax": lambda m, x: fake(torch.softmax(fake(x), -1), 1 / 256, -128),
    "selu": lambda m, x: fake(nn.functional.selu(fake(x))),
    "leaky relu beyond its fixed point": lambda m, x: fake(nn.functional.leaky_relu(fake(x), 0.2), 1e-4),
    "batched product, affine": lambda m, x: fake(torch.bmm(fake(x[0]), fake(x[1], 0.02, 7)), 0.1),
    "bilinear": lambda m, x: fake(nn.functional.interpolate(fake(x), scale_factor=2, mode="bilinear")),
    "mish behind a convolution": mish,
    "softplus behind a convolution": lambda m, x: fake(nn.functional.softplus(conv(m, x))),
    "convolution read twice": lambda m, x: (
        torch.tanh(conv(m, x)) + torch.sigmoid(conv(m, x)).flatten(2).mean(-1)[..., None, None]
    ),
    "prelu of rank 3": lambda m, x: fake(nn.functional.prelu(fake(x[0]), m.weight.float().flatten()[:1] / 100)),
    "split": lambda m, x: fake(fake(x).split(2, 1)[1]),
    "bias read on two grids": lambda m, x: dense(m, fake(torch.relu(dense(m, fake(x))), 0.19)),
    "view of seven dimensions": lambda m, x: fake(
        fake(x).view(2, 2, 2, 2, 2, 2, 2).transpose(1, 2).reshape(2, 4, 4, 4)
    ),
    "same tensor joined twice": lambda m, x: (lambda y: fake(torch.cat([y, y], 1)))(fake(x)),
}
