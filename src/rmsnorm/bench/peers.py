"""The only file that knows other libraries: each at its best honest setting, each optional.

Best honest: compiled where it compiles, bound to preallocated memory where it can be (the task "warm"), inputs handed
over before the clock starts, results waited for, and torch's number of threads. JAX hears of that when it is first
imported, from the environment (worker.py); MLX has one thread on a CPU. A fresh output comes from the library's own
allocator: onnxruntime's hands out memory that was touched before, OpenVINO has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .timing import quickest

if TYPE_CHECKING:
    from .contenders import Problem

EPS = 1e-6

Call = Callable[[], Any]
Bind = Callable[["Problem"], Call]


def llama_layer(shape: tuple[int, ...], eps: float, dtype: torch.dtype) -> nn.Module:
    """The eager class of Hugging Face's Llama."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(*shape, eps=eps).to(dtype)


def _onnxruntime(p: Problem, task: str) -> Call:
    """The faster of its graphs, of those that it takes: not every type has a kernel for every operator."""
    calls, refused = [], None
    for nodes in _onnx_graphs(task, p.dtype):
        try:
            calls.append(_onnx_session(p, task, nodes))
        except Exception as error:
            refused = error
    if refused and not calls:
        raise refused
    return quickest(calls)


def _onnx_graphs(task: str, dtype: torch.dtype) -> list[list[Any]]:
    """Its own SimplifiedLayerNormalization, and ONNX's RMSNormalization (opset 23), which has no kernel for bfloat16,
    so it is cast. SkipSimplifiedLayerNormalization for the task "add"."""
    from onnx import TensorProto, helper

    if task == "add":
        operator = "SkipSimplifiedLayerNormalization", ["x", "residual", "weight"], ["y", "", "", "sum"]
        return [[helper.make_node(*operator, domain="com.microsoft", epsilon=EPS)]]
    own = helper.make_node("SimplifiedLayerNormalization", ["x", "weight"], ["y"], axis=-1, epsilon=EPS)
    if dtype is not torch.bfloat16:
        return [[own], [helper.make_node("RMSNormalization", ["x", "weight"], ["y"], axis=-1, epsilon=EPS)]]
    wide = [helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT) for name in ("x", "weight")]
    norm = helper.make_node("RMSNormalization", ["x_wide", "weight_wide"], ["y_wide"], axis=-1, epsilon=EPS)
    return [[own], [*wide, norm, helper.make_node("Cast", ["y_wide"], ["y"], to=TensorProto.BFLOAT16)]]


def _onnx_session(p: Problem, task: str, nodes: list[Any]) -> Call:
    """One graph, bound to torch's memory."""
    import onnxruntime as runtime
    from onnx import TensorProto, helper

    kinds = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE"}
    kind = TensorProto.DataType.Value(kinds[p.dtype])
    given, results = {"x": p.x, "weight": p.weight}, ["y"]
    if task == "add":
        given, results = {"x": p.x, "residual": p.residual, "weight": p.weight}, ["y", "sum"]

    def value(name: str) -> Any:
        return helper.make_tensor_value_info(name, kind, given.get(name, p.x).shape)

    graph = helper.make_graph(nodes, "norm", [*map(value, given)], [*map(value, results)])
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=11)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = p.case.threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads spin during a call, not after it
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, tensor in given.items():
        binding.bind_input(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())
    for name in results:
        if task == "warm":
            binding.bind_output(name, "cpu", 0, kind, tuple(p.out.shape), p.out.data_ptr())
        else:
            binding.bind_output(name, "cpu")

    def call() -> Any:
        session.run_with_iobinding(binding)
        return p.out if task == "warm" else binding.get_outputs()

    return call


ONNXRUNTIME: Mapping[str, Bind] = {
    "forward": lambda p: _onnxruntime(p, "forward"),
    "warm": lambda p: _onnxruntime(p, "warm"),
    "add": lambda p: _onnxruntime(p, "add"),
}


