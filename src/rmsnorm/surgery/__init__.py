"""Exact surgery: changes of a model's norms that leave the model what it computes, each with a proof."""

from .operations import SurgeryError as SurgeryError
from .operations import fold as fold
from .operations import rotate as rotate
from .operations import to_rms as to_rms
from .operations import unfold as unfold
from .report import SurgeryReport as SurgeryReport
