"""Layers whose outputs are multiplied, and attention by hand, for tests of products."""

import torch
from torch import nn
from torch.nn import functional as F


class Layers(nn.Module):
    """A function of the outputs of some linear layers that read one tensor."""

    def __init__(self, function, count):
        super().__init__()
        self.layers, self.function = nn.ModuleList(nn.Linear(8, 8) for _ in range(count)), function

    def forward(self, x):
        return self.function(*(layer(x) for layer in self.layers))


class Attention(nn.Module):
    """As most people write it, between projections, as a layer of the name ``core``."""

    def __init__(self, core):
        super().__init__()
        self.core, self.project, self.out = Layers(core, 3), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.core(self.project(x)))


def by_hand(query, key, value):
    return ((query @ key.transpose(-2, -1)) * 8**-0.5).softmax(-1) @ value


def biased(query, key, value):
    return (query @ key.transpose(-2, -1) + query[..., :1]).softmax(-1) @ value


def distance(query):
    """The distance of each pair of tokens, negative."""
    places = torch.arange(query.shape[-2], dtype=query.dtype)
    return -(places[:, None] - places[None]).abs()


def near(query):
    return distance(query) >= -2


WEIGHT = torch.linspace(-1, 1, 40).reshape(8, 5)
CONSTANT = {
    "matmul by a constant": (lambda a, b: (a + b) @ WEIGHT, 4),
    "mm by a constant": (lambda a, b: torch.mm((a + b).flatten(0, 1), WEIGHT), 3),
    "addmm by a constant": (lambda a, b: torch.addmm(WEIGHT[0] * 2, (a + b).flatten(0, 1), WEIGHT), 3),
}
FUNCTIONS = {
    **CONSTANT,
    "rank 3": (lambda a, b: a @ b.transpose(1, 2), 3),
    "rank 4": (lambda a, b: a @ b.transpose(-2, -1), 4),
    "rank 5": (lambda a, b: a.unsqueeze(2) @ b.mT.unsqueeze(2), 4),
    "attention": (F.scaled_dot_product_attention, 4),
    "attention of rank 3": (F.scaled_dot_product_attention, 3),
    "scaled attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), 4),
    "causal attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 4),
    "causal attention of rank 3": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 3),
    "attention near the diagonal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=near(q)), 4),
    "attention with a bias": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=distance(q)), 4),
}
REFUSED = {
    "broadcast": (lambda a, b: a @ b[:, :1].mT, 4, "no product broadcasts"),
    "fewer batches": (lambda a, b: a @ b[0].mT, 4, "no product broadcasts"),
    "vector": (lambda a, b: a @ b[0, 0], 3, "rank 3 and 1"),
    "matrices": (lambda a, b: a[0] @ b[0].mT, 3, "rank 2 and 2"),
    "masked": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=q @ k.mT), 4, "its mask varies"),
    "masked whole": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=near(q).triu(2)), 4, "in a row"),
    "shared": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 4, "share keys"),
}


def made(name):
    function, rank = (FUNCTIONS.get(name) or REFUSED[name])[:2]
    operands = 3 if "attention" in name or name in ("masked", "masked whole", "shared") else 2
    return Layers(function, operands), rank


def tokens(rank, batch):
    return torch.randn(batch, *(3, 6, 8)[4 - rank :])
