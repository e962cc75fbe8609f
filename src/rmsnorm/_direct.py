"""The only file that writes into Inductor's wrappers, the Python around its kernels: how our operators are called.

Inductor would look an operator up and call it as a user does, in 3 µs. Norms of contiguous rows on the CPU, alone or
with the sums beside them, become a call of their kernel instead, with outputs that Inductor allocates, in 1
(``csrc/graph_ops.cpp``). The others are called past ``OpOverload.__call__``, which takes 0.5. The bits are those of the
operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
from torch._inductor.virtualized import V

from . import _called

_SUMS = frozenset({"add_rms_norm", "sandwich_rms_norm"})
"""Return the sum that they normalise, too."""
_OTHERS = (
    *("rms_norm_backward", "sandwich_rms_norm_backward", "general_add_rms_norm"),
    *("heads_rms_norm_rope", "heads_rms_norm_rope_forward", "heads_rms_norm_rope_backward"),
)
_ROWS = "input", "residual"
_WEIGHTS = "weight", "next_weight"


def register() -> None:
    """Inductor asks here first how an operator is called."""
    kernels = [kind + end for kind in _called.KINDS for end in ("", "_forward")]
    for name in (*kernels, *_OTHERS):
        CUSTOM_EXTERN_KERNEL_CODEGEN.setdefault(f"torch.ops.rmsnorm.{name}.default", CustomCodegen(python=_write))


def _write(node: Any, writeline: Callable[[str], None]) -> None:
    if not _write_kernel(node, writeline):
        wrapper, name = V.graph.wrapper_code, node.op_overload._schema.name.replace("::", "_")
        found = f"{name} = {node.python_kernel_name}._op"
        if not wrapper.header.contains(found):
            wrapper.header.writeline(found)
        arguments = [*node.codegen_args(), *node.codegen_kwargs()]
        writeline(f"{node.get_name()} = {name}({', '.join(arguments)})")


def _write_kernel(node: Any, writeline: Callable[[str], None]) -> bool:
    """Whether it is one of those that become a call of a kernel; writes that."""
    name = node.op_overload._schema.name.partition("::")[2]
    kind = name.removesuffix("_forward")
    if kind not in _called.KINDS or node.kwargs:
        return False
    given = _arguments(node)
    x, outputs = given["input"], node.outputs
    dims, sizes = given["dims"], x.get_size()
    rows, columns = sizes[: len(sizes) - dims], sizes[len(sizes) - dims :]
    tensors = {label: given[label] for label in (*_ROWS, *_WEIGHTS) if given.get(label) is not None}
    if not all(map(_is_plain, tensors.values())) or not all(isinstance(one, ir.MultiOutput) for one in outputs):
        return False
    same = all([*tensors[label].get_size()] == [*sizes] for label in _ROWS if label in tensors)
    same &= all([*tensors[label].get_size()] == [*columns] for label in _WEIGHTS if label in tensors)
    same &= all(one.get_dtype() is x.get_dtype() for one in tensors.values())  # operators have other pairs, too
    if not same or not _called.is_known(x.get_dtype()):
        return False
    results = ["output", *(["sum"] if kind in _SUMS else []), "rstd", "next_rstd"][: len(outputs)]
    numbers = {"rows": _product(rows), "columns": _product(columns)}
    variables = {label: size for label, size in numbers.items() if not isinstance(size, int)}
    names = {"x": "input"} | {label: label for label in tensors if label != "input"}
    dtype = x.get_dtype()
    values: dict[str, Any] = numbers | {label: label for label in (*variables, *names, *results)}
    values |= {"kind": _called.KINDS[kind], "type": dtype, "output_type": dtype}
    values |= {f"{label}_type": dtype if label in tensors else None for label in _WEIGHTS}
    values |= {label: given[label] for label in ("eps", "offset", "round_first")}
    next_eps = given.get("next_eps")
    values["next_eps"] = given["eps"] if next_eps is None else next_eps
    read = {label: tensors[at].codegen_reference() for label, at in names.items()}
    _call(node, writeline, read, dict(zip(results, outputs, strict=True)), variables, values)
    return True


def _call(
    node: Any,
    writeline: Callable[[str], None],
    read: dict[str, str],
    written: dict[str, Any],
    numbers: dict[str, Any],
    values: dict[str, Any],
) -> None:
    """Allocates, and calls a kernel that is compiled once for all calls alike."""
    wrapper = V.graph.wrapper_code
    types = dict.fromkeys(read, "const void*") | dict.fromkeys(written, "void*") | dict.fromkeys(numbers, "int64_t")
    parameters = ", ".join(f"{type} {label}" for label, type in types.items())
    code = f'{_called.PREAMBLE}\nextern "C" void kernel({parameters}) {{\n  {_called.statement(values)}\n}}\n'
    text = f"async_compile.cpp_pybinding({[*types.values()]!r}, r'''{code}''')"
    if (name := wrapper.src_to_kernel.get(text)) is None:
        name = wrapper.src_to_kernel[text] = f"rmsnorm_{wrapper.next_kernel_suffix()}"
        wrapper.define_kernel(name, text, gpu=False)
    for one in written.values():
        shape, stride = tuple(one.get_size()), tuple(one.get_stride())
        writeline(wrapper.make_allocation(one.get_name(), torch.device("cpu"), one.get_dtype(), shape, stride))
    made = [one.get_name() for one in written.values()]
    sizes = [wrapper.codegen_sizevar(value) for value in numbers.values()]
    writeline(f"{name}({', '.join([*read.values(), *made, *sizes])})")
    writeline(f"{node.get_name()} = {made[0] if len(made) == 1 else '(' + ', '.join(made) + ')'}")
    writeline(f"del {', '.join(made)}")  # those that are used are taken from it in turn, and freed in time


def _arguments(node: Any) -> dict[str, Any]:
    """By their names, with the defaults of those that weren't given."""
    schema = node.op_overload._schema.arguments
    given, _ = node.unflatten_args(node.inputs, node.constant_args)
    values = [*given, *(argument.default_value for argument in schema[len(given) :])]
    return {argument.name: value for argument, value in zip(schema, values, strict=True)}


def _product(sizes: Any) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return int(product) if isinstance(product, int) or product.is_Integer else product


def _is_plain(node: Any) -> bool:
    """Whether it is on the CPU, and its elements lie in their order."""
    return node.get_device().type == "cpu" and bool(node.get_layout().is_contiguous())
