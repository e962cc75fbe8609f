"""The only file that torch itself calls: at the end of ``import torch``, in every process (see pyproject.toml).

It does nothing, and imports nothing of ours, unless ``RMSNORM_INSTALL=1`` asks for ``rmsnorm.install()``.
"""

import os


def autoload() -> None:
    """The entry point of the group ``torch.backends``; ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns the group off."""
    if os.environ.get("RMSNORM_INSTALL", "0") not in {"", "0"}:
        from rmsnorm import _install

        _install.autoload()
