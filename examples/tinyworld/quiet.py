"""Imported before anything comes from diffusers: keeps messages off the screen that are not about what was asked for.

diffusers imports torchao where it is installed, and image processors of torchvision where it is not, for models that
are not used here. What these say on the way helps nobody; `python -W default` shows it. Everything else is shown.
"""

import logging
import sys


# Copied from train_dreambooth_lipschitz.py
# diffusers imports torchao, bitsandbytes and image processors of torchvision for what is not used here. What these say
# about themselves on the way is nothing that a user can act on; `python -W default` shows it.
if not sys.warnoptions:
    for name, message in {
        "torchao": "Failed to load",
        "torchao.kernel.intmm": "Detected no triton",
        "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
        "torch.utils._pytree": "is an Enum subclass and is now natively supported",
        "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
        "transformers.utils.import_utils": "requires torchvision (not installed)",
        # It lists no modules, and says so.
        "diffusers.models.modeling_utils": "that should be kept in float32: []",
    }.items():
        logging.getLogger(name).addFilter(lambda record, message=message: message not in record.getMessage())
