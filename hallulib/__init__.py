"""hallulib: the small package behind the course. Light on purpose: importing it loads no torch."""

import logging
import warnings

__version__ = "0.1.0"

# Two libraries speak up about nothing a reader can act on, and must be hushed before they load:
# bitsandbytes about an optional, faster kernel, peft about a name it still asks transformers by.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
