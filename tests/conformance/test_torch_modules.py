"""Proves that ``RMSNorm`` and ``LayerNorm`` pass what torch's test_modules.py and test_stateless.py check of them."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_utils import noncontiguous_like
from torch_samples import FLOATING, LAYERS, close

# torch's forward mode still uses TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def ran(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Its output and all gradients."""
    y = module(x)
    # The numbers of a half type, also where they are the truth's in float64.
    grad = (torch.arange(y.numel()) % 17 / 8 - 1).reshape(y.shape).to(y)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_forward(layer, dtype, training):
    """test_forward, test_non_contiguous, test_if_train_and_eval_modes_differ: values and gradients."""
    for module, theirs, x, one in layer.made(dtype, training):
        wide = x.detach().double().requires_grad_()
        wanted = [t.to(dtype) for t in ran(copy.deepcopy(theirs).double(), wide)]
        if one.reference_fn and dtype is torch.float32:
            close(module(x), one.reference_fn(theirs, x))
        if layer.installs and layer.info.module_cls is nn.LayerNorm:
            wanted = ran(theirs, x)  # which is torch's before and after
        with layer.here():
            got = ran(module, x)
            strided = ran(module, noncontiguous_like(x.detach()).requires_grad_())
            other = ran(module.train(not training), x)
        close(got, wanted)
        close(strided, got)
        close(other, got, rtol=0, atol=0)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_copies(layer):
    """test_pickle, test_save_load, deepcopy: what comes back computes the same bits, and is of the same class."""
    for module, _, x, _ in layer.made(torch.float32):
        with layer.here():
            wanted = ran(module, x)
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            copies = [copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))]
            for again in [*copies, torch.load(file, weights_only=False)]:
                assert type(again) is type(module)
                close(ran(again, x), wanted, rtol=0, atol=0)
                assert list(again.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_repr(layer):
    for module, theirs, _, _ in layer.made(torch.float32):
        assert repr(theirs).rstrip(")") in repr(module), "torch's words first, then what else there is to say"
        assert str(module) == repr(module)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_factory_kwargs(layer):
    """test_factory_kwargs, test_device_ctx_init: dtype and device reach every parameter, from arguments or context."""
    for one in layer.inputs(torch.float32):
        args, kwargs = one.constructor_input.args, one.constructor_input.kwargs
        for dtype in (torch.float64, torch.bfloat16):
            module = layer.build(*args, **kwargs, dtype=dtype)
            assert all(p.dtype is dtype for p in module.parameters())
        module = layer.build(*args, **kwargs, device="meta")
        assert all(p.is_meta for p in module.parameters())
        with torch.device("meta"):
            module = layer.build(*args, **kwargs)
        assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_to(layer):
    """test_to, test_to_empty, with and without swapping tensors, and the memory formats that test_memory_format has."""
    for swap in (False, True):
        before = torch.__future__.get_swap_module_params_on_conversion()
        with ExitStack() as stack:
            stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
            torch.__future__.set_swap_module_params_on_conversion(swap)
            for module, theirs, x, _ in layer.made(torch.float32):
                identities = [id(p) for p in module.parameters()]
                for dtype in (torch.float64, torch.bfloat16, torch.float16):
                    assert module.to(dtype) is module
                    theirs.to(dtype)
                    assert identities == [id(p) for p in module.parameters()]
                    with torch.no_grad():  # tensors that a graph holds can't be swapped
                        wanted = theirs(x.to(dtype))
                        with layer.here():
                            close(module(x.to(dtype)), wanted)
                module.float().to("meta").to_empty(device="cpu")
                module.load_state_dict(theirs.float().state_dict())
                formats = [torch.contiguous_format, *([torch.channels_last] if x.dim() == 4 else [])]
                for memory in formats:
                    with torch.no_grad():
                        wanted = theirs(x.to(memory_format=memory))
                    with layer.here(), torch.no_grad():
                        got = module.to(memory_format=memory)(x.to(memory_format=memory))
                    close(got, wanted)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("check", ["grad", "gradgrad", "stateless"])
def test_grad(layer, check):
    """test_grad and test_gradgrad through ``functional_call``, and test_stateless.py's swap of all parameters."""
    for module, theirs, x, _ in layer.made(torch.float64):
        names = [name for name, _ in module.named_parameters()]
        if x.numel() > 200:
            continue  # the large batch: 3,200 rows of finite differences; test_forward has it

        def function(x: Tensor, *values: Tensor, module: nn.Module = module, names: list[str] = names) -> Tensor:
            return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

        inputs = (x, *module.parameters())
        if check == "stateless":
            wanted = torch.func.functional_call(theirs, {n: p + 1 for n, p in theirs.named_parameters()}, (x,))
        with layer.here():
            if check == "grad":
                assert gradcheck(function, inputs, check_forward_ad=True)
            elif check == "gradgrad":
                assert x.numel() == 0 or gradgradcheck(function, inputs, fast_mode=x.numel() > 60)
            else:
                close(function(x, *(p + 1 for p in module.parameters())), wanted)
