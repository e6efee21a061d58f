"""Text towers of teachers that have one: open_clip's (clip, siglip) and SigLIP 2's, loaded at their first use.

None of this is imported, read or downloaded before; an adaptor's image half does without.
"""

from __future__ import annotations

import copy
import importlib
import string
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_fast.errors import CheckpointError, DownloadError

SIGLIP2_REPOS = {
    "siglip2-g-384": "google/siglip2-giant-opt-patch16-384",
    "siglip2-so400m": "google/siglip2-so400m-patch16-naflex",
}
SIGLIP2_LENGTH = 64


class Loaded(NamedTuple):
    """A text tower in memory."""

    module: nn.Module
    context_length: int
    vocab_size: int
    logit_scale: float  # the factor itself; a number, since half precision would have 100 as 98.9
    logit_bias: float | None  # of a tower trained with a sigmoid loss


class TextTower:
    """The text half of an adaptor. Safe to call from several threads; the first one loads.

    No nn.Module, so that its weights are no part of a model's parameters and state. A deep copy has its own weights, a
    pickle none: there they are loaded anew.
    """

    extra: str

    def __init__(self, name: str, model: object, pretrained: object = None):
        self.name, self.model, self.pretrained = name, model, pretrained
        self._lock = threading.RLock()
        self._tokenizer: Callable[[list[str]], Tensor] | None = None
        self._loaded: Loaded | None = None
        self.cache: OrderedDict[tuple, Tensor] = OrderedDict()  # embeddings of labels (`radio_fast.zeroshot`)

    def __reduce__(self):
        return type(self), (self.name, self.model, self.pretrained)

    def __deepcopy__(self, memo: dict) -> TextTower:
        other = type(self)(self.name, self.model, self.pretrained)
        with self._lock:
            other._tokenizer = self._tokenizer  # changed by no one
            if self._loaded is not None:
                other._loaded = self._loaded._replace(module=copy.deepcopy(self._loaded.module, memo))
        return other

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts must be a string or a list of at least one string, got {texts!r}")
        with self._lock:  # for the call too: Transformers' tokenizers set their padding in place
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer()
            return self._tokenizer(texts)

    def load(self, device: torch.device, dtype: torch.dtype) -> Loaded:
        """The tower; put on `device` as `dtype` when it is loaded."""
        if self._loaded is None:
            with self._lock:
                if self._loaded is None:
                    # Not under the caller's modes: inference tensors could never be used with autograd.
                    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
                        loaded = self._load()
                    loaded.module.eval().requires_grad_(False).to(device, dtype)
                    self._loaded = loaded
        return self._loaded

    def encode(self, tokens: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            kind = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"tokens must be the (B, length) integers that .tokenizer makes of texts, got {kind}")
        tower = self.load(device, dtype)
        if tokens.shape[1] != tower.context_length:
            raise ValueError(
                f"tokens must be {tower.context_length} a text, as .tokenizer makes them, got {tokens.shape[1]}"
            )
        # On a GPU an index out of range would end the process's CUDA context.
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < tower.vocab_size:
            raise ValueError(f"tokens must lie in 0…{tower.vocab_size - 1}: they are another adaptor's")
        where = next(tower.module.parameters()).device
        return self._encode(tower.module, tokens.to(where)).float()

    def apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
        """What `.to(…)`, `.half()` and the like do to the model the adaptor is in."""
        with self._lock:
            self.cache.clear()
            if self._loaded is not None:
                self._loaded.module._apply(fn, recurse)

    def _load_tokenizer(self) -> Callable[[list[str]], Tensor]:
        raise NotImplementedError

    def _load(self) -> Loaded:
        raise NotImplementedError

    def _encode(self, module: nn.Module, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def _import(self, package: str) -> ModuleType:
        try:
            return importlib.import_module(package)
        except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeErrors
            raise self._lacking(package, error) from error

    def _lacking(self, what: str, error: Exception) -> ImportError:
        return ImportError(
            f"text for adaptor {self.name!r} needs {what}: pip install 'radio_fast[{self.extra}]' ({error})"
        )

    def _unavailable(self, what: str, error: Exception | str) -> DownloadError:
        return DownloadError(
            f"the text half of adaptor {self.name!r} ({what}) is neither in Hugging Face's cache nor to be had. "
            f"Load it once with a connection, or copy the cache (HF_HOME); images work without it. {error}"
        )

    def _damaged(self, what: str, error: Exception | str) -> CheckpointError:
        return CheckpointError(f"the text half of adaptor {self.name!r} ({what}) can't be read: {error}")


class OpenClipText(TextTower):
    """A text tower of open_clip: a model it knows by name, and its tag of pretrained weights (or a file's path)."""

    extra = "clip"

    def _names(self) -> tuple[ModuleType, str, str]:
        """open_clip, the model and its weights. A checkpoint names them: no other repository or folder is followed."""
        open_clip = self._import("open_clip")
        model, pretrained = self.model, self.pretrained
        known = isinstance(model, str) and model.replace("/", "-") in open_clip.list_models()
        if not known:
            raise CheckpointError(
                f"adaptor {self.name!r}: open_clip {getattr(open_clip, '__version__', '')} has no model {model!r}; "
                f"open_clip.list_models() tells those it has, a newer one may have more"
            )
        model = model.replace("/", "-")
        if not isinstance(pretrained, str) or not (
            open_clip.is_pretrained_cfg(model, pretrained) or Path(pretrained).is_file()
        ):
            tags = ", ".join(map(repr, open_clip.list_pretrained_tags_by_model(model))) or "none"
            raise CheckpointError(
                f"adaptor {self.name!r}: open_clip has no weights {pretrained!r} for {model}; it has {tags}"
            )
        return open_clip, model, pretrained

    def _load_tokenizer(self) -> Callable[[list[str]], Tensor]:
        open_clip, model, _ = self._names()
        options = {}
        if open_clip.get_model_config(model)["text_cfg"].get("hf_tokenizer_name"):
            # The tokenizers' repositories need not have the config.json that Transformers would look for.
            options["config"] = self._import("transformers").PreTrainedConfig()
        try:
            return open_clip.get_tokenizer(model, **options)
        except ImportError as error:
            raise self._lacking("a package of its tokenizer", error) from error
        except Exception as error:  # what Transformers and huggingface_hub raise
            raise self._unavailable(f"the tokenizer of open_clip's {model}", error) from error

    def _load(self) -> Loaded:
        open_clip, model, pretrained = self._names()
        what = f"open_clip {model}, {pretrained}"
        path = pretrained
        if open_clip.is_pretrained_cfg(model, pretrained):
            try:
                path = open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, pretrained))
            except Exception as error:  # open_clip raises what urllib, huggingface_hub and itself do
                raise self._unavailable(what, error) from error
        try:
            # weights_only: of a pickle nothing but tensors and plain containers.
            module = open_clip.create_model(
                model, str(path), precision="fp32", device="cpu", weights_only=True, require_pretrained=True
            )
        except Exception as error:  # damaged zip, pickle and safetensors files each have errors of their own
            raise self._damaged(what, error) from error
        del module.visual  # RADIO is in its place
        bias = module.logit_bias
        scale = module.logit_scale.double().exp()
        return Loaded(
            module, module.context_length, module.vocab_size, scale.item(), None if bias is None else bias.item()
        )

    def _encode(self, module: nn.Module, tokens: Tensor) -> Tensor:
        return module.encode_text(tokens)


