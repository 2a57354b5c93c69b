"""Operators without weights: activations, pools, pads, shapes, concatenations, slices, reductions, comparisons, arithmetic."""

from __future__ import annotations

from fuzzing.builder import Builder, Unfit, operator

SMOOTH = ("torch.sigmoid", "torch.tanh", "F.gelu", "F.silu", "F.softplus", "F.mish", "F.logsigmoid", "F.softsign")
PIECEWISE = ("F.relu", "F.relu6", "F.hardswish", "F.hardsigmoid", "F.hardtanh", "F.leaky_relu", "F.elu", "F.selu")


@operator(4)
def activation(b: Builder, x: str) -> None:
    other = (f"F.gelu({x}, approximate='tanh')", f"F.leaky_relu({x}, {b.pick(0.3, -0.2, 1.5)})", f"F.celu({x}, 0.5)")
    more = (
        f"F.hardtanh({x}, {b.pick(-2.0, -0.5, 0.1)}, {b.pick(0.5, 2.0)})",
        f"F.threshold({x}, 0.1, {b.pick(0.0, 0.5)})",
    )
    plain = tuple(f"{f}({x})" for f in SMOOTH + PIECEWISE)
    b.let(b.pick(*plain, *other, *more, f"F.tanhshrink({x})", f"F.softshrink({x}, 0.2)", f"F.hardshrink({x}, 0.2)"))


@operator(1.5)
def activation_in_place(b: Builder, x: str) -> None:
    kind = b.pick("ReLU", "ReLU6", "Hardswish", "Hardsigmoid", "SiLU", "ELU", "LeakyReLU", "Hardtanh", "SELU", "Mish")
    if b.chance(0.5):
        b.let(f"{b.layer('act', f'nn.{kind}(inplace=True)')}({x})")
    else:
        b.let(f"{x}.{b.pick('relu_()', 'sigmoid_()', 'tanh_()', 'clamp_(-1, 1)')}")


@operator(0.6)
def glu(b: Builder, x: str) -> None:
    b.let(f"F.glu({x}, {b.random.randrange(len(b.shape(x)))})")


@operator(1.5)
def softmax(b: Builder, x: str) -> None:
    dim = b.random.randrange(-len(b.shape(x)), len(b.shape(x)))
    b.let(f"{b.pick('F.softmax', 'F.softmax', 'F.log_softmax', 'F.softmin')}({x}, dim={dim})")


@operator(2, ranks=(3, 4, 5))
def pool(b: Builder, x: str) -> None:
    d, kernel = len(b.shape(x)) - 2, b.pick(2, 3)
    padding = f", padding={b.pick(0, 1)}"
    stride = f", stride={b.pick(1, 2)}"
    ceil = ", ceil_mode=True" if b.chance(0.3) else ""
    average = b.pick("", ", count_include_pad=False", ", divisor_override=3" if d > 1 else "")
    dilation = ", dilation=2" if b.chance(0.15) else ""
    maximum = f"F.max_pool{d}d({x}, {kernel}{stride}{padding}{dilation}{ceil})"
    b.let(
        b.pick(maximum, f"F.avg_pool{d}d({x}, {kernel}{stride}{padding}{ceil}{average})", f"F.lp_pool{d}d({x}, 2, 2)")
    )


@operator(1.5, ranks=(3, 4, 5))
def adaptive_pool(b: Builder, x: str) -> None:
    d = len(b.shape(x)) - 2
    size = b.pick(1, 1, 2, 3, *([(1,) * (d - 1) + (2,), (None,) * (d - 1) + (1,)] if d > 1 else []))
    b.let(f"F.adaptive_{b.pick('avg', 'avg', 'max')}_pool{d}d({x}, {size})")


