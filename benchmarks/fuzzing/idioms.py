"""Common patterns: residuals, dropout, squeeze-and-excite, attention, state, in-place writes, computed constants."""

from __future__ import annotations

from fuzzing.builder import Builder, Unfit, operator
from fuzzing.layers import activation, batch_norm, convolution


def dropped(b: Builder, x: str) -> str:
    """Dropout of some form over ``x``, as an expression."""
    p, rank = b.pick(0.1, 0.3, 0.5), len(b.shape(x))
    kinds = ["Dropout", "Dropout", "AlphaDropout"]
    if rank > 2:
        kinds += [f"Dropout{rank - 2}d", "FeatureAlphaDropout"]
    if b.chance(0.7):
        return f"{b.layer('drop', f'nn.{b.pick(*kinds)}({p})')}({x})"
    return f"F.{b.pick('dropout', 'alpha_dropout')}({x}, {p}, training=self.training)"


def inner(b: Builder, x: str) -> str:
    """The expression of a layer that preserves the shape of the value ``x``."""
    rank = len(b.shape(x))
    if rank >= 3 and b.chance(0.7):
        return f"{b.layer('conv', convolution(b, x, same=True))}({x})"
    features = b.shape(x)[-1]
    return f"{b.layer('linear', f'nn.Linear({features}, {features})')}({x})"


@operator(2, ranks=(2, 3, 4, 5))
def dropout(b: Builder, x: str) -> None:
    b.let(dropped(b, x))


@operator(3, ranks=(2, 3, 4, 5))
def residual_after_dropout(b: Builder, x: str) -> None:
    y = b.let(inner(b, b.let(dropped(b, x))))
    b.let(b.pick(f"{x} + {y}", f"{y} + {x}", f"torch.add({x}, {y})"))


@operator(3, ranks=(2, 3, 4, 5))
def residual(b: Builder, x: str) -> None:
    y = b.let(inner(b, x))
    if b.chance(0.4):
        y = b.let(f"{batch_norm(b, y)}({y})")
    if b.chance(0.4):
        y = b.let(activation(b, y))
    if b.chance(0.3):
        b.do(f"{y} += {x}")
        b.let(f"F.relu({y})")
        return
    scale = b.pick("", "", f" * {b.parameter('torch.full((1,), 0.1)')}", f".mul({b.pick(0.5, 2)})")
    y = b.let(f"{x} + {y}{scale}")
    if b.chance(0.4):
        b.let(activation(b, y))


@operator(0.7, ranks=(2, 3, 4, 5))
def stochastic_depth(b: Builder, x: str) -> None:
    mode = b.pick("row", "batch")
    drop = b.layer("depth", f"torchvision.ops.StochasticDepth({b.pick(0.2, 0.5)}, {mode!r})")
    b.let(f"{x} + {drop}({b.let(inner(b, x))})")


@operator(1)
def identity(b: Builder, x: str) -> None:
    name = b.layer("identity", "nn.Identity()")
    y = b.let(
        b.pick(f"{name}({x})", f"{name}({x}).view({x}.shape)", f"{x}.clone()", f"{x}.contiguous()", f"{x}.detach()")
    )
    if b.chance(0.5):
        b.let(f"{x} + {y}")


@operator(1.5, ranks=(4,))
def squeeze_and_excite(b: Builder, x: str) -> None:
    c = b.shape(x)[1]
    pooled = b.let(b.pick(f"F.adaptive_avg_pool2d({x}, 1)", f"{x}.mean((2, 3), keepdim=True)"))
    down, up = b.layer("conv", f"nn.Conv2d({c}, 4, 1)"), b.layer("conv", f"nn.Conv2d(4, {c}, 1)")
    gate = b.let(f"{b.pick('torch.sigmoid', 'F.hardsigmoid')}({up}({b.pick('F.relu', 'F.silu')}({down}({pooled}))))")
    b.let(f"{x} * {gate}")


