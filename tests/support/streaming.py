"""Networks that are called step by step: a decoder with a cache and a recurrent detector of frames."""

import torch
from torch import nn
from torch.nn import functional as F

STEPS, WIDTH, WORDS = 64, 32, 50


class Block(nn.Module):
    """Attention over a cache of keys and values, and a feed-forward part."""

    def __init__(self, heads=2):
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, heads, STEPS, WIDTH // heads))

    def forward(self, x, place, write):
        qkv = self.qkv(self.norm(x)).view(1, 1, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        write(self, place, qkv[1], qkv[2])
        seen = (torch.arange(STEPS) <= place)[None, None, None]
        y = F.scaled_dot_product_attention(qkv[0], self.keys, self.values, attn_mask=seen)
        x = x + self.out(y.transpose(1, 2).reshape(1, 1, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def by_index_copy(block, place, keys, values):
    block.keys.index_copy_(2, place, keys)
    block.values.index_copy_(2, place, values)


def by_assignment(block, place, keys, values):
    block.keys[:, :, place] = keys
    block.values[:, :, place] = values


def functionally(block, place, keys, values):
    for cache, new in ((block.keys, keys), (block.values, values)):
        here = (torch.arange(STEPS) == place)[None, None, :, None]
        cache.copy_(torch.where(here, new, cache))


class Decoder(nn.Module):
    """Scores of the next word, from a word and its place."""

    def __init__(self, write=by_index_copy):
        super().__init__()
        self.words, self.places, self.write = nn.Embedding(WORDS, WIDTH), nn.Embedding(STEPS, WIDTH), write
        self.block, self.norm, self.head = Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, word, place):
        return self.head(self.norm(self.block(self.words(word) + self.places(place), place, self.write)))


class Detector(nn.Module):
    """A score of four frames: a convolution over the frames before too, and a recurrent layer whose state goes on."""

    def __init__(self, layer=nn.LSTM):
        super().__init__()
        self.conv, self.recurrent, self.head = (
            nn.Conv1d(8, WIDTH, 3),
            layer(WIDTH, WIDTH, batch_first=True),
            nn.Linear(WIDTH, 1),
        )
        self.register_buffer("frames", torch.zeros(1, 8, 2))
        self.register_buffer("hidden", torch.zeros(1, 1, WIDTH))
        self.register_buffer("cell", torch.zeros(1, 1, WIDTH))

    def forward(self, x):
        x = torch.cat([self.frames, x], 2)
        self.frames.copy_(x[:, :, -2:])
        x = F.relu(self.conv(x)).transpose(1, 2)
        if isinstance(self.recurrent, nn.LSTM):
            y, (hidden, cell) = self.recurrent(x, (self.hidden, self.cell))
            self.cell.copy_(cell)
        else:
            y, hidden = self.recurrent(x, self.hidden)
        self.hidden.copy_(hidden)
        return 4 * self.head(y[:, -1])


def words(steps, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randint(0, WORDS, (1, 1), generator=random), torch.tensor([place])) for place in range(steps)]


def frames(steps, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(1, 8, 4, generator=random),) for _ in range(steps)]


NETWORKS = {
    "decoder by index_copy_": (Decoder, words),
    "decoder by assignment": (lambda: Decoder(by_assignment), words),
    "decoder, functional": (lambda: Decoder(functionally), words),
    "LSTM detector": (Detector, frames),
    "GRU detector": (lambda: Detector(nn.GRU), frames),
}
