import torch

from quantflow.upstream.storages import storage_id


def test_views_have_the_storage_of_their_base():
    x = torch.zeros(4)
    assert storage_id(x) == storage_id(x[1:]) == storage_id(x.detach().view(2, 2))


def test_copies_have_their_own_also_without_memory():
    for x in (torch.zeros(4), torch.zeros(0), torch.zeros(4, device="meta")):
        y = x.clone()
        assert storage_id(x) != storage_id(y)
        assert storage_id(x) == storage_id(x[:])
