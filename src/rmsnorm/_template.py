"""The only file that gives Inductor a norm as a template: a kernel of ours around which it writes code of its own.

Inductor knows templates from its matrix products. Rows are normed by our kernel a few at a time, into a cache, and what
reads them there, products, sums, casts and activations, is its own code in the same loop. The norm has its own bits,
what follows has those that it has behind an operator, and nothing takes another pass over memory. For inference: where
gradients are wanted, backward reads the norm's output again in most of these places, and it is written anyway.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

import torch
from torch._inductor import ir, lowering
from torch._inductor.codegen import cpp_gemm_template
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import parse_expr_with_index_symbols
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V

from . import _called, _native

_ours = torch.ops.rmsnorm
_LOCAL = "rows_done"
_BEGIN, _END, _NEXT = "row_begin", "row_end", "row_next"
_STEP = re.compile(r"\+=static_cast<int64_t>\((\d+)L\)\)")
"""Of a loop of Inductor's."""
_LOOP = re.compile(r"(x\d+)<static_cast<int64_t>\((\d+)L\); x\d+\+=static_cast<int64_t>\((\d+)L\)\)")
"""The same: its variable, where it ends, and its step."""
_EXP = re.compile(r"auto (tmp\d+) = (tmp\d+)\.exp\(\);")
_VALUE, _NAME = re.compile(r"\s*auto (tmp\d+) ="), re.compile(r"\btmp\d+\b")
_FEW = 8192
"""Elements up to which a norm is a kernel of its own, which looks at tensors itself (``_objects.py``), and what follows
another: a row of 4096 with a gate 1.00 of Inductor's time to 0.97, with nothing 0.98 to 0.94."""
_ROW = 4096
"""Columns whose float32 lie in L1 beside the rest."""
_PLACE = re.compile(r"\(([a-z]\w*) \+ static_cast<int64_t>\(([^()]*)\)", re.IGNORECASE)
"""Where a vector is loaded from, or stored to: a pointer, and what is added to it."""


def register() -> None:
    """Inductor asks for the lowerings of users' operators first."""
    lowering.user_lowerings.setdefault(_ours.rms_norm.default, _lower)


class RowsTemplate(CppTemplate):
    """The norm of rows: ``[rows, columns]`` to the same."""

    def __init__(self, inputs: list[Any], layout: Any, options: dict[str, Any]) -> None:
        super().__init__("rms_norm", inputs, layout, parallel_num_threads())
        self.options = options

    def render(  # type: ignore[override] # as Inductor's own
        self,
        kernel: Any,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: list[Any] | None = None,
        **_: Any,
    ) -> str:
        x, *weight = self.input_nodes
        y: Any = self.output_node if template_buffer_node is None else template_buffer_node
        kept = not epilogue_nodes or flag_template_buffer_has_other_users
        output = y if kept or not epilogue_nodes else epilogue_nodes[-1]
        inputs = dict(zip(("X", "W"), self.input_nodes, strict=False))
        # Before the rest: its other tensors are named after these.
        head = kernel.def_kernel(inputs=inputs, outputs={"Y": output})
        values = self.options | {
            "rows": kernel.size(x, 0),
            "columns": kernel.size(x, 1),
            "input": f"&{kernel.index(x, [0, 0])}",
            "weight": f"&{kernel.index(weight[0], [0])}" if weight else "nullptr",
            "output": "Y" if kept else "nullptr",
        }
        before = ""
        if epilogue_nodes:
            type = DTYPE_TO_CPP[y.get_dtype()]
            code = _rest(kernel, y, epilogue_nodes, bool(kept))
            if y.get_dtype().itemsize == 2:
                code = _split(code)
            size, most = y.get_numel() * y.get_dtype().itemsize, _native.ask("local_bytes")
            if not V.graph.sizevars.statically_known_leq(size, most):
                code = _asking(code, *(values[name] for name in ("rows", "columns", "input")))
            before = (
                f"auto rest = [&](const int64_t {_BEGIN}, const int64_t {_END}, const {type}* {_LOCAL}) {{\n{code}\n}};"
            )
            values |= {
                "rest": "[](void* context, int64_t begin, int64_t end, void* rows) "
                f"{{ (*static_cast<decltype(rest)*>(context))(begin, end, static_cast<const {type}*>(rows)); }}",
                "context": "&rest",
            }
        body = f"{{\n{before}\n{_called.ROWS.statement(values)}\n}}\n"
        return f'{self.header().getvalue()}\n{_called.ROWS.preamble}\n{_called.ASK}\nextern "C" {head}\n{body}'


def _rest(kernel: Any, y: Any, nodes: list[Any], kept: bool) -> str:
    """What Inductor does with rows that are done: they are the norm's output, or in a cache."""
    reindexers: list[Any] = []
    to, reindexers = cpp_gemm_template.gen_2d_view_of_epilogue_buf(nodes[-1], y, nodes, reindexers, [None] * len(nodes))
    if kept:
        done = kernel.slice_nd(y, [(_BEGIN, _END), ()])
    else:
        count = parse_expr_with_index_symbols(f"{_END} - {_BEGIN}")
        layout = ir.FixedLayout(torch.device("cpu"), y.get_dtype(), [count, y.get_size()[1]])
        kernel.local_buffers[_LOCAL] = done = ir.Buffer(name=_LOCAL, layout=layout)
    code: str = kernel.store_output(
        kernel.slice_nd(to, [(_BEGIN, _END), ()]), done, y, nodes, offsets=[_BEGIN, "0"], reindexers=reindexers
    )
    return code


