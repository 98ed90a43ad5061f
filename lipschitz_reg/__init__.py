# The public names of the plug-in: the class that attaches the penalty to an optimizer. Holds no logic.
# The functions under it are in lipschitz_reg.functional. Importing this package needs torch and nothing else.
from .regularizer import LipschitzRegularizer


__all__ = ["LipschitzRegularizer"]
__version__ = "0.1.0"
