"""What the page's numbers are held to."""

from __future__ import annotations

import numpy as np
import torch

F64 = torch.float64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def near(found, expected) -> None:
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
