"""
The public names of the plug-in: the class that attaches the penalty to an optimizer, what it needs for LoRA, and the
recording of a base. The functions under them are in the other modules. Importing this package needs torch only.
"""

from .drift import Drift, kl_bound
from .functional import Moment
from .lora import LoraAdapter, find_lora_adapters
from .pipelines import draw_held_out, record_pipeline
from .recording import Recording, record
from .regularizer import LipschitzRegularizer


__all__ = [
    "Drift",
    "LipschitzRegularizer",
    "LoraAdapter",
    "Moment",
    "Recording",
    "draw_held_out",
    "find_lora_adapters",
    "kl_bound",
    "record",
    "record_pipeline",
]
__version__ = "0.1.0"