class Siglip2Text(TextTower):
    """A text tower of Transformers' SigLIP 2, from safetensors files only and without code from its repository."""

    extra = "siglip2"

    def _folder(self, needed: str) -> Path:
        """The repository's configuration, and its files of this name, in Hugging Face's cache."""
        if not isinstance(self.model, str) or self.model not in SIGLIP2_REPOS:
            known = ", ".join(map(repr, SIGLIP2_REPOS))
            raise CheckpointError(f"adaptor {self.name!r}: no SigLIP 2 text tower {self.model!r}; there are {known}")
        from huggingface_hub import snapshot_download

        repo = SIGLIP2_REPOS[self.model]
        try:
            folder = Path(snapshot_download(repo, allow_patterns=[needed, "*.json"]))
        except Exception as error:  # httpx's, huggingface_hub's and the disk's
            raise self._unavailable(repo, error) from error
        if not any(folder.glob(needed)):  # offline, a part of the repository counts as all of it
            raise self._unavailable(repo, f"{folder} has no {needed}")
        return folder

    def _load_tokenizer(self) -> Callable[[list[str]], Tensor]:
        transformers = self._import("transformers")
        folder = self._folder("tokenizer*")
        try:
            # Padded on the right, as SigLIP 2 was trained, whatever the tokenizer's class prefers.
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, padding_side="right"
            )
        except ImportError as error:
            raise self._lacking("a package of its tokenizer", error) from error
        except Exception as error:
            raise self._damaged(f"the tokenizer of {SIGLIP2_REPOS[self.model]}", error) from error

        def tokenize(texts: list[str]) -> Tensor:
            return tokenizer(
                [canonicalize(text) for text in texts],
                padding="max_length",
                max_length=SIGLIP2_LENGTH,
                truncation=True,
                return_tensors="pt",
            ).input_ids

        return tokenize

    def _load(self) -> Loaded:
        transformers = self._import("transformers")
        folder = self._folder("*.safetensors")
        what = SIGLIP2_REPOS[self.model]
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            # Released with one image size, SigLIP 2 has the first SigLIP's modules.
            kinds = {"siglip": transformers.SiglipModel, "siglip2": transformers.Siglip2Model}
            if config.model_type not in kinds:
                raise ValueError(f"it is of type {config.model_type!r}, not one of {', '.join(map(repr, kinds))}")
            # The image half is neither made nor read, but for the little around its blocks.
            config.vision_config.num_hidden_layers = 0
            kind = kinds[config.model_type]
            text_half = type(kind.__name__, (kind,), {"_keys_to_ignore_on_load_unexpected": [r"^vision_model\."]})
            module, info = text_half.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            missing = sorted(key for key in info["missing_keys"] if not key.startswith("vision_model."))
            if missing:
                raise ValueError(f"{missing[0]} is missing: it would run on random numbers")
        except Exception as error:
            raise self._damaged(what, error) from error
        del module.vision_model
        text = config.text_config
        length = min(SIGLIP2_LENGTH, text.max_position_embeddings)
        scale = module.logit_scale.double().exp()
        return Loaded(module, length, text.vocab_size, scale.item(), module.logit_bias.item())

    def _encode(self, module: nn.Module, tokens: Tensor) -> Tensor:
        # Without a mask, as trained: the padding is attended to, and pooled.
        return module.text_model(input_ids=tokens).pooler_output


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str) -> str:
    """A text as SigLIP 2 was trained on: underscores to spaces, no punctuation, lower case, single spaces."""
    return " ".join(text.replace("_", " ").translate(_PUNCTUATION).lower().split())


_TOWERS = {"open_clip": OpenClipText, "siglip2": Siglip2Text}


def text_tower(teacher: Mapping[str, Any]) -> TextTower | None:
    """The text tower of a teacher, by its entry in the checkpoint's args; None where its type has none.

    What the entry says is checked at the first use: the image half does not depend on it.
    """
    kind = teacher.get("type")
    tower = _TOWERS.get(kind) if isinstance(kind, str) else None
    return tower and tower(teacher["name"], teacher.get("model"), teacher.get("pretrained"))


def normalized(x: Tensor) -> Tensor:
    """x / |x|, along the last axis."""
    return F.normalize(x, dim=-1)
