"""Imported before anything comes from diffusers: keeps messages off the screen that are not about what was asked for.

diffusers imports torchao where it is installed, and image processors of torchvision where it is not, for models that
are not used here. What these say on the way helps nobody; `python -W default` shows it. Everything else is shown.
"""

import logging
import sys


if not sys.warnoptions:
    for name, message in {
        "torchao": "Failed to load",
        "torch.utils._pytree": "is an Enum subclass and is now natively supported",
        "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
        "transformers.utils.import_utils": "requires torchvision (not installed)",
    }.items():
        logging.getLogger(name).addFilter(lambda record, message=message: message not in record.getMessage())
