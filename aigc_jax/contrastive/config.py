"""The config of a contrastive model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core import EMA, Optim, Optimizer, check_at_least, check_data, check_fields


@dataclass(frozen=True)
class TextConfig:
    """The text net: a transformer in which every token sees every other."""

    vocab: int = 1024  # tokens lie in 0..vocab-1; 0 is padding
    context: int = 32  # largest number of tokens of a caption
    width: int = 128
    layers: int = 2
    heads: int = 4

    def __post_init__(self):
        check_fields(self, name="model.text")
        check_at_least(self, 2, "vocab", name="model.text")
        check_at_least(self, 1, "context", "width", "heads", name="model.text")
        check_at_least(self, 0, "layers", name="model.text")
        if self.width % self.heads:
            got = f"got {self.width} and {self.heads}"
            raise ValueError(f"model.text.width must divide into model.text.heads, {got}")


@dataclass(frozen=True)
class ImageConfig:
    """The image net: a residual network, then a linear layer that reads all of its last pixels."""

    widths: tuple[int, ...] = (32, 64, 128)  # channels at H/2, H/4, ...
    blocks: int = 1  # residual blocks per width
    groups: int = 8  # of GroupNorm
    shift: int = 0  # in training, pictures move by up to this many pixels along both axes

    def __post_init__(self):
        check_fields(self, name="model.image")
        check_at_least(self, 1, "groups", name="model.image")
        check_at_least(self, 0, "blocks", "shift", name="model.image")
        if not self.widths or any(w < 1 or w % self.groups for w in self.widths):
            got = f"got {self.widths} and {self.groups}"
            raise ValueError(f"model.image.widths must be multiples of model.image.groups, {got}")


@dataclass(frozen=True)
class Config:
    """A contrastive model: its data, two nets, loss and optimizer.

    There are no micro-batches: a part of the batch would have fewer negatives. `remat` saves memory
    instead. Raises ValueError, which names the field and its value, for a model that cannot work.
    """

    shape: tuple[int, int, int] = (32, 32, 3)  # H, W, C
    levels: int = 256  # pixels are whole numbers in 0..levels-1
    dim: int = 64  # length of the features that are compared
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()
    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    scale: float | None = None  # first logit scale; None: 1 / 0.07 (CLIP), or 10 (SigLIP)
    bias: float = -10.0  # sigmoid: first bias of the logits
    bfloat16: bool = False  # both nets in bfloat16; features and loss in float32
    # Recompute blocks in the backward pass: less memory, more work. "dots" keeps the products.
    remat: bool | Literal["dots"] = False
    ema: float = 0.0  # decay of the average of the parameters; 0: no average
    optim: Optimizer = Optim()

    def __post_init__(self):
        check_fields(self)
        check_at_least(self, 1, "dim")
        if len(self.shape) != 3 or min(self.shape) < 1:
            hint = "must be three positive numbers (H, W, C)"
            raise ValueError(f"model.shape {hint}, got {self.shape}")
        if not 2 <= self.levels <= 256:
            raise ValueError(f"model.levels must lie in 2..256, got {self.levels}")
        if self.scale is not None and not 0 < self.scale <= 100:
            raise ValueError(f"model.scale must lie in (0, 100], got {self.scale}")
        if self.image.shift >= min(self.shape[:2]):
            got = f"got {self.image.shift} for {self.shape[0]} x {self.shape[1]} pixels"
            raise ValueError(f"model.image.shift must be smaller than the picture, {got}")
        EMA(self.ema)  # raises ValueError for a decay outside [0, 1)

    def check(self, info) -> None:
        """Raises ValueError if the data that `info` (a `data.Info`) describes does not fit."""
        if info.kind != "image" or info.caption_length is None:
            got = f"{info.kind}{' without captions' * (info.kind == 'image')}"
            hint = "takes pictures with captions"
            raise ValueError(f"a contrastive model {hint}, this data set holds {got}")
        check_data(self, info)
        context, vocab = self.text.context, self.text.vocab
        if info.caption_length > context:
            got = f"the captions have {info.caption_length} tokens"
            raise ValueError(f"model.text.context is {context}, {got}")
        if info.caption_vocab > vocab:
            got = f"the captions have a vocabulary of {info.caption_vocab}"
            raise ValueError(f"model.text.vocab is {vocab}, {got}")
