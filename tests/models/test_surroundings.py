"""Proves that patch() takes norms as it finds them: with torch's classes around them, sharded, fake, or under modes."""

from __future__ import annotations

import pytest
import torch
import transformers
from oracle import same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rmsnorm

distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def x(seed: int = 0) -> Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))


def norms() -> nn.Sequential:
    """Weights that differ from column to column."""
    model = nn.Sequential(LlamaRMSNorm(64), nn.RMSNorm(64, eps=1e-6))
    for i, norm in enumerate(model):
        norm.weight.data = 1 + x(i)[0] / 4
    return model


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@distributed
@pytest.mark.filterwarnings("ignore")  # torch.distributed's own
def test_norms_that_fsdp2_has_wrapped_one_by_one(mesh) -> None:
    """transformers' plans wrap the last norm of a model like this. Its class is torch's then, and can't be copied."""
    from torch.distributed.fsdp import fully_shard

    plain, model = norms(), norms()
    rmsnorm.patch(plain)
    for norm in model:
        fully_shard(norm, mesh=mesh)
    fully_shard(model, mesh=mesh)
    before, classes = model(x()), [type(norm) for norm in model]
    assert all(cls.__name__.startswith("FSDP") for cls in classes), classes
    report = rmsnorm.patch(model)
    assert [entry.meaning for entry in report.patched] == ["round, then weight", "weight, then round"]
    after = model(x())
    assert same_bits(after.detach(), plain(x()).detach())
    assert not same_bits(after.detach(), before.detach()), "equal bits mean that nothing was patched"
    after.square().sum().backward()
    plain(x()).square().sum().backward()
    for ours, theirs in zip(model, plain, strict=True):
        assert same_bits(ours.weight.grad.full_tensor(), theirs.weight.grad)
    rmsnorm.unpatch(model)
    assert [type(norm) for norm in model] == classes
    assert same_bits(model(x()).detach(), before.detach())


@distributed
@pytest.mark.filterwarnings("ignore")
def test_shards_that_begin_inside_of_their_storage(mesh) -> None:
    """Every rank's but the first one's: torch can't copy such a DTensor, and ranks must not differ in what they do."""
    from torch.distributed.tensor import DTensor, Shard

    model = norms()
    for norm in model:
        local = torch.cat([torch.zeros(64), norm.weight.data])[64:]
        norm.weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
    report = rmsnorm.patch(model)
    assert [entry.name for entry in report.patched] == ["0", "1"], report


@distributed
@pytest.mark.parametrize("reached", [True, False])
def test_a_sharded_gain_of_zero_keeps_the_input(mesh, monkeypatch, reached: bool) -> None:
    """As where a model is sharded first and loaded then. FSDP2 may have offloaded it to where no backend reaches."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    def unreachable(_: object) -> None:
        raise RuntimeError("No backend type associated with device type cpu")

    model = norms()
    for norm in model:
        norm.weight = nn.Parameter(distribute_tensor(torch.arange(64.0), mesh, [Shard(0)]))
    if not reached:
        monkeypatch.setattr(DTensor, "full_tensor", unreachable)
    report = rmsnorm.patch(model, memory="lean")
    reason = "input: its smallest gain is 0, of element 0, and float32 needs at least 1.2e-38 for x̂ = y / gain"
    assert [entry.kept for entry in report.patched] == [reason] * 2


@distributed
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_fsdp2_has_sharded_is_not_run(mesh) -> None:
    """That would leave plain parameters where it had DTensors, and an optimizer made then would train those."""
    from torch.distributed.fsdp import fully_shard

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    fully_shard(model.model.layers[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = [*model.parameters()]
    report = rmsnorm.patch(model, fuse_add=True)
    assert (len(report.patched), len(report.fused)) == (3, 0)
    assert [entry.reason.rpartition(": ")[2] for entry in report.skipped if "fused" in entry.reason] == [
        "FSDP2 has sharded it; patch it before fully_shard()"
    ]
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))


def test_a_parametrized_norm_is_refused_for_what_it_is() -> None:
    """Its class is torch's, and its weight is computed by a module inside of it."""
    norm = LlamaRMSNorm(64)
    parametrize.register_parametrization(norm, "weight", nn.Identity())
    assert [entry.reason for entry in rmsnorm.patch(norm).skipped] == ["it has modules inside"]


def test_a_fake_norm_is_refused_at_once() -> None:
    """Else every candidate of every recipe would be tried on it, and logged by torch: 13 s and 2,000 lines."""
    with FakeTensorMode():
        model = norms()
        inside = rmsnorm.patch(model)
    for report in (inside, rmsnorm.patch(model)):
        assert len(report.skipped) == 2
        assert all("FakeTensor" in entry.reason for entry in report.skipped)


class Watching(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode", [FakeTensorMode, Watching, lambda: torch.device("meta"), torch.no_grad, torch.inference_mode]
)
def test_modes_of_the_caller_stay_out_of_the_trial(mode) -> None:
    """With numbers of their own there is no proof; and under a mode for functions, torch's LayerNorm would stand trial
    in place of ours."""
    there, here = (nn.Sequential(*norms(), nn.LayerNorm(64)) for _ in range(2))
    expected = rmsnorm.patch(there, layer_norm=True)
    with mode() as entered:
        report = rmsnorm.patch(here, layer_norm=True)
        assert getattr(entered, "seen", 0) == 0
    assert len(report.patched) == 3
    assert report.to_dict() == expected.to_dict()
