# The public names of the plug-in: the class that attaches the penalty to an optimizer, and what it needs for LoRA.
# The functions under them are in lipschitz_reg.functional and .lora. Importing this package needs torch, nothing else.
from .lora import LoraAdapter, find_lora_adapters
from .regularizer import LipschitzRegularizer


__all__ = ["LipschitzRegularizer", "LoraAdapter", "find_lora_adapters"]
__version__ = "0.1.0"
