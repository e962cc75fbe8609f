"""RMS normalisation for PyTorch: ``y = x / sqrt(mean(x²) + eps) · weight``, fast, exact to a stated bound.

The public page is this list; everything else is private or lives beside the corridor (docs/design.md has the tree).
"""

from . import gpu as gpu
from ._graphs import set_compile_mode as set_compile_mode
from ._info import info as info
from ._info import version as _version
from ._install import install as install
from ._install import installed as installed
from ._install import uninstall as uninstall
from ._surgery import fold as fold
from ._surgery import rotate as rotate
from ._surgery import to_rms as to_rms
from ._surgery import unfold as unfold
from .forms.gated import GatedRMSNorm as GatedRMSNorm
from .forms.gated import gated_rms_norm as gated_rms_norm
from .forms.general import inverse_rms as inverse_rms
from .forms.heads import heads_rms_norm_rope as heads_rms_norm_rope
from .forms.heads import rope as rope
from .forms.in_place import add_rms_norm_ as add_rms_norm_
from .forms.l2 import l2_norm as l2_norm
from .forms.layer_norm import LayerNorm as LayerNorm
from .forms.layer_norm import layer_norm as layer_norm
from .forms.modulated import gated_add as gated_add
from .forms.modulated import modulated_norm as modulated_norm
from .forms.quantised import quantised_rms_norm as quantised_rms_norm
from .forms.sandwich import rms_norm_add as rms_norm_add
from .forms.sandwich import sandwich_rms_norm as sandwich_rms_norm
from .functional import add_rms_norm as add_rms_norm
from .functional import rms_norm as rms_norm
from .models import PatchReport as PatchReport
from .models import patch as patch
from .models import patched as patched
from .models import unpatch as unpatch
from .module import RMSNorm as RMSNorm

for _key in gpu.route.KEYS:  # now that every form has its row
    gpu.serve.register(_key)

__all__ = [
    "GatedRMSNorm",
    "LayerNorm",
    "PatchReport",
    "RMSNorm",
    "add_rms_norm",
    "add_rms_norm_",
    "fold",
    "gated_add",
    "gated_rms_norm",
    "heads_rms_norm_rope",
    "info",
    "install",
    "installed",
    "inverse_rms",
    "l2_norm",
    "layer_norm",
    "modulated_norm",
    "patch",
    "patched",
    "quantised_rms_norm",
    "rms_norm",
    "rms_norm_add",
    "rope",
    "rotate",
    "sandwich_rms_norm",
    "set_compile_mode",
    "to_rms",
    "unfold",
    "uninstall",
    "unpatch",
]
__version__ = _version()