@operator(1.5, ranks=(2, 3, 4, 5))
def pad(b: Builder, x: str) -> None:
    dims = b.random.randint(1, min(2, len(b.shape(x)) - 1))
    amounts = [b.random.choice((-1, 0, 1, 2)) for _ in range(2 * dims)]
    mode = b.pick("", "", f", value={b.number(-1, 1)}", ", mode='reflect'", ", mode='replicate'", ", mode='circular'")
    b.let(f"F.pad({x}, {amounts}{mode})")


@operator(2)
def cat(b: Builder, x: str) -> None:
    dim = b.random.randrange(len(b.shape(x)))
    rest = [s for i, s in enumerate(b.shape(x)) if i != dim]
    fits = b.others(lambda v: v.ndim == len(rest) + 1 and [s for i, s in enumerate(v.shape) if i != dim] == rest)
    chosen = [x, *(b.pick(*fits) for _ in range(b.pick(1, 1, 2)))]
    b.let(f"torch.cat([{', '.join(chosen)}], {dim if b.chance(0.5) else dim - len(b.shape(x))})")


@operator(1)
def stack(b: Builder, x: str) -> None:
    dim = b.random.randint(0, len(b.shape(x)))
    b.let(f"torch.stack([{x}, {b.pick(x, *b.alike(x))}], {dim})")


@operator(2)
def parts(b: Builder, x: str) -> None:
    """Some or all parts of a split."""
    sizes = [(d, s) for d, s in enumerate(b.shape(x)) if 2 <= s <= 16]
    if not sizes:
        raise Unfit("nothing to split")
    dim, size = b.pick(*sizes)
    forms = [(f"{x}.chunk(2, {dim})", 2), (f"torch.split({x}, [1, {size - 1}], {dim})", 2)]
    forms += [(f"{x}.split({-(-size // 2)}, {dim})", 2), (f"torch.tensor_split({x}, 2, {dim})", 2)]
    if size <= 4:
        forms.append((f"{x}.unbind({dim})", size))
    names = b.let_all(*b.pick(*forms))
    if b.shape(names[0]) == b.shape(names[1]) and b.chance(0.6):
        b.let(f"{names[0]} {b.pick('+', '*', '-')} {names[1]}")


@operator(2, ranks=(2, 3, 4, 5))
def part(b: Builder, x: str) -> None:
    dim = b.random.randrange(len(b.shape(x)))
    size = b.shape(x)[dim]
    colons = ":, " * dim
    index = b.random.randrange(size)
    forms = [f"{x}[{colons}{index}]", f"{x}.select({dim}, {b.pick(index, -1)})", f"{x}.narrow({dim}, {index}, 1)"]
    forms += [f"{x}[{colons}{a}]" for a in (f"{index}:", f"-{index + 1}:", "::2", f":{index + 1}")]
    forms += [f"{x}[..., None, {index % b.shape(x)[-1]}]", f"{x}.flip({dim})", f"{x}.roll({index}, {dim})"]
    forms += [f"torch.index_select({x}, {dim}, torch.tensor([{index}, 0]))", f"{x}[{colons}[{index}, 0]]"]
    b.let(b.pick(*forms))


@operator(2.5)
def reshape(b: Builder, x: str) -> None:
    shape, rank = b.shape(x), len(b.shape(x))
    one, other = b.random.randrange(rank), b.random.randrange(rank)
    order = b.random.sample(range(rank), rank)
    forms = [f"{x}.permute({', '.join(map(str, order))})", f"{x}.transpose({one}, {other})", f"{x}.unsqueeze({one})"]
    forms += [f"{x}.flatten({min(one, other)}, {max(one, other)})", f"{x}.flatten({min(1, rank - 1)})"]
    forms += [
        f"{x}.reshape({shape[0]}, -1)",
        f"{x}.transpose({one}, {other}).contiguous()",
        f"{x}.mT" if rank > 1 else x,
    ]
    forms += [f"{x}.squeeze()", f"{x}.squeeze({one})", f"{x}.reshape({x}.shape[0], -1)", f"{x}.movedim({one}, {other})"]
    if shape[one] % 2 == 0:
        forms += [f"{x}.unflatten({one}, (2, {shape[one] // 2}))"]
    if shape[one] == 1:
        forms += [f"{x}.expand({', '.join('3' if d == one else '-1' for d in range(rank))})"]
    if rank == 4 and shape[1] % 2 == 0:
        forms += [f"F.channel_shuffle({x}, 2)"] + ([f"F.pixel_shuffle({x}, 2)"] if shape[1] % 4 == 0 else [])
    if rank == 4 and shape[2] % 2 == shape[3] % 2 == 0:
        forms += [f"F.pixel_unshuffle({x}, 2)"]
    b.let(b.pick(*forms))


