import pytest
import torch
from executorch import exir
from executorch.exir.verification import verifier
from executorch.exir.verification.arg_validator import EdgeOpArgValidator
from torch import fx, nn

from quantflow.upstream.lowering.verification import verify_by_values
from quantflow.upstream.replaced import exclusively


class Sum(nn.Module):
    def forward(self, x):
        return (x + x) * x


def violations(module, inputs):
    """What the verifier finds, with the validator that it has now."""
    validator = verifier.EdgeOpArgValidator(module)
    validator.run(*inputs)
    return [(str(target), node.name) for target, (_, node) in validator.violating_ops.items()]


def test_the_verifier_reads_the_validator_from_its_module():
    assert verifier.EdgeOpArgValidator is EdgeOpArgValidator
    assert issubclass(EdgeOpArgValidator, fx.Interpreter)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, True), (torch.complex64, False)], ids=str)
def test_both_validators_find_the_same(dtype, allowed):
    program = torch.export.export(Sum(), (torch.zeros(2, dtype=dtype),))
    config = exir.EdgeCompileConfig(_check_ir_validity=False)
    module = exir.to_edge(program, compile_config=config).exported_program().graph_module
    inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    stock = violations(module, inputs)
    with exclusively(), verify_by_values():
        assert violations(module, inputs) == stock
    assert (stock == []) == allowed
