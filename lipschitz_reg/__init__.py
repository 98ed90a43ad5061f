# The public names of the plug-in: the class that attaches the penalty to an optimizer, what it needs for LoRA, and the
# recording of what layers get.
# The functions under them are in lipschitz_reg.functional, .lora and .inputs. Importing this package needs torch only.
from .functional import InputMoment
from .inputs import record_inputs
from .lora import LoraAdapter, find_lora_adapters
from .regularizer import LipschitzRegularizer


__all__ = ["InputMoment", "LipschitzRegularizer", "LoraAdapter", "find_lora_adapters", "record_inputs"]
__version__ = "0.1.0"
