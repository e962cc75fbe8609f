"""The only file that knows other libraries: each at its best honest setting, each optional.

Best honest: compiled where it compiles, bound to preallocated memory where it can be, torch's number of threads (JAX
takes all or one, and only when it is first imported), inputs handed over before the clock starts, results waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps
"""What ``eps=None`` means for float32 and half types."""

Call = Callable[[], Any]


def transformers(x: Tensor, weight: nn.Parameter) -> Call:
    """The eager class of Hugging Face's Llama."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layer = LlamaRMSNorm(weight.numel(), eps=EPS)
    layer.weight = weight
    return lambda: layer(x)


def onnxruntime(x: Tensor, weight: nn.Parameter) -> Call:
    """The operator RMSNormalization (opset 23), with input and output bound to torch's memory."""
    import onnx
    import onnxruntime as runtime
    from onnx import TensorProto, helper

    kinds = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE"}
    kind = TensorProto.DataType.Value(kinds[x.dtype])
    value = helper.make_tensor_value_info
    node = helper.make_node("RMSNormalization", ["x", "weight"], ["y"], axis=-1, epsilon=EPS)
    inputs = [value("x", kind, x.shape), value("weight", kind, weight.shape)]
    graph = helper.make_graph([node], "norm", inputs, [value("y", kind, x.shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding, y = session.io_binding(), torch.empty_like(x)
    for name, tensor in (("x", x), ("weight", weight)):
        binding.bind_input(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())
    binding.bind_output("y", "cpu", 0, kind, tuple(y.shape), y.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return y

    return call


def openvino(x: Tensor, weight: nn.Parameter) -> Call:
    """The formula, as the graph that its compiler knows to be RMSNorm; input and output in torch's memory."""
    import openvino as ov
    from openvino import opset13 as op

    kind = {torch.float32: ov.Type.f32, torch.float16: ov.Type.f16, torch.bfloat16: ov.Type.bf16}[x.dtype]

    def shared(tensor: Tensor) -> Any:
        bits = tensor.detach().view(torch.int16) if tensor.element_size() == 2 else tensor.detach()
        return ov.Tensor(bits.numpy().view(f"u{tensor.element_size()}"), list(tensor.shape), kind)

    given, gain = (op.parameter(list(t.shape), kind) for t in (x, weight))
    wide, factor = (op.convert(node, "f32") for node in (given, gain))
    one, two, eps = (op.constant(number, ov.Type.f32) for number in (1.0, 2.0, EPS))
    mean = op.reduce_mean(op.power(wide, two), op.constant([-1], ov.Type.i64), keep_dims=True)
    normalised = op.multiply(wide, op.divide(one, op.sqrt(op.add(mean, eps))))
    y = op.convert(op.multiply(normalised, factor), kind)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(ov.Model([y], [given, gain]), "CPU", settings).create_infer_request()
    result = torch.empty_like(x)
    for index, tensor in enumerate((x, weight)):
        request.set_input_tensor(index, shared(tensor))
    request.set_output_tensor(shared(result))

    def call() -> Tensor:
        request.infer()
        return result

    return call


def _jax() -> tuple[Any, Callable[..., Any]]:
    if torch.get_num_threads() == 1:  # heard at the first import only
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    import jax
    import jax.numpy as jnp

    def formula(x: Any, weight: Any) -> Any:
        wide = x.astype(jnp.float32)
        rstd = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + EPS)
        return (wide * rstd * weight.astype(jnp.float32)).astype(x.dtype)

    return jax, formula


def jax(x: Tensor, weight: nn.Parameter) -> Call:
    """The formula under ``jax.jit``."""
    library, formula = _jax()
    function, arguments = library.jit(formula), [library.dlpack.from_dlpack(t.detach()) for t in (x, weight)]
    return lambda: function(*arguments).block_until_ready()


def jax_backward(x: Tensor, weight: nn.Parameter, grad: Tensor) -> Call:
    """Its gradients under ``jax.jit``, which has to run the forward again."""
    library, formula = _jax()
    arguments = [library.dlpack.from_dlpack(t.detach()) for t in (x, weight, grad)]
    function = library.jit(lambda x, weight, grad: library.vjp(formula, x, weight)[1](grad))
    return lambda: library.block_until_ready(function(*arguments))


def mlx(x: Tensor, weight: nn.Parameter) -> Call:
    """``mx.fast.rms_norm`` on the CPU."""
    import mlx.core as mx

    given, gain = (mx.array(t.detach().float().numpy()).astype(_mlx_type(mx, x)) for t in (x, weight))

    def call() -> Any:
        y = mx.fast.rms_norm(given, gain, EPS)
        mx.eval(y)
        return y

    return call


def mlx_backward(x: Tensor, weight: nn.Parameter, grad: Tensor) -> Call:
    """Its gradients, which have to run the forward again."""
    import mlx.core as mx

    given, gain, dy = (mx.array(t.detach().float().numpy()).astype(_mlx_type(mx, x)) for t in (x, weight, grad))

    def call() -> Any:
        gradients = mx.vjp(lambda a, b: mx.fast.rms_norm(a, b, EPS), [given, gain], [dy])[1]
        mx.eval(*gradients)
        return gradients

    return call


def _mlx_type(mx: Any, x: Tensor) -> Any:
    return {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}[x.dtype]


def to_torch(value: Any) -> Tensor:
    """A result of any of them, for the check before the clock."""
    if isinstance(value, Tensor):
        return value
    if type(value).__module__.startswith("mlx"):
        import mlx.core as mx

        return torch.tensor(memoryview(value.astype(mx.float32)).tolist())
    return torch.utils.dlpack.from_dlpack(value)
