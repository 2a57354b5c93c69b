"""Networks with dropout whose value others read too, and layers that tell of their mode."""

from networks import drop
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A dropout beside a residual connection."""

    def __init__(self, drop):
        super().__init__()
        self.drop, self.linear = drop, nn.Linear(6, 6)

    def forward(self, x):
        return x + self.linear(self.drop(x))


class Told(nn.Module):
    """A dropout that is told the mode in which it is."""

    def forward(self, x, training):
        return F.dropout(x, 0.4, training)


class Telling(nn.Module):
    """The mode of one module used in another, and in a function of another file."""

    def __init__(self):
        super().__init__()
        self.told, self.never, self.linear = Told(), Told(), nn.Linear(6, 6)

    def forward(self, x):
        return drop(self.told, self.linear(self.told(x, self.training)) + self.never(x, False))


class Around(nn.Module):
    """Arithmetic before what was captured already."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x = self.net((x - 0.5) / 0.5)
        return F.dropout(x, 0.3, self.training)
