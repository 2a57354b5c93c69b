"""Construction of observers from annotations, and their insertion into the graph."""

from __future__ import annotations

from dataclasses import fields

from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize
from torchao.quantization.pt2e.fake_quantize import FixedQParamsFakeQuantize
from torchao.quantization.pt2e.observer import FixedQParamsObserver
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import QuantizationSpecBase

from quantflow.errors import QuantflowError
from quantflow.graph.aten import is_float_tensor, node_argument, value
from quantflow.graph.constants import constant_calls
from quantflow.graph.parameters import device_of, is_constant
from quantflow.graph.state import written_tensors
from quantflow.observers import MinMaxObserver, Observer, PerGroupMinMaxObserver
from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.observers.moving_average import for_training
from quantflow.observers.observation import is_fake_quantizer
from quantflow.observers.per_token_fake_quantize import PerTokenFakeQuantize
from quantflow.preparation.sharing import annotation_of, sharing_groups
from quantflow.qparams.per_token import is_per_token
from quantflow.qparams.qparams import PER_CHANNEL
from quantflow.upstream.modules import own_modules

# The submodule that holds the observers: "quantization.<name of the observed node>".
CONTAINER = "quantization"

ObserverMap = dict[EdgeOrNode, nn.Module]


def make_observers(graph_module: GraphModule, fake_quantize: type[FakeQuantize] | None) -> ObserverMap:
    """One observer (or ``fake_quantize``, if given) for each group of annotated edges and outputs."""
    made: ObserverMap = {}
    constants = constant_calls(graph_module.graph)
    groups = sharing_groups(graph_module.graph)
    derived = [g for g in groups if isinstance(g.spec, DerivedQuantizationSpec)]
    for group in [g for g in groups if not isinstance(g.spec, DerivedQuantizationSpec)] + derived:
        weight = all(isinstance(m, tuple) and (is_constant(m[0]) or m[0] in constants) for m in group.members)
        readers = [reader for m in group.members for reader in ((m[1],) if isinstance(m, tuple) else m.users)]
        if fake_quantize is not None and is_per_token(group.spec, readers):
            observer: nn.Module = PerTokenFakeQuantize(MinMaxObserver(is_dynamic=True))
        else:
            observer = _make_observer(group.spec, made, fake_quantize, weight=weight)
        made.update(dict.fromkeys(group.members, observer))
    return made


def _make_observer(
    spec: QuantizationSpecBase, made: ObserverMap, fake_quantize: type[FakeQuantize] | None, *, weight: bool
) -> nn.Module:
    if isinstance(spec, DerivedQuantizationSpec):
        names = ("derive_qparams_fn", "dtype", "quant_min", "quant_max", "qscheme", "ch_axis")
        sources = [made[key] for key in spec.derived_from]
        return DerivedObserverOrFakeQuantize(obs_or_fqs=sources, **{n: getattr(spec, n) for n in names})
    if isinstance(spec, FixedQParamsQuantizationSpec):
        arguments = {f.name: getattr(spec, f.name) for f in fields(spec)}
        make = FixedQParamsObserver.with_args(**arguments)
        return make() if fake_quantize is None else FixedQParamsFakeQuantize(observer=make)
    assert isinstance(spec, QuantizationSpec), f"unknown kind of quantization spec: {spec}"
    observer = _construct(spec)
    if fake_quantize is None or not isinstance(observer, Observer):
        return observer
    if isinstance(observer, PerGroupMinMaxObserver):
        remedy = "quantize after training, or train with one scale a channel"
        raise QuantflowError("prepare", "weights in groups can't be trained", node="scheme", remedy=remedy)
    if observer.is_dynamic:  # scale and zero point are computed from each input
        return FakeQuantize(for_training(observer, weight=weight))
    return fake_quantize(for_training(observer, weight=weight), None if weight else observer)


def _construct(spec: QuantizationSpec) -> nn.Module:
    arguments = {f.name: getattr(spec, f.name) for f in fields(spec)}
    constructor = arguments.pop("observer_or_fake_quant_ctr")
    if spec.qscheme not in PER_CHANNEL:
        arguments.pop("ch_axis")
    return constructor.with_args(**arguments)()


def insert_observers(module: GraphModule, observers: ObserverMap) -> None:
    """Insert a call of each observer on its annotated tensor, and replace the tensor by the output in its users."""
    device = device_of(module)
    names: dict[int, str] = {}  # by id: a shared observer is one submodule
    written = written_tensors(module.graph)

    def call(observer: nn.Module, observed: Node, given: Node, reader: Node | None = None) -> Node:
        if id(observer) not in names:
            names[id(observer)] = _add_submodule(module, observed.name, observer.to(device))
        # The call follows the producer of the tensor; a tensor that is written in place is observed right before its reader.
        place = module.graph.inserting_after(given) if reader is None else module.graph.inserting_before(reader)
        with place:
            node = module.graph.call_module(names[id(observer)], (given,))
        node.meta = {k: observed.meta[k] for k in ("nn_module_stack", "stack_trace", "val") if k in observed.meta}
        return node

    for node in list(module.graph.nodes):
        if annotation_of(node) is None:
            continue
        for producer in node.all_input_nodes:
            original = _observed(producer)
            observer = observers.get((original, node))
            if observer is None or (not is_float_tensor(original) and value(original) is not None):
                continue
            if original in written:
                node.replace_input_with(producer, call(observer, original, producer, node))
                continue
            already = [u for u in (producer, *producer.users) if _calls(u, names.get(id(observer)))]
            node.replace_input_with(producer, already[0] if already else call(observer, original, producer))
        observer = observers.get(node)
        if observer is not None and is_float_tensor(node):
            users = list(node.users)
            output = call(observer, node, node)
            for user in users:
                user.replace_input_with(node, output)
    module.graph.lint()


def drop_uncalled_observers(module: GraphModule) -> None:
    """Delete the observers that no node calls after dead code elimination."""
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    container = own_modules(module).get(CONTAINER) or nn.Module()
    for name in [name for name in own_modules(container) if f"{CONTAINER}.{name}" not in called]:
        del own_modules(container)[name]


def _calls(node: Node, name: str | None) -> bool:
    return name is not None and node.op == "call_module" and node.target == name


def _observed(node: Node) -> Node:
    """The tensor that a chain of observer calls ending in ``node`` observes."""
    while node.op == "call_module" and str(node.target).startswith(f"{CONTAINER}."):
        node = node_argument(node)
    return node


def _add_submodule(module: GraphModule, name: str, observer: nn.Module) -> str:
    container = own_modules(module).get(CONTAINER)
    unique, count = name, 0
    while hasattr(container or nn.Module(), unique):  # nn.Module has attributes such as "to" and "half"
        count += 1
        unique = f"{name}_{count}"
    module.add_submodule(f"{CONTAINER}.{unique}", observer)
    return f"{CONTAINER}.{unique}"


def is_inserted_fake_quantizer(module: GraphModule, node: Node) -> bool:
    """Whether ``node`` calls a fake quantizer of ``module``."""
    return node.op == "call_module" and is_fake_quantizer(module.get_submodule(str(node.target)))