@operator(2, ranks=(3,))
def attention(b: Builder, x: str) -> None:
    _, tokens, features = b.shape(x)
    if features % 2:
        raise Unfit("an odd number of features")
    form = b.pick("module", "sdpa", "by hand")
    if form == "module":
        layer = b.layer(
            "attention", f"nn.MultiheadAttention({features}, 2, batch_first=True{b.pick('', ', bias=False')})"
        )
        b.let(f"{layer}({x}, {x}, {x}{b.pick('', ', need_weights=False')})[0]")
        return
    qkv = b.layer("linear", f"nn.Linear({features}, {3 * features})")
    heads = f".unflatten(-1, (3, 2, {features // 2})).permute(2, 0, 3, 1, 4).unbind(0)"
    q, k, v = b.let_all(f"{qkv}({x}){heads}", 3)
    mask = b.buffer(f"torch.ones({tokens}, {tokens}).tril().bool()") if b.chance(0.5) else ""
    if form == "sdpa":
        options = b.pick("", ", is_causal=True", f", attn_mask={mask}" if mask else "")
        y = b.let(f"F.scaled_dot_product_attention({q}, {k}, {v}{options})")
    else:
        scores = b.let(f"({q} @ {k}.transpose(-2, -1)) * {round((features // 2) ** -0.5, 3)}")
        if mask:
            scores = b.let(f"{scores}.masked_fill(~{mask}, {b.pick('-1e9', '-torch.inf')})")
        weights = b.let(f"{scores}.softmax(-1)")
        y = b.let(f"{dropped(b, weights) if b.chance(0.3) else weights} @ {v}")
    b.let(f"{y}.transpose(1, 2).flatten(2)")


@operator(0.8, ranks=(3,))
def transformer(b: Builder, x: str) -> None:
    features = b.shape(x)[-1]
    if features % 2:
        raise Unfit("an odd number of features")
    options = b.pick("", ", norm_first=True", ", activation='gelu'")
    layer = f"nn.TransformerEncoderLayer({features}, 2, 16, dropout={b.pick(0.0, 0.1)}, batch_first=True{options})"
    b.let(f"{b.layer('encoder', layer)}({x})")


@operator(1.2)
def constant(b: Builder, x: str) -> None:
    """A parameter or buffer among the operands, or a constant made in ``forward``."""
    rank, last = len(b.shape(x)), b.shape(x)[-1]
    p = b.parameter(f"torch.randn({last})") if b.chance(0.5) else b.buffer(f"torch.randn({last})")
    computed = b.pick(
        f"{p}.sigmoid()", f"F.softmax({p}, 0)", f"({p} - {p}.mean())", f"{p}.abs().sqrt()", f"{p} * 0.5", p
    )
    forms = [f"{x} + {computed}", f"{x} * {computed}", f"{x} - {computed}", f"{x} * torch.full(({last},), 0.5)"]
    forms += [f"{x} + torch.arange({last}) * 0.1", f"{x} * torch.ones_like({x})", f"{x} + torch.zeros({(1,) * rank})"]
    b.let(b.pick(*forms))


@operator(1, ranks=(2, 3, 4))
def computed_weight(b: Builder, x: str) -> None:
    """A weight that is computed from parameters: standardized, normalized or factorized."""
    rank = len(b.shape(x))
    if rank == 4 and b.chance(0.6):
        c = b.shape(x)[1]
        w = b.parameter(f"torch.randn(8, {c}, 1, 1)")
        text = b.pick(f"({w} - {w}.mean((1, 2, 3), keepdim=True))", f"F.normalize({w}, dim=1)", f"{w}.tanh()")
        b.let(f"F.conv2d({x}, {text})")
        return
    features = b.shape(x)[-1]
    normed = f"nn.utils.parametrizations.weight_norm(nn.Linear({features}, 8))"
    if b.chance(0.4):
        b.let(f"{b.layer('linear', normed)}({x})")
        return
    one, other = b.parameter("torch.randn(8, 2) * 0.5"), b.parameter(f"torch.randn(2, {features}) * 0.5")
    b.let(f"F.linear({x}, {one} @ {other})")


