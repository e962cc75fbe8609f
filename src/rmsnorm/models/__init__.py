"""What we do to other people's models: find their norms, prove what they mean, run them on our kernels, undo it."""

from .patching import patch as patch
from .patching import patched as patched
from .patching import unpatch as unpatch
from .report import PatchReport as PatchReport
