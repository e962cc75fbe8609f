"""Norms on GPUs: who serves a call, and our kernels in Triton."""

from . import route as route
from . import serve as serve