def _openvino(p: Problem) -> Call:
    """The formula, as the graph that its compiler knows to be RMSNorm; input and output in torch's memory."""
    import openvino as ov
    from openvino import opset13 as op

    kind = {torch.float32: ov.Type.f32, torch.float16: ov.Type.f16, torch.bfloat16: ov.Type.bf16}[p.dtype]

    def shared(tensor: Tensor) -> Any:
        bits = tensor.detach().view(torch.int16) if tensor.element_size() == 2 else tensor.detach()
        return ov.Tensor(bits.numpy().view(f"u{tensor.element_size()}"), list(tensor.shape), kind)

    given, gain = (op.parameter(list(t.shape), kind) for t in (p.x, p.weight))
    wide, factor = (op.convert(node, "f32") for node in (given, gain))
    one, two, eps = (op.constant(number, ov.Type.f32) for number in (1.0, 2.0, EPS))
    mean = op.reduce_mean(op.power(wide, two), op.constant([-1], ov.Type.i64), keep_dims=True)
    normalised = op.multiply(wide, op.divide(one, op.sqrt(op.add(mean, eps))))
    y = op.convert(op.multiply(normalised, factor), kind)
    settings = {"INFERENCE_NUM_THREADS": p.case.threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(ov.Model([y], [given, gain]), "CPU", settings).create_infer_request()
    for index, tensor in enumerate((p.x, p.weight)):
        request.set_input_tensor(index, shared(tensor))
    request.set_output_tensor(shared(p.out))

    def call() -> Tensor:
        request.infer()
        return p.out

    return call


OPENVINO: Mapping[str, Bind] = {"warm": _openvino}


def _given(p: Problem, task: str) -> list[Tensor]:
    more = {"add": lambda: [p.residual], "backward": lambda: [p.grad]}
    return [p.x, p.weight, *more.get(task, list)()]


def _jax(p: Problem, task: str) -> Call:
    """The formula under ``jax.jit``; its gradients from what ``jax.vjp`` kept or from the input: the faster."""
    import jax
    import jax.numpy as jnp

    def norm(x: Any, weight: Any) -> Any:
        wide = x.astype(jnp.float32)
        rstd = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + EPS)
        return (wide * rstd * weight.astype(jnp.float32)).astype(x.dtype)

    def add(x: Any, weight: Any, residual: Any) -> Any:
        return norm(x + residual, weight), x + residual

    def again(x: Any, weight: Any, grad: Any) -> Any:
        return jax.vjp(norm, x, weight)[1](grad)

    def bound(function: Callable[..., Any], *given: Any) -> Call:
        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(*given))

    given = [jax.dlpack.from_dlpack(tensor.detach()) for tensor in _given(p, task)]
    if task == "backward":
        _, from_kept = jax.vjp(jax.jit(norm), *given[:2])  # a function, and a tree of what it kept
        return quickest([bound(again, *given), bound(lambda f, grad: f(grad), from_kept, given[2])])
    return bound(add if task == "add" else norm, *given)


JAX: Mapping[str, Bind] = {
    "forward": lambda p: _jax(p, "forward"),
    "backward": lambda p: _jax(p, "backward"),
    "add": lambda p: _jax(p, "add"),
}


def _mlx(p: Problem, task: str) -> Call:
    """``mx.fast.rms_norm`` on the CPU; its gradients, which have to run the forward again."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    kind = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}[p.dtype]

    def norm(x: Any, weight: Any) -> Any:
        return mx.fast.rms_norm(x, weight, EPS)

    def add(x: Any, weight: Any, residual: Any) -> Any:
        sum = x + residual
        return norm(sum, weight), sum

    def gradients(x: Any, weight: Any, grad: Any) -> Any:
        return mx.vjp(norm, [x, weight], [grad])[1]

    functions: dict[str, Callable[..., Any]] = {"forward": norm, "add": add, "backward": gradients}
    given = [mx.array(tensor.detach().float().numpy()).astype(kind) for tensor in _given(p, task)]
    mx.eval(*given)

    def call() -> Any:
        value = functions[task](*given)
        mx.eval(value)
        return value

    return call


MLX: Mapping[str, Bind] = {
    "forward": lambda p: _mlx(p, "forward"),
    "backward": lambda p: _mlx(p, "backward"),
    "add": lambda p: _mlx(p, "add"),
}


def to_torch(value: Any) -> Tensor:
    """A result of any of them, for the check before the clock."""
    if isinstance(value, Tensor):
        return value
    if type(value).__module__.startswith("mlx"):
        import mlx.core as mx

        return torch.tensor(memoryview(value.astype(mx.float32)).tolist())
    return torch.utils.dlpack.from_dlpack(value)
