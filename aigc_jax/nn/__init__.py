"""Networks as Flax modules, for every family: none of them knows a family's Config.

blocks.py      norms, activations, layers that change the resolution
embeddings.py  sinusoids, time and label as one vector, rotary positions, adaLN-Zero
attention.py   one Attention: causal or not, with or without a cache, over the input or a context
mlp.py         one MLP, and the nets for points that are made of it
conv.py        generators and discriminators of DCGAN and SNGAN
resnet.py      a residual network that reads a picture
unet.py        the U-Net of DDPM
autoencoder.py the encoder and decoder of latent diffusion's first stage
translation.py the generator and the patch discriminator of CycleGAN
style.py       the generator and the discriminator of StyleGAN2
transformer.py the transformer block and the decoder trunk
dit.py         a transformer over patches
sharding.py    what a mesh splits of these nets

Every net has `dtype` (of activations; parameters are float32). All but PatchDiscriminator and the
nets of StyleGAN2 have `remat`: True recomputes blocks in the backward pass (less memory, about a
third more work), "dots" keeps their products. Outputs are float32; those of MLP, Block and Decoder
have `dtype`. Dropout is on where the caller passes an rng named dropout.
"""

from .attention import Attention
from .autoencoder import ImageDecoder, ImageEncoder
from .blocks import GroupNorm, Norm, NormAct, instance_norm, pixel_shuffle, pixel_unshuffle
from .conv import ConvDiscriminator, ConvGenerator
from .dit import DiT
from .embeddings import Condition, adaln_zero, modulate, rotate, sinusoids
from .mlp import MLP, MLPDiscriminator, MLPGenerator, TimeMLP
from .resnet import ResNet
from .style import StyleDiscriminator, StyleGenerator
from .transformer import Block, Decoder, causal
from .translation import ImageTranslator, PatchDiscriminator
from .unet import ContextAttention, PixelAttention, ResBlock, UNet

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Condition",
    "ContextAttention",
    "ConvDiscriminator",
    "ConvGenerator",
    "Decoder",
    "DiT",
    "GroupNorm",
    "ImageDecoder",
    "ImageEncoder",
    "ImageTranslator",
    "MLPDiscriminator",
    "MLPGenerator",
    "Norm",
    "NormAct",
    "PatchDiscriminator",
    "PixelAttention",
    "ResBlock",
    "ResNet",
    "StyleDiscriminator",
    "StyleGenerator",
    "TimeMLP",
    "UNet",
    "adaln_zero",
    "causal",
    "instance_norm",
    "modulate",
    "pixel_shuffle",
    "pixel_unshuffle",
    "rotate",
    "sinusoids",
]
