"""What the commands share: consoles, and how a resolution is written."""

from __future__ import annotations

from rich.console import Console

from radio_fast.model import RADIOModel

out = Console()
err = Console(stderr=True)


def parse_resolution(text: str | None, model: RADIOModel) -> tuple[int, int] | None:
    """(height, width) in pixels from "432" or "384x512", the preferred one from None, None from "native".

    Raises:
        ValueError: not of these forms, or a size the model does not take; the message names the nearest it takes.
    """
    if text == "native":
        return None
    if text is None:
        size = tuple(model.preferred_resolution or (512, 512))
    else:
        parts = text.lower().split("x")
        if len(parts) > 2 or not all(p.isdecimal() and 0 < int(p) <= 16384 for p in parts):
            raise ValueError(f"--resolution must be a number of pixels, HEIGHTxWIDTH or 'native', got {text!r}")
        size = (int(parts[0]), int(parts[-1]))
    near = model.get_nearest_supported_resolution(*size)
    if text is not None and near != size:
        raise ValueError(
            f"--resolution {text}: sides must be multiples of {model.min_resolution_step}; "
            f"the nearest supported size is {near.height}x{near.width}"
        )
    return tuple(near)
