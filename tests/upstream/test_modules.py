import pytest
import torch
from torch import nn

from quantflow.upstream.modules import NormBase, non_persistent_buffers, own_buffers, own_modules, own_parameters


def test_tables_hold_what_was_registered():
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.ones(1)))
    module.register_parameter("bias", None)
    module.register_buffer("count", torch.zeros(1), persistent=False)
    module.add_module("inner", nn.ReLU())
    assert own_parameters(module) == {"weight": module.weight, "bias": None}
    assert own_buffers(module) == {"count": module.count}
    assert own_modules(module) == {"inner": module.inner}
    assert non_persistent_buffers(module) == {"count"}


def test_a_change_of_a_table_changes_the_module():
    module = nn.Sequential(nn.Linear(1, 1))
    weight = nn.Parameter(torch.zeros(1, 1))
    own_parameters(module[0])["weight"] = weight
    assert module[0].weight is weight
    del own_modules(module)["0"]
    assert len(module) == 0
    module.register_buffer("count", torch.zeros(1))
    own_buffers(module)["count"] = replacement = torch.ones(1)
    assert module.count is replacement
    non_persistent_buffers(module).add("count")
    assert not module.state_dict()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d])
def test_norms_with_statistics_have_one_base(norm):
    module = norm(1, momentum=None)
    assert isinstance(module, NormBase)
    assert module.momentum is None
    assert hasattr(module, "track_running_stats")
