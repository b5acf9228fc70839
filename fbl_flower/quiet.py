"""Leave out what other libraries print in every run: advice to their own developers, and notes that need no action."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

# Flower switches deprecation warnings on in the processes of its clients. They are for the developers of these libraries.
_LIBRARIES = r"(accelerate|diffusers|huggingface_hub|matplotlib|mlxtend|optimum|sklearn|torch|torchvision|transformers)(\.|$)"

# Logger: how the line begins.
_LINES = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # where CUDA is installed without a GPU; nothing is compiled
    "matplotlib.font_manager": "Matplotlib is building the font cache",  # once in a new home directory
    "flwr": "Manually terminating",  # a client process of a simulation that has ended
}


@dataclass(frozen=True)
class _LeaveOut:
    """A filter of a logger; equal ones are added once."""

    text: str

    def __call__(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.text)


def quiet_libraries() -> None:
    """Filter these lines, and no others, in this process; a second call changes nothing."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    # It asks to set a variable that would show the GPUs to clients that were given none.
    warnings.filterwarnings("ignore", message="Tip: In future versions of Ray", category=FutureWarning, module=r"ray\.")
    for name, text in _LINES.items():
        logging.getLogger(name).addFilter(_LeaveOut(text))