@operator(1.2, ranks=(2, 3, 4, 5))
def state(b: Builder, x: str) -> None:
    """A buffer that changes from call to call."""
    start = b.pick("0.0", "0.3", "3.0")
    if b.chance(0.4):
        counter = b.buffer(f"torch.tensor({start})")
        b.do(
            b.pick(
                f"{counter}.add_(1)", f"{counter} += 1", f"{counter}.copy_({counter} + 1)", f"{counter} = {counter} + 1"
            )
        )
        b.let(f"{x} * 0.5 + {counter} * 0.1")
        return
    features = b.shape(x)[-1]
    average = b.buffer(f"torch.full(({features},), {start})")
    now = f"{x}.detach().mean({list(range(len(b.shape(x)) - 1))})"
    updates = (f"{average}.mul_(0.9).add_({now}, alpha=0.1)", f"{average}.lerp_({now}, 0.1)", f"{average}.copy_({now})")
    b.do(b.pick(*updates, f"{average}.mul_(0.9)\n{average}.add_({now} * 0.1)"))
    b.let(b.pick(f"{x} + {average}", f"{x} - {average}", f"{x} * {average}.sigmoid()"))


@operator(0.6, ranks=(3,))
def cache(b: Builder, x: str) -> None:
    """A cache of values for later calls, written into a slice."""
    batch, tokens, features = b.shape(x)
    kept = b.buffer(f"torch.zeros({batch}, {tokens + 2}, {features})")
    write = f"{kept}[:, 1:{tokens + 1}] = {x}.detach()"
    b.do(b.pick(write, f"{kept}.index_copy_(1, torch.arange({tokens}), {x}.detach())"))
    b.let(b.pick(f"{kept} * 0.5", f"{kept}.mean(1)", f"{x} @ {kept}.transpose(1, 2)"))


@operator(2)
def write_in_place(b: Builder, x: str) -> None:
    y = b.let(b.pick(f"{x} * 0.5", f"F.relu({x})", f"{x} + 1")) if b.chance(0.6) or not x.startswith("v") else x
    first = "[:, :1]" if len(b.shape(x)) > 1 else "[:1]"
    writes = [f"{y}.mul_({b.pick(2, 0.5)})", f"{y}.add_({b.pick(1, 0.25)})", f"{y}{first} = 0", f"{y}{first} *= 0.5"]
    writes += [
        f"{y}{first}.add_(1)",
        f"{y} += 0.1",
        f"{y}.add_({x})",
        f"{y}.sub_(0.1)",
        f"{y}.div_(2)",
        f"{y}.clamp_(-1, 1)",
    ]
    writes += [
        f"{y}{first} = {x}{first} * 0.5",
        f"{y}.neg_()",
        f"{y}.masked_fill_({y} > 0.5, 0.5)",
        f"{y}[..., -1] = 1.0",
    ]
    b.do(b.pick(*writes))
    b.let(b.pick(f"{y} * 2", f"{y} + 1", f"torch.tanh({y})"))


@operator(0.3)
def write_to_an_input(b: Builder, x: str) -> None:
    if not x.startswith("x"):
        raise Unfit("no input")
    b.do(f"{x}.{b.pick('mul_(0.5)', 'add_(1)', 'relu_()')}")
    b.let(f"{x} * 0.5")


@operator(1, ranks=(2, 3, 4, 5))
def without_gradients(b: Builder, x: str) -> None:
    y = b.let(inner(b, x), prefix="with torch.no_grad():")
    if b.chance(0.5):
        b.let(inner(b, y))


@operator(0.7, ranks=(2, 3, 4, 5))
def dead_branch(b: Builder, x: str) -> None:
    b.let(inner(b, x))
    b.let(f"{x} * 0.5")


@operator(0.8, ranks=(2, 3, 4))
def two_branches(b: Builder, x: str) -> None:
    left, right = b.let(activation(b, inner(b, x))), b.let(inner(b, x))
    b.let(b.pick(f"torch.cat([{left}, {right}], 1)", f"torch.stack([{left}, {right}]).sum(0)", f"{left} * {right}"))


@operator(0.5, ranks=(2, 3, 4))
def gated(b: Builder, x: str) -> None:
    gate = b.let(f"torch.sigmoid({inner(b, x)})")
    b.let(f"{gate} * {x} + (1 - {gate}) * {b.pick(x, *b.alike(x))}")
