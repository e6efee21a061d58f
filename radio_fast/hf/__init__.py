"""For programs written for Transformers: `RadioFastModel`, `register()`, `ImageProcessor`.

The first two need Transformers (`pip install radio_fast[hf]`), which is imported when they are first used.
"""

from radio_fast.hf.image_processor import ImageProcessor

_OF_TRANSFORMERS = ("RadioFastConfig", "RadioFastModel", "RadioFastModelOutput", "register")
__all__ = ["ImageProcessor", *_OF_TRANSFORMERS]


def __getattr__(name: str):
    if name not in _OF_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from radio_fast.hf import model
    except ImportError as error:
        raise ImportError(
            f"radio_fast.hf.{name} needs Transformers 5.17 or newer: pip install radio_fast[hf] ({error})"
        ) from error
    return getattr(model, name)
