"""Small networks for the tests, and how to give them statistics worth testing."""

import torch
from torch import nn
from torch.nn import functional as F


def drop(layer, x):
    """Dropout in the mode of ``layer``."""
    return F.dropout(x, 0.4, layer.training)


class ConvNet(nn.Module):
    """Batch norm with uncommon settings, dropout, a residual and a linear head."""

    def __init__(self, eps=1e-3, momentum=0.3, p=0.4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8, eps=eps, momentum=momentum)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_bn = nn.BatchNorm2d(8, eps=eps, momentum=momentum)
        self.act = nn.ReLU6(inplace=True)
        self.dropout = nn.Dropout(p)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.stem_bn(self.stem(x)))
        x = x + self.act(self.depthwise_bn(self.depthwise(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(self.dropout(x))


class Structured(nn.Module):
    """A keyword input, a dict and a tuple as output."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x, *, y):
        hidden = self.linear(x)
        return {"sum": hidden + y, "parts": (hidden, y * 2)}


class NoGradInside(nn.Module):
    """A backbone that never trains."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        with torch.no_grad():
            x = torch.relu(self.backbone(x))
        return self.head(x)


class SharedConv(nn.Module):
    """One convolution called twice before one batch norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(torch.relu(self.bn(self.conv(x)))))


class SharedConvTwoNorms(nn.Module):
    """One convolution called twice, each time before a batch norm of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)

    def forward(self, x):
        return self.bn2(self.conv(torch.relu(self.bn1(self.conv(x)))))


class ConvTwoUsers(nn.Module):
    """A convolution whose output goes to a batch norm and elsewhere."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Residual(nn.Module):
    """Two branches that meet before their activation, the skip through a batch norm of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, momentum=0.7)
        self.skip, self.skip_bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, eps=1e-1)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + self.skip_bn(self.skip(x)))


class Concatenated(nn.Module):
    """Branches of different depth, joined, normed after the join."""

    def __init__(self):
        super().__init__()
        self.left, self.left_bn = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
        self.right, self.bn = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu6(self.bn(torch.cat([self.left_bn(self.left(x)), self.right(x)], 1)))


class SharedNorm(nn.Module):
    """Two convolutions before one batch norm, called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.second(torch.relu(self.bn(self.first(x)))))


def sequential(*layers):
    return nn.Sequential(*layers)


def norm_networks():
    """Networks with batch norm of every kind, each with an example input."""
    image, line = torch.randn(4, 4, 9, 9), torch.randn(4, 4, 17)
    return {
        "conv_bn": (sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), image),
        "conv_bias_bn_eps": (sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=1e-2, momentum=0.5)), image),
        "conv_bn_plain": (sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU()), image),
        "conv_bn_cumulative": (sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=None)), image),
        "conv_bn_no_statistics": (
            sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
            image,
        ),
        "conv_same_bn": (sequential(nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)), image),
        "depthwise_bn": (sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), nn.Hardtanh(-1, 2)), image),
        "conv1d_bn": (sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU()), line),
        "conv3d_bn": (sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), torch.randn(2, 4, 5, 6, 7)),
        "transposed_bn": (sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), image),
        "transposed_groups_bn": (sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), image),
        "linear_bn": (sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()), torch.randn(8, 4)),
        "linear_3d_bn": (sequential(nn.Linear(5, 6), nn.BatchNorm1d(4)), torch.randn(8, 4, 5)),
        "bn_alone": (sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)), image),
        "conv_bn_relu6_inplace": (sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(inplace=True)), image),
        "conv_strided_dilated_bn": (
            sequential(nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=1), nn.BatchNorm2d(6)),
            image,
        ),
        "conv_reflect_bn": (
            sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(6)),
            image,
        ),
        "grouped_bn": (sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, eps=1e-8)), image),
        "conv1d_depthwise_bn": (sequential(nn.Conv1d(4, 4, 5, groups=4), nn.BatchNorm1d(4, momentum=0.01)), line),
        "transposed1d_bn": (sequential(nn.ConvTranspose1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)), line),
        "linear_no_bias_bn": (sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, eps=1.0)), torch.randn(8, 4)),
        "pre_activation": (
            sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)),
            image,
        ),
        "conv_bn_bn": (sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)), image),
        "residual": (Residual(), image),
        "concatenated": (Concatenated(), image),
        "shared_norm": (SharedNorm(), image),
        "shared_conv": (SharedConv(), image),
        "shared_conv_two_norms": (SharedConvTwoNorms(), image),
        "conv_two_users": (ConvTwoUsers(), image),
        "convnet": (ConvNet(p=0.0), torch.randn(4, 3, 16, 16)),
    }


def randomize_statistics(model, seed=0):
    """Statistics and affine parameters as after training: no identity, some negative scales."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.weight is not None:
                with torch.no_grad():
                    module.weight.copy_(torch.randn(module.num_features, generator=generator))
                    module.bias.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
    return model


def sqnr(reference, approximation):
    """Signal to quantization noise ratio, dB."""
    noise = (reference - approximation).double().pow(2).mean().clamp(min=1e-30)
    return float(10 * torch.log10(reference.double().pow(2).mean() / noise).detach())


class WritesAPart(nn.Module):
    """Adds what a layer computes into some columns of an embedding, in place, before others read it."""

    def __init__(self):
        super().__init__()
        self.embedding, self.part = nn.Embedding(10, 8), nn.Linear(4, 4)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, tokens, x):
        y = self.embedding(tokens)
        y[:, :4] += self.part(x)
        return self.last(self.first(y))


class Behind(nn.Module):
    """A function behind a convolution."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 3, padding=1), function

    def forward(self, x):
        return self.function(self.conv(x))


class CountsCalls(nn.Module):
    """A convolution, and a buffer that counts the calls."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        return self.conv(x) + self.seen.add_(1.0)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(torch.relu(self.hidden(self.embedding(ids))).mean(1))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.planted = nn.Linear(24, 24)
        self.third = nn.Linear(24, 24)
        self.head = nn.Linear(24, 6)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.planted(x))
        return self.head(torch.relu(self.third(x)))