def _split(code: str) -> str:
    """The loop over a row's columns, once for what exp makes, and once for the rest: two calls of exp for a vector,
    with eight registers saved around them, leave a CPU nothing else to do (512x4096 gated bfloat16: 1.05 of the time
    of Inductor's own norm to 0.96; float32, one call, loses 4 %).
    """
    lines = code.splitlines()
    loops = [i for i, line in enumerate(lines) if (loop := _LOOP.search(line)) and int(loop[3]) > 1]
    exps = [i for i, line in enumerate(lines) if _EXP.search(line)]
    loop, exp = (_LOOP.search(lines[loops[0]]), _EXP.search(lines[exps[0]])) if loops and exps else (None, None)
    if not loop or not exp or len(loops) > 1 or len(exps) > 1 or int(loop[2]) > _ROW or "C10_UNLIKELY" in code:
        return code
    begin = loops[0]
    end = lines.index(lines[begin + 1].replace("{", "}"), begin) + 1
    head, tail = lines[begin : exps[0]], lines[exps[0] + 1 : end]
    needed, made = {exp[2]}, list[str]()
    for line in reversed(head):
        value = _VALUE.match(line)
        if value is None or value[1] in needed:
            needed |= {*_NAME.findall(line)}
            made.insert(0, line)
    place, closing = f"exps + {loop[1]}", [line for line in tail if line.strip() == "}"]
    first = [*made, lines[exps[0]], f"{exp[1]}.store({place}, {loop[3]});", *closing]
    second = [*head, f"auto {exp[1]} = at::vec::VectorizedN<float,2>::loadu({place}, {loop[3]});", *tail]
    return "\n".join([*lines[:begin], f"alignas(64) float exps[{loop[2]}];", *first, *second, *lines[end:]])


def _asking(code: str, rows: str, columns: str, input: str) -> str:
    """Loops of Inductor's, which ask for the next rows of what they read and write, and of the norm's input, while
    they compute: 512x4096 gated float32 from 1.13 of the time of Inductor's own norm to 0.8. What a CPU finds by
    itself comes too late, as an activation is a call for each vector, and a page ends after 64 lines.
    """
    lines, step, asked = [f"const int64_t {_NEXT} = {_END} < {rows} ? {_END} : {_BEGIN};"], 1, set[str]()
    for line in code.splitlines():
        if loop := _STEP.search(line):
            step, asked = int(loop[1]), set()
        for name, index in _PLACE.findall(line) if step > 1 else ():
            if name != _LOCAL and _BEGIN not in index:
                continue  # the same for all rows
            row = f"{input} + {_NEXT} * {columns}" if name == _LOCAL else name
            ask = f"rmsnorm::ask({row} + ({index.replace(_BEGIN, _NEXT)}), {step});"
            if ask not in asked:
                asked.add(ask)
                lines.append(ask)
        lines.append(line)
    return "\n".join(lines)


def _lower(
    input: Any, weight: Any, dims: int, eps: float, offset: float = 0.0, round_first: bool = False
) -> ir.TensorBox | None:
    """The norm as a template; None where it stays an operator."""
    if V.graph.cpp_wrapper or V.graph.aot_mode or not _is_plain(input):
        return None
    dtype, sizes = input.get_dtype(), input.get_size()
    fits = weight is None or (_is_plain(weight) and [*weight.get_size()] == [*sizes[len(sizes) - dims :]])
    if not fits or not _called.is_known(dtype):
        return None
    weight_type = None if weight is None else weight.get_dtype()
    if weight_type not in (None, dtype) and (round_first or weight_type is not torch.float32):
        return None
    if V.graph.sizevars.statically_known_leq(prod(sizes), _FEW):
        return None
    columns = prod(sizes[len(sizes) - dims :])
    rows = ir.ExternKernel.realize_input(lowering.view(input, [prod(sizes[: len(sizes) - dims]), columns]))
    inputs: list[Any] = [rows]
    if weight is not None:
        inputs.append(ir.ExternKernel.realize_input(lowering.view(weight, [columns])))
    inputs = [*ir.InputsKernel.unwrap_storage(inputs)]
    if len({one.get_name() for one in inputs}) < len(inputs):
        return None
    options = {
        "kind": _called.ROWS.kinds["rms_norm"],
        "input_type": dtype,
        "output_type": dtype,
        "weight_type": weight_type,
    }
    options |= {"round_first": round_first, "eps": eps, "offset": offset}
    layout = ir.FixedLayout(torch.device("cpu"), dtype, rows.get_size())
    made = RowsTemplate(inputs, layout, options).generate().output_node()  # type: ignore[no-untyped-call]
    return lowering.view(made, sizes)


def _is_plain(box: Any) -> bool:
    """Whether it is on the CPU, and its elements lie in their order."""
    if box.get_device().type != "cpu":
        return False
    box.realize()
    return bool(ir.is_contiguous_storage_and_layout(box))
