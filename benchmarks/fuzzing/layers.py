"""Operators with weights: convolutions, linear layers, norms, embeddings, and shared layers."""

from __future__ import annotations

import re

from fuzzing.builder import Builder, Unfit, operator


def windows(b: Builder, x: str) -> tuple[int, int, list[int]]:
    """The number of spatial dimensions of a batch of images, its channels and its spatial sizes."""
    shape = b.shape(x)
    return len(shape) - 2, shape[1], list(shape[2:])


def convolution(b: Builder, x: str, *, bias: bool | None = None, same: bool = False) -> str:
    """The expression of a new convolution of ``x``; ``same`` preserves the shape."""
    spatial, channels, sizes = windows(b, x)
    out = channels if same else b.pick(1, 3, 4, 6, 8, 12, 16)
    kernel = b.pick(1, 3) if same else min(b.pick(1, 2, 3, 3, 5), *sizes)
    options: dict[str, object] = {}
    form = b.pick("plain", "plain", "depthwise", "grouped", "dilated", "strided", "same", "mode")
    if form == "depthwise":
        out = channels if same else channels * b.pick(1, 1, 2)
        options["groups"] = channels
    elif form == "grouped" and channels % 2 == 0 and out % 2 == 0:
        options["groups"] = 2
    elif form == "dilated" and min(sizes) >= 2 * kernel:
        options["dilation"] = 2
    elif form == "strided" and not same:
        options["stride"] = 2 if spatial == 1 else b.pick(2, (2,) + (1,) * (spatial - 1))
    if form == "same" and "stride" not in options:
        options["padding"] = "same"
    elif same:
        options["padding"] = (kernel // 2) * int(options.get("dilation", 1))  # type: ignore[call-overload]
    elif b.chance(0.6):
        options["padding"] = b.pick(kernel // 2, 1)
    if form == "mode" and options.get("padding"):
        options["padding_mode"] = b.pick("reflect", "circular", "replicate")
    if not (b.chance(0.7) if bias is None else bias):
        options["bias"] = False
    return f"nn.Conv{spatial}d({channels}, {out}, {kernel}{written(options)})"


def written(options: dict[str, object]) -> str:
    """Keyword arguments as source text after other arguments."""
    return "".join(f", {name}={value!r}" for name, value in options.items())


def batch_norm(b: Builder, x: str) -> str:
    """A new batch norm of ``x`` with random settings; returns ``self.name``."""
    rank, channels = len(b.shape(x)), b.shape(x)[1]
    options: dict[str, object] = {}
    if b.chance(0.4):
        options["eps"] = b.pick(1e-3, 1e-1, 1e-8)
    if b.chance(0.3):
        options["momentum"] = b.pick(None, 0.01, 0.5)
    if b.chance(0.15):
        options["affine"] = False
    if b.chance(0.08):
        options["track_running_stats"] = False
    kind = f"nn.BatchNorm{max(rank - 2, 1)}d"
    return b.layer("bn", f"trained({kind}({channels}{written(options)}))")


def activation(b: Builder, x: str) -> str:
    """The expression of an activation function of the expression ``x``."""
    return b.pick(f"F.relu({x})", f"F.relu6({x})", f"F.relu({x}, inplace=True)", f"F.hardswish({x})", f"F.silu({x})")


@operator(4, ranks=(3, 4, 5))
def conv(b: Builder, x: str) -> None:
    b.let(f"{b.layer('conv', convolution(b, x))}({x})")


@operator(4, ranks=(3, 4, 5))
def conv_norm_activation(b: Builder, x: str) -> None:
    y = b.let(f"{b.layer('conv', convolution(b, x, bias=b.chance(0.3)))}({x})")
    y = b.let(f"{batch_norm(b, y)}({y})")
    b.let(activation(b, y))


@operator(1, ranks=(3, 4, 5))
def conv_two_norms(b: Builder, x: str) -> None:
    y = b.let(f"{b.layer('conv', convolution(b, x))}({x})")
    first, second = b.let(f"{batch_norm(b, y)}({y})"), b.let(f"{batch_norm(b, y)}({y})")
    b.let(f"{first} {b.pick('+', '-', '*')} {second}")


@operator(1.5, ranks=(2, 3, 4, 5))
def norm_alone(b: Builder, x: str) -> None:
    y = b.let(f"{batch_norm(b, x)}({x})")
    if b.chance(0.4):
        b.let(f"{batch_norm(b, y)}({y})")


@operator(0.7, ranks=(3, 4, 5))
def pre_activation(b: Builder, x: str) -> None:
    y = b.let(activation(b, f"{batch_norm(b, x)}({x})"))
    b.let(f"{b.layer('conv', convolution(b, y))}({y})")


@operator(0.7, ranks=(3, 4, 5))
def same_conv_then_same_norm(b: Builder, x: str) -> None:
    layer, norm = b.layer("conv", convolution(b, x, same=True)), batch_norm(b, x)
    y = b.let(f"F.relu({norm}({layer}({x})))")
    b.let(f"{norm}({layer}({y}))")


@operator(0.7, ranks=(3, 4, 5))
def same_conv_then_other_norms(b: Builder, x: str) -> None:
    layer = b.layer("conv", convolution(b, x, same=True))
    y = b.let(f"{batch_norm(b, x)}({layer}({x}))")
    b.let(f"{batch_norm(b, y)}({layer}({y}))")


@operator(1, ranks=(3, 4, 5))
def conv_transposed(b: Builder, x: str) -> None:
    spatial, channels, sizes = windows(b, x)
    options: dict[str, object] = {}
    if min(sizes) <= 8 and b.chance(0.5):
        options["stride"] = 2
        if b.chance(0.3):
            options["output_padding"] = 1
    if b.chance(0.4):
        options["padding"] = 1
    if channels % 2 == 0 and b.chance(0.25):
        options["groups"] = 2
    if b.chance(0.3):
        options["bias"] = False
    layer = f"nn.ConvTranspose{spatial}d({channels}, {b.pick(2, 4, 6)}, {b.pick(2, 3)}{written(options)})"
    y = b.let(f"{b.layer('up', layer)}({x})")
    if b.chance(0.4):
        b.let(f"{batch_norm(b, y)}({y})")


@operator(4, ranks=(2, 3, 4))
def linear(b: Builder, x: str) -> None:
    features = b.shape(x)[-1]
    bias = "" if b.chance(0.7) else ", bias=False"
    b.let(f"{b.layer('linear', f'nn.Linear({features}, {b.pick(1, 4, 8, 8, 12, 16)}{bias})')}({x})")


@operator(1.5, ranks=(2, 3))
def linear_norm(b: Builder, x: str) -> None:
    bias = "" if b.chance(0.5) else ", bias=False"
    y = b.let(f"{b.layer('linear', f'nn.Linear({b.shape(x)[-1]}, {b.pick(4, 8, 16)}{bias})')}({x})")
    y = b.let(f"{batch_norm(b, y)}({y})")
    if b.chance(0.5):
        b.let(activation(b, y))


@operator(1.5, ranks=(2, 3, 4, 5))
def call_again(b: Builder, x: str) -> None:
    called = [name for name in b.layers if re.match(r"(conv|linear|bn|up)\d", name)]
    if not called:
        raise Unfit("nothing to call again")
    b.let(f"self.{b.pick(*called)}({x})")


@operator(1, ranks=(2, 3, 4))
def shared_weight(b: Builder, x: str) -> None:
    called = [name for name in b.layers if re.match(r"(linear|conv)\d", name)]
    if not called:
        raise Unfit("no weight to share")
    name = b.pick(*called)
    if name.startswith("linear"):
        weight = b.pick(f"self.{name}.weight", f"self.{name}.weight.t()", f"self.{name}.weight * 0.5")
        b.let(f"F.linear({x}, {weight})")
    else:
        rank = len(b.shape(x)) - 2
        b.let(f"F.conv{rank}d({x}, self.{name}.weight, padding={b.pick(0, 1)})")


@operator(0.8, ranks=(2, 3))
def tied_linear(b: Builder, x: str) -> None:
    features = b.shape(x)[-1]
    first, second = (b.layer("linear", f"nn.Linear({features}, {features})") for _ in range(2))
    b.lines(f"tie{len(b.layers)}", f"{second}.weight = {first}.weight")
    b.let(f"{second}({b.pick('F.relu', 'torch.tanh')}({first}({x})))")


@operator(0.6, ranks=(3, 4, 5))
def dead_channels(b: Builder, x: str) -> None:
    """A ReLU with some or all channels always zero."""
    name = b.layer("conv", convolution(b, x, bias=True))
    text = b.layers[name.removeprefix("self.")]
    part = b.pick("", "[:1]")
    b.lines(name.removeprefix("self."), f"{text}\n{name}.bias.data{part or '[:]'} = -60.0")
    y = b.let(f"F.relu({name}({x}))")
    b.let(f"{b.layer('conv', convolution(b, y))}({y})")


@operator(0.6, ranks=(2, 3, 4))
def far_weights(b: Builder, x: str) -> None:
    """Weights far larger or smaller than those of their neighbours."""
    features = b.shape(x)[-1]
    name = b.layer("linear", f"nn.Linear({features}, {features})").removeprefix("self.")
    b.lines(name, f"{b.layers[name]}\nself.{name}.weight.data[0] *= {b.pick(30.0, 0.001)}")
    b.let(f"self.{name}({x})")


@operator(1.2, ranks=(2, 3, 4, 5))
def other_norm(b: Builder, x: str) -> None:
    shape = b.shape(x)
    channels, rank = shape[1], len(shape)
    kinds = [f"nn.LayerNorm({shape[-1]})", f"nn.RMSNorm({shape[-1]})", f"nn.LayerNorm({list(shape[1:])})"]
    kinds += [f"nn.GroupNorm({b.pick(1, 2) if channels % 2 == 0 else 1}, {channels})"]
    if rank > 2:
        instance = f"nn.InstanceNorm{rank - 2}d({channels}"
        kinds += [f"{instance}{end})" for end in ("", ", affine=True", ", track_running_stats=True")]
        kinds += [f"nn.LocalResponseNorm({b.pick(2, 3)})"] if rank > 3 else []
    b.let(f"{b.layer('norm', f'trained({b.pick(*kinds)})')}({x})")


@operator(0.7, ranks=(2, 3, 4, 5))
def prelu(b: Builder, x: str) -> None:
    b.let(f"{b.layer('prelu', f'nn.PReLU({b.pick(1, b.shape(x)[1])}, init={b.pick(0.25, -0.5, 1.5)})')}({x})")


@operator(3, ranks=(1, 2, 3), kind="int")
def embedding(b: Builder, x: str) -> None:
    if int(b.values[x].min()) < 0 or int(b.values[x].max()) >= 10:
        raise Unfit("numbers beyond the vocabulary")
    options = b.pick("", "", ", padding_idx=0", ", scale_grad_by_freq=True")
    b.let(f"{b.layer('embedding', f'nn.Embedding(10, {b.pick(4, 8)}{options})')}({x})")


@operator(0.5, ranks=(2, 3))
def bilinear(b: Builder, x: str) -> None:
    other = b.pick(x, *b.alike(x))
    features = b.shape(x)[-1]
    b.let(f"{b.layer('bilinear', f'nn.Bilinear({features}, {features}, 4)')}({x}, {other})")
