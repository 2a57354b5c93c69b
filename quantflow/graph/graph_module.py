"""The captured graph as a trainable module, for quantizers, calibration and training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Self, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

from quantflow.graph import graph_pickle, modes
from quantflow.graph.aten import argument
from quantflow.graph.parameters import submodule_at
from quantflow.graph.regions import AUTOCAST, bodies_of, brought_back, inline_regions
from quantflow.upstream.modules import non_persistent_buffers, own_buffers, own_parameters
from quantflow.upstream.storages import storage_id

_SETS = "quantflow_sets"  # GraphModule.meta: the global settings that the graph changes, grad mode or autocast


class TrainableGraphModule(GraphModule):
    """A pre-dispatch ATen graph that behaves like the eager model it was captured from.

    ``train()`` and ``eval()`` switch dropout and batch norm on the nodes, keeping the model's own probabilities, ``eps``
    and ``momentum``; parameters and buffers carry the eager model's names, those that inference does not read included,
    so checkpoints pass both ways. It survives ``copy.deepcopy``, ``pickle`` and DistributedDataParallel. Calls take and
    return the model's own structure of tensors. ``Exported.module()`` makes one.

    Args:
        root: The module, or the dict by target, that holds what ``graph`` reads, as for ``torch.fx.GraphModule``.
        graph: The graph.
        class_name: The name of the class, as for ``torch.fx.GraphModule``.

    Attributes:
        batch_norm_frozen: True keeps batch norm in inference mode (statistics frozen) also while training.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Dropout())
        >>> graph = qf.export(model, (torch.randn(4, 3, 8, 8),)).module()
        >>> graph.load_state_dict(model.state_dict())
        <All keys matched successfully>
        >>> graph.train().freeze_batch_norm().batch_norm_frozen
        True
    """

    def __init__(self, root: torch.nn.Module | dict[str, Any], graph: Graph, class_name: str = "GraphModule") -> None:
        super().__init__(root, graph, class_name)
        self.batch_norm_frozen: bool = getattr(root, "batch_norm_frozen", False)
        if isinstance(root, torch.nn.Module):
            _copy_state(root, self)

    @classmethod
    def from_program(cls, program: ExportedProgram) -> Self:
        """Make the graph of a program, with parameters of its own, in inference mode.

        Args:
            program: A pre-dispatch program, in inference mode.

        Returns:
            The graph.
        """
        root = copy.deepcopy(program.module(check_guards=False))
        sets = inline_regions(root)
        module = cls._of(root)
        module.meta[_SETS] = sets
        _add_unread_state(module, program)
        for name, _ in list(module.named_buffers(remove_duplicate=False)):
            if name not in program.state_dict:  # a constant of the trace is not a state of the model
                owner, _, leaf = name.rpartition(".")
                non_persistent_buffers(module.get_submodule(owner)).add(leaf)
        module.training = True
        return module.eval()

    @classmethod
    def _of(cls, graph: GraphModule) -> Self:
        """A module of ``graph`` in inference mode. The regions that switch modes with it become such modules too."""
        for node in graph.graph.nodes:
            for name, body in bodies_of(node, graph).items() if node.target is AUTOCAST else ():
                graph.set_submodule(name, cls._of(body))
        modes.strip_tracking(graph.graph)
        modes.mark_switched(graph.graph.nodes)
        module = cls(graph, graph.graph)
        module.meta.update(graph.meta)
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.meta.get(_SETS):
            return super().__call__(*args, **kwargs)
        with brought_back(self.meta[_SETS]):
            return super().__call__(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set training mode or inference mode, on this module, its observers and its nodes.

        Args:
            mode: True for training, False for inference.

        Returns:
            This module.
        """
        changed = mode != self.training
        super().train(mode)
        if changed:
            self.switch_nodes()
        return self

    def freeze_batch_norm(self, frozen: bool = True) -> Self:
        """Keep batch norm in inference mode also while training, or let it follow the mode again.

        Args:
            frozen: True keeps it, False lets it follow the mode.

        Returns:
            This module.
        """
        if frozen != self.batch_norm_frozen:
            self.batch_norm_frozen = frozen
            self.switch_nodes()
            for body in self.children():
                if isinstance(body, TrainableGraphModule):
                    body.freeze_batch_norm(frozen)
        return self

    def switch_nodes(self) -> None:
        """Bring the nodes into this module's mode, after a change of the mode or of the graph."""
        modes.switch(self, self.training, batch_norm=not self.batch_norm_frozen)
        self.recompile()

    def _deepcopy_init(self) -> Any:
        return type(self).__init__

    def __reduce__(self) -> tuple:
        return graph_pickle.load, (TrainableGraphModule, *graph_pickle.dump(self))


def adopt(module: GraphModule) -> TrainableGraphModule:
    """Return a copy of ``module`` as a :class:`TrainableGraphModule`, in the mode that its nodes show."""
    if isinstance(module, TrainableGraphModule):
        return copy.deepcopy(module)
    module = copy.deepcopy(module)
    adopted = TrainableGraphModule(module, module.graph)
    adopted.meta.update(module.meta)
    modes.mark_switched(adopted.graph.nodes)
    modes.mark_all(adopted.graph.nodes)  # captured in training mode
    adopted.training = modes_say_training(adopted.graph.nodes)
    return adopted


def modes_say_training(nodes: Iterable[torch.fx.Node]) -> bool:
    """Whether any node that follows the mode is in training mode."""
    return any(modes.SWITCHED in n.meta and argument(n, n.meta[modes.SWITCHED]) for n in nodes)


def _add_unread_state(module: GraphModule, program: ExportedProgram) -> None:
    """Add the state of ``program`` that its graph does not read to ``module``. A strict capture leaves batch counters and
    second names of shared tensors unread. Shared tensors stay shared; other tensors are copied.
    """
    there = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    known = {_memory(tensor): there[name] for name, tensor in program.state_dict.items() if name in there}
    for name, tensor in program.state_dict.items():
        if name in there:
            continue
        path, _, leaf = name.rpartition(".")
        owner, own = submodule_at(module, path), known.setdefault(_memory(tensor), tensor.detach().clone())
        if not isinstance(tensor, torch.nn.Parameter):
            owner.register_buffer(leaf, own)
        else:
            own = own if isinstance(own, torch.nn.Parameter) else torch.nn.Parameter(own, tensor.requires_grad)
            owner.register_parameter(leaf, own)
            known[_memory(tensor)] = own


def _memory(tensor: torch.Tensor) -> tuple:
    """A key that is equal for tensors over the same memory."""
    return storage_id(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _copy_state(root: torch.nn.Module, module: torch.nn.Module) -> None:
    """Add the parameters and buffers of ``root`` that the graph does not read to ``module``, with their persistence."""
    there = dict(module.named_modules(remove_duplicate=False))
    for path, owner in root.named_modules(remove_duplicate=False):
        if there.get(path) is owner:
            continue  # a called submodule (an observer) is already complete
        entries = {**own_parameters(owner), **own_buffers(owner)}
        if not entries:
            continue
        target = submodule_at(module, path)
        for name, tensor in entries.items():
            if tensor is None:
                continue
            if name in own_parameters(owner):
                target.register_parameter(name, cast(torch.nn.Parameter, tensor))
            else:
                target.register_buffer(name, tensor, persistent=name not in non_persistent_buffers(owner))
