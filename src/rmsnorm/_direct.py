"""The only file that writes into Inductor's wrappers, the Python around its kernels: how our operators are called.

Inductor would look an operator up and call it as a user does, in 3 µs. Norms of contiguous rows on the CPU, alone or
with the sums beside them, and their gradients become a call of their kernel instead, with outputs that Inductor
allocates, in 1 (``csrc/graph_ops.cpp``). The others are called past ``OpOverload.__call__``, which takes 0.5. The bits
are those of the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
from torch._inductor.virtualized import V

from . import _around, _called, _objects

_SUMS = frozenset({"add_rms_norm", "sandwich_rms_norm", "add_rms_norm_cast", "scale_rms_norm"})
"""Return the sum that they normalise, too."""
_AROUND, _TURNED = "around_rms_norm_backward", "turned_rms_norm_backward"
_OTHERS = "heads_rms_norm_rope", "heads_rms_norm_rope_forward", "heads_rms_norm_rope_backward"
_ANGLES = "cos", "sin"
_BESIDE = "other", "output"
"""What is read around the kernel; the gradient that arrives may be of another type then."""
_ROWS = frozenset({"input", "residual", "sum", "grad", "grad_sum", *_BESIDE})
_WEIGHTS = "weight", "next_weight"
_ENTRIES = {kind: entry for entry in (_called.ROWS, _called.GRADIENTS) for kind in entry.kinds}


def register() -> None:
    """Inductor asks here first how an operator is called."""
    for name in (*_ENTRIES, *(kind + "_forward" for kind in _called.ROWS.kinds), *_OTHERS):
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
    kind = node.op_overload._schema.name.partition("::")[2].removesuffix("_forward")
    if kind in _called.HEADS.kinds:
        return _write_heads(node, writeline)
    if kind not in _ENTRIES:
        return False
    entry, given, outputs = _ENTRIES[kind], _arguments(node), node.outputs
    x, dims = given["input"], given["dims"]
    dtype, sizes = x.get_dtype(), x.get_size()
    rows, columns = sizes[: len(sizes) - dims], sizes[len(sizes) - dims :]
    tensors = {label: given[label] for label in (*entry.read, *_BESIDE, *_ANGLES) if given.get(label) is not None}
    around, turned = kind == _AROUND, kind == _TURNED
    strided = {"grad", *_ANGLES} if turned else set()
    plain = all(_is_known(one) if label in strided else _is_plain(one) for label, one in tensors.items())
    if not plain or not all(isinstance(one, ir.MultiOutput) for one in outputs):
        return False
    alike = {label: one for label, one in tensors.items() if label in (_ROWS | {*_WEIGHTS}) - strided}
    same = all([*one.get_size()] == [*(columns if label in _WEIGHTS else sizes)] for label, one in alike.items())
    # Operators have other pairs, too.
    same &= all(one.get_dtype() is dtype for label, one in alike.items() if not (around and label == "grad"))
    results = dict(zip(_results(kind, node), outputs, strict=True))
    wanted = [label for label in results if _is_wanted(label, given)]
    if not same or not _called.is_known(dtype) or not {*wanted} - {"grad_residual", "grad_next_weight"}:
        return False
    numbers = {"rows": _product(rows), "columns": _product(columns)}
    variables = {label: size for label, size in numbers.items() if not isinstance(size, int)}
    values: dict[str, Any] = numbers | {label: label for label in (*variables, *tensors, *wanted)}
    values |= {"kind": entry.kinds[kind], "input_type": dtype, "output_type": given.get("dtype", dtype)}
    values |= {"round_sum": kind.startswith(("rounded_", "around_"))}
    values |= {f"{label}_type": dtype if label in tensors else None for label in _WEIGHTS}
    values |= {label: given.get(label) for label in ("eps", "next_eps", "offset", "factor", "round_first")}
    if values["next_eps"] is None:
        values["next_eps"] = values["eps"]
    known = {label: value for label, value in values.items() if label in entry.fields and value is not None}
    preamble, before = entry.preamble, ""
    if around:
        types = {label: tensors[label].get_dtype() for label in ("input", "grad", *_BESIDE) if label in tensors}
        columns = str(values["columns"])
        alone = isinstance(numbers["rows"], int) and numbers["rows"] <= 2  # no other rows come
        cold = [] if alone else [one for one in ("input", "grad_sum", "grad") if one in tensors]
        more, before, fields = _around.around(types, given["scale"], columns, cold)
        preamble, known = preamble + more, known | fields
    elif turned:
        _, tokens, heads, _ = _ints(sizes)
        strides = {label: [0, 0, *_strides(tensors[label])][-4:-1] for label in ("grad", *_ANGLES)}
        more, before, fields = _around.turned(dtype, heads, tokens, int(values["columns"]), strides)
        preamble, known = preamble + more, known | fields
    _call(node, writeline, preamble, before + entry.statement(known), tensors, results, wanted, variables)
    return True


def _write_heads(node: Any, writeline: Callable[[str], None]) -> bool:
    """The same of query and key, four dimensions whose sizes are known, which are normed and turned."""
    given, statements = _arguments(node), []
    labels = "query", "key", "cos", "sin", "query_weight", "key_weight"
    tensors = {label: given[label] for label in labels if given[label] is not None}
    x = given["query"]
    same = all(one.get_dtype() is x.get_dtype() for one in tensors.values())
    if not same or len(x.get_size()) != 4 or not all(map(_is_known, tensors.values())):
        return False
    results = dict(zip(("query_output", "key_output", "query_rstd", "key_rstd"), node.outputs, strict=False))
    plain: dict[str, Any] = {label: given[label] for label in ("eps", "offset", "round_first", "interleaved")}
    plain |= {f"{label}_type": x.get_dtype() for label in ("input", "angle")} | {"cos": "cos", "sin": "sin"}
    for label in _ANGLES:
        sizes, by = _ints(given[label].get_size()), _strides(given[label])
        if len(sizes) > 3:
            return False
        plain |= {"turned": sizes[-1], f"{label}_token": by[-2], f"{label}_batch": by[0] if len(by) == 3 else 0}
    for name in ("query", "key"):
        values = plain | dict(zip(("batch", "heads", "tokens", "columns"), _ints(given[name].get_size()), strict=True))
        strides = _ints(given[name].get_stride())
        values |= dict(zip(("input_batch", "input_head", "input_token"), strides[:3], strict=True))
        values |= {"input": name, "output": f"{name}_output"}
        if f"{name}_weight" in tensors:
            values |= {"weight": f"{name}_weight", "weight_type": x.get_dtype()}
        if f"{name}_rstd" in results:
            values["rstd"] = f"{name}_rstd"
        statements.append(_called.HEADS.statement(values))
    _call(node, writeline, _called.HEADS.preamble, "\n  ".join(statements), tensors, results, list(results), {})
    return True


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _strides(node: Any) -> list[int]:
    """Of a size of 1, which is broadcast, the stride is 0."""
    strides = zip(node.get_size(), node.get_stride(), strict=True)
    return _ints(stride if size != 1 else 0 for size, stride in strides)


def _is_known(node: Any) -> bool:
    """Whether it is on the CPU, of a known size, and the elements of a row lie in their order."""
    layout = node.get_layout()
    known = all(isinstance(one, int) or one.is_Integer for one in (*layout.size, *layout.stride))
    return node.get_device().type == "cpu" and known and bool(layout.stride[-1] == 1)


def _results(kind: str, node: Any) -> list[str]:
    """What it returns, by the names of the struct."""
    if kind in _called.GRADIENTS.kinds:
        return [result.name for result in node.op_overload._schema.returns]
    return ["output", *(["sum"] if kind in _SUMS else []), "rstd", "next_rstd"][: len(node.outputs)]


def _is_wanted(result: str, given: dict[str, Any]) -> bool:
    """A gradient is, if it was asked for, and there is something that it is the gradient of."""
    of = result.removeprefix("grad_")
    there = given[of] if of in _WEIGHTS else given["output"] if of == "other" else result
    return given.get(f"need_{of}", True) and there is not None


def _call(
    node: Any,
    writeline: Callable[[str], None],
    preamble: str,
    statement: str,
    read: dict[str, Any],
    results: dict[str, Any],
    wanted: list[str],
    numbers: dict[str, Any],
) -> None:
    """Calls a kernel that is compiled once for all calls alike. Of known sizes, it looks at what it is given, and makes
    room, by itself; else Inductor's wrapper does."""
    wrapper, removed = V.graph.wrapper_code, V.graph.removed_buffers
    for one in results.values():
        one.codegen = _nothing  # Inductor's is to take it from a tuple, and to check it
    # Of the others nobody writes any, and nobody reads it.
    made = {label: one for label, one in results.items() if label in wanted or one.get_name() not in removed}
    names = {label: one.get_name() for label, one in made.items()}
    references = [one.codegen_reference() for one in read.values()]
    layouts = {label: one.get_layout() for label, one in (read | made).items()}
    shapes = {label: ([*layout.size], [*layout.stride]) for label, layout in layouts.items()}
    if _objects.serves(shapes.values()):
        if not wrapper.header.contains(_objects.IMPORT):
            wrapper.header.writeline(_objects.IMPORT)
        tuples = {label: [*map(wrapper.codegen_python_shape_tuple, shapes[label])] for label in made}
        rooms = (f"({', '.join(tuples[label])}, {layouts[label].dtype})" for label in made)
        code = _objects.code(preamble, statement, {label: shapes[label] for label in read}, [*made])
        kernel = _defined(f"{_objects.COMPILED}(async_compile, {1 + len(read)}, r'''{code}''')")
        room = _defined(f"(empty_strided_cpu, {', '.join(rooms)})")
        wrapper.lines[:] = [line for line in wrapper.lines if not _objects.asks(line, references)]
        writeline(f"{', '.join(names.values())} = {kernel}({', '.join([room, *references])})")
    else:
        types = dict.fromkeys(read, "const void*") | dict.fromkeys(wanted, "void*") | dict.fromkeys(numbers, "int64_t")
        parameters = ", ".join(f"{type} {label}" for label, type in types.items())
        code = f'{preamble}\nextern "C" void kernel({parameters}) {{\n  {statement}\n}}\n'
        kernel = _defined(f"async_compile.cpp_pybinding({[*types.values()]!r}, r'''{code}''')")
        for label, name in names.items():
            shape, stride = (tuple(values) for values in shapes[label])
            writeline(wrapper.make_allocation(name, torch.device("cpu"), layouts[label].dtype, shape, stride))
        sizes = [wrapper.codegen_sizevar(value) for value in numbers.values()]
        writeline(f"{kernel}({', '.join([*references, *(names[label] for label in wanted), *sizes])})")
    for name in {*names.values()} & removed:
        writeline(f"del {name}")
    writeline(f"{node.get_name()} = None")  # Inductor deletes it, once its results have been taken from it


def _defined(text: str) -> str:
    """The name of that value, which is made when the wrapper is loaded."""
    wrapper = V.graph.wrapper_code
    if (name := wrapper.src_to_kernel.get(text)) is None:
        name = wrapper.src_to_kernel[text] = f"rmsnorm_{wrapper.next_kernel_suffix()}"
        wrapper.define_kernel(name, text, gpu=False)
    return str(name)


def _nothing(_: Any) -> None:
    """In the place of what a result writes."""


def _arguments(node: Any) -> dict[str, Any]:
    """By their names, with the defaults of those that weren't given."""
    schema = node.op_overload._schema.arguments
    given, named = node.unflatten_args(node.inputs, node.constant_args)
    values = {argument.name: argument.default_value for argument in schema}
    return values | dict(zip(values, given)) | named | node.kwargs  # noqa: B905 - the rest are defaults


def _product(sizes: Any) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return int(product) if isinstance(product, int) or product.is_Integer else product


def _is_plain(node: Any) -> bool:
    """Whether it is on the CPU, and its elements lie in their order."""
    return node.get_device().type == "cpu" and bool(node.get_layout().is_contiguous())