@operator(0.6)
def repeat(b: Builder, x: str) -> None:
    rank = len(b.shape(x))
    times = ", ".join(str(b.pick(1, 1, 2)) for _ in range(rank))
    b.let(b.pick(f"{x}.repeat({times})", f"{x}.repeat_interleave(2, {rank - 1})", f"torch.tile({x}, ({times},))"))


@operator(2)
def reduce(b: Builder, x: str) -> None:
    rank = len(b.shape(x))
    dims = sorted(b.random.sample(range(rank), b.random.randint(1, rank)))
    keep = b.pick("True", "False")
    forms = [f"{x}.{f}({dims}, keepdim={keep})" for f in ("mean", "mean", "sum", "amax", "amin")]
    forms += [
        f"{x}.max({dims[0]})[0]",
        f"{x}.std({dims}, correction=0)",
        f"{x}.var({dims[0]}, correction=0, keepdim={keep})",
    ]
    forms += [f"{x}.norm(dim={dims[0]})", f"torch.logsumexp({x}, {dims})", f"{x}.mean()", f"{x}.cumsum({dims[0]})"]
    forms += [f"F.normalize({x}, dim={dims[0]})", f"{x}.prod({dims[0]})", f"{x}.min()"]
    b.let(b.pick(*forms))


@operator(3)
def arithmetic(b: Builder, x: str) -> None:
    a = b.pick(1, 2, 0.5, 3.0, -1.5)
    forms = [f"{x} + {a}", f"{a} * {x}", f"{a} - {x}", f"{x} / {a}", f"{x} - {a}", f"-{x}", f"{x}.abs()", f"{x} ** 2"]
    forms += [
        f"{a} / ({x}.abs() + 1)",
        f"torch.exp(-{x}.abs())",
        f"torch.sqrt({x}.abs() + 0.1)",
        f"torch.add({x}, {x}, alpha={a})",
    ]
    forms += [
        f"{x}.clamp({b.number(-2, 0)}, {b.number(0.1, 2)})",
        f"{x}.clamp(min={b.number(-1, 1)})",
        f"torch.square({x})",
    ]
    forms += [
        f"torch.sin({x})",
        f"torch.log1p({x}.abs())",
        f"torch.rsqrt({x} * {x} + 1)",
        f"torch.erf({x})",
        f"torch.sign({x})",
    ]
    forms += [
        f"torch.round({x})",
        f"torch.floor({x} * 3)",
        f"torch.pow({x}.abs() + 0.1, 1.5)",
        f"torch.remainder({x}, 2.0)",
    ]
    b.let(b.pick(*forms))


