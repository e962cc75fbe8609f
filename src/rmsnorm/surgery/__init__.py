"""Exact surgery: changes of a model's norms that leave the model what it computes, each with a proof."""

from .operations import SurgeryError as SurgeryError
from .operations import operate as operate
from .operations import take_back as take_back
from .report import SurgeryReport as SurgeryReport
from .saved import load as load