def _expands(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether ``shape`` broadcasts to ``to``."""
    return len(shape) <= len(to) and all(s in (1, t) for s, t in zip(shape[::-1], to[::-1], strict=False))


@operator(3)
def two_values(b: Builder, x: str) -> None:
    y = b.pick(x, *b.alike(x), *b.alike(x))
    fits = b.others(lambda v: _expands(tuple(v.shape), b.shape(x)))
    y = b.pick(*fits) if b.chance(0.3) else y
    forms = [f"{x} + {y}", f"{y} - {x}", f"{x} * {y}", f"torch.maximum({x}, {y})", f"torch.minimum({y}, {x})"]
    forms += [
        f"{x} / ({y}.abs() + 1)",
        f"torch.add({x}, {y}, alpha=0.5)",
        f"torch.lerp({x}, {y}, 0.3)",
        f"torch.atan2({x}, {y}.abs() + 1)",
    ]
    forms += [f"torch.addcmul({x}, {y}, {y}, value=0.5)", f"torch.where({x} > {y}, {x}, {y} * 0.5)"]
    b.let(b.pick(*forms))


@operator(1.5)
def masked(b: Builder, x: str) -> None:
    a = b.number(-0.5, 0.5)
    test = b.pick(f"{x} > {a}", f"{x} <= {a}", f"({x} > {a}) & ({x} < 1)", f"~({x} >= {a})", f"{x} != 0")
    forms = [f"torch.where({test}, {x}, {a})", f"{x}.masked_fill({test}, {b.pick(0.0, a)})", f"{x} * ({test})"]
    forms += [f"torch.where({test}, {x}, torch.zeros_like({x}))", f"({test}).float() - {x}", f"({test}).to({x}.dtype)"]
    b.let(b.pick(*forms))


@operator(0.8)
def integers(b: Builder, x: str) -> None:
    """An integer or boolean value, which may be an output."""
    dim = b.random.randrange(len(b.shape(x)))
    b.let(
        b.pick(
            f"{x}.argmax({dim})",
            f"{x} > 0",
            f"({x} * 4).long()",
            f"({x} > 0).sum({dim})",
            f"{x}.argmax({dim}, keepdim=True)",
        )
    )


@operator(2, kind="int")
def from_integers(b: Builder, x: str) -> None:
    b.let(
        b.pick(f"{x}.float()", f"{x} + 1", f"{x} * 2", f"{x} % 3", f"{x}.to(torch.float32) * 0.1", f"{x}.clamp(0, 3)")
    )


@operator(1, ranks=(1, 2), kind="int")
def one_hot(b: Builder, x: str) -> None:
    b.let(f"F.one_hot({x}.clamp(0, 3), 4).float()")


@operator(2, kind="bool")
def from_booleans(b: Builder, x: str) -> None:
    b.let(b.pick(f"{x}.float()", f"~{x}", f"torch.where({x}, 1.0, -1.0)", f"{x}.float() * 0.5 - 0.1"))


@operator(1.2, ranks=(3, 4, 5))
def interpolate(b: Builder, x: str) -> None:
    d = len(b.shape(x)) - 2
    modes = {1: ["nearest", "linear"], 2: ["nearest", "bilinear", "bicubic", "area"], 3: ["nearest", "trilinear"]}[d]
    mode = b.pick(*modes)
    corners = f", align_corners={b.pick(True, False)}" if mode.endswith(("linear", "cubic")) else ""
    b.let(f"F.interpolate({x}, {b.pick('scale_factor=2.0', f'size={b.pick(3, 5)}')}, mode={mode!r}{corners})")


@operator(0.5, ranks=(4,))
def unfold(b: Builder, x: str) -> None:
    y = b.let(f"F.unfold({x}, 2, stride=2)")
    if b.chance(0.6):
        rows, columns = (s - s % 2 for s in b.shape(x)[2:])
        b.let(f"F.fold({y}, ({rows}, {columns}), 2, stride=2)")


@operator(1)
def contract(b: Builder, x: str) -> None:
    """Products of two activations."""
    rank = len(b.shape(x))
    if rank == 4:
        forms = [f"torch.matmul({x}, {x}.transpose(2, 3))", f"torch.einsum('bchw,bdhw->bcd', {x}, {x}) * 0.1"]
    elif rank == 3:
        forms = [f"torch.bmm({x}, {x}.transpose(1, 2))", f"{x}.mT @ {x}", f"torch.einsum('btf,bsf->bts', {x}, {x})"]
    elif rank == 2:
        forms = [f"{x} @ {x}.t()", f"torch.mm({x}.t(), {x})"]
    else:
        raise Unfit("no product of this rank")
    b.let(b.pick(*forms))
