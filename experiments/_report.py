"""docs/reproduction.md: one line per experiment, then every recorded row; made from results/*.json.

A line of the summary needs a claim in words, which no record holds. `SUMMARIES` has it, together
with plain words for how the run differs from the paper. Both describe one recorded run, named by
its commit. For a run of another commit, the record's own words are printed instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ._catalog import families, minutes
from ._rows import number, plain


class Summary(NamedTuple):
    """What one recorded run shows, in words."""

    commit: str  # of the record that the words describe
    claim: str
    measured: str  # what the numbers of the summary are, with their unit
    quantities: tuple[str, ...]  # the rows that hold these numbers
    differs: str  # how the run differs from the paper, in sentences


NANOGPT, RING = "nanoGPT's configuration", "fig. 1a, 8 Gaussians"
SCORE = "the best head's prefix-matching score"

SUMMARIES = {
    "cgan_mnist": Summary(
        "a77bd71ea777",
        "Samples belong to the class that was asked for.",
        "class accuracy of the samples (%)",
        ("class accuracy of the samples (%, our classifier)",),
        "Trained on 3e6 images with Adam instead of SGD. The generator is averaged. "
        "The noise is N(0, I) instead of uniform: with uniform noise D won and G collapsed. "
        "The nets have the widths of the 2014 GAN, with the label beside the input; "
        "the paper has separate first layers for label and input. No early stopping.",
    ),
    "contrastive_exact": Summary(
        "6522b1becf09",
        "InfoNCE stays below the mutual information and below ln K, also with the best critic.",
        "best critic's bound at I = 8 for batches of 16, 64, 256 (nats; ln K: 2.77, 4.16, 5.55)",
        tuple(
            f"best critic, I = 8, K = {K}: bound (nats; +- s.e. over batches)"
            for K in (16, 64, 256)
        ),
        "Correlated Gaussians of 20 dimensions, as in Poole et al. 2019; CPC has no such table.",
    ),
    "cycle_emoji": Summary(
        "301187a0d1c5",
        "The identity term keeps what an emoji shows. Its translations are as easy to recognise "
        "as the given pictures, not easier.",
        "R@1 of translations minus that of the given pictures (%): to Twitter, to Google",
        tuple(
            f"identity, {way}: R@1 minus that of the pictures, not translated (%)"
            for way in ("to Twitter", "to Google")
        ),
        "Emoji of 32 x 32; the paper has photographs of 256 x 256. Narrower nets, 4 blocks instead "
        "of 9, patches of 16 x 16 instead of 70 x 70, batches of 4 instead of 1. 10,000 updates.",
    ),
    "cycle_toys": Summary(
        "0832d3ea71d4",
        "A closed cycle does not say which mode belongs to which.",
        "points that come to their own mode (%): with the cycle term, with true pairs",
        tuple(
            f"{arm}: points that come to their own mode of B (%; +- s.e. over seeds; chance: 12.5)"
            for arm in ("cycle", "true pairs")
        ),
        "8 Gaussians on a ring, turned and enlarged, with MLPs; the paper has photographs.",
    ),
    "dcgan_arithmetic": Summary(
        "301187a0d1c5",
        "After 8 epochs, latents add up to a bold digit of the right class more often than pixels "
        "do, but in a quarter of the cases only.",
        "bold samples of class b (%): sum of latents, sum of pixels",
        (
            "bold a - thin a + thin b: bold samples of class b (%; oracle: mean of bold b)",
            "bold a - thin a + thin b, in pixels: bold samples of class b (%)",
        ),
        "MNIST; the paper has faces for the arithmetic, rooms for the walks and MNIST for table 3. "
        "Small nets, 3,000 updates of 128 images for the DCGANs and 12,000 for the MLP, one seed.",
    ),
    "ddim_steps": Summary(
        "d0aeabbc31a6",
        "With few steps, DDIM at any eta is better than the larger noise sigma-hat.",
        "smallest ratio of fid_digits, sigma-hat over DDIM, at most 20 steps",
        ("digits: least fid_digits of sigma-hat over any eta's, S <= 20 (ratio)",),
        "The data are a grid of normals with its exact denoiser, and 8x8 digits with T = 100; "
        "the paper has CIFAR-10 and CelebA with T = 1000. "
        "With an exact denoiser, any deviation from 98.9 % is caused by the sampler.",
    ),
    "ddpm_digits": Summary(
        "d0aeabbc31a6",
        "A diffusion model codes digits in fewer bits than the histogram of each pixel does.",
        "bound on test digits, and that histogram (bits per dim)",
        (
            "bound on test, given the label (bits per dim)",
            "histogram of each pixel, test (bits per dim)",
        ),
        "The data set and the network are ours: DDPM has no 8x8 digits.",
    ),
    "ddpm_fashion": Summary(
        "af8ace8e5f91",
        "Samples belong to the class that was asked for, more often with guidance.",
        "class accuracy without and with guidance w = 1 (%)",
        (
            "w = 0: class accuracy of the samples (%, our classifier)",
            "w = 1: class accuracy of the samples (%, our classifier)",
        ),
        "The data set and the network are ours: DDPM has no Fashion-MNIST. "
        "The model has a cosine schedule, predicts v, learns its variances and takes labels.",
    ),
    "ddpm_objectives": Summary(
        "af8ace8e5f91",
        "Predicting eps with the simple loss gives the best samples.",
        "fid_digits of the next best of the paper's arms minus that of eps, simple",
        ("fid_digits: least of the paper's other arms less eps, simple",),
        "8x8 digits with T = 200, 0.7 million parameters and 2,000 updates of 64; "
        "the paper has CIFAR-10 with T = 1000, 35.7 million parameters and 800,000 updates of 128.",
    ),
    "decoding": Summary(
        "f01ff03a1928",
        "Greedy text repeats itself; sampled text does not.",
        "repetition of greedy text and of pure samples (%)",
        ("greedy: repetition (%)", "pure: repetition (%)"),
        "A character model of 1.8 million parameters on Tiny Shakespeare; the paper has GPT-2 "
        "Large on "
        "WebText. 100 texts (paper: 5,000). Top-k takes k = 5 and 20 (paper: 40 and 640). "
        "Stochastic beam search and HUSE are left out.",
    ),
    "emoji_autoencoder": Summary(
        "dc97a9d8d2e6",
        "Latents of 8x8x4 keep more of an unseen emoji than 256 principal components do.",
        "PSNR on unseen emoji: autoencoder, 256 components (dB)",
        (
            "KL: PSNR, unseen (dB, mean over pictures)",
            "256 principal components: PSNR, unseen (dB, mean over pictures)",
        ),
        "Emoji of 32x32 (paper: photographs of 256x256). The net begins at 16x16 and has no "
        "attention. The likelihood is Gaussian, without perceptual and adversarial losses.",
    ),
    "emoji_clip": Summary(
        "823cb3c8d5dc",
        "Retrieval works for emoji in skin tones that training lacks for them.",
        "R@1 of captions and of pictures among 308 (%; chance 0.3)",
        (
            "info_nce: R@1 of captions by picture, test (%; oracle: chance)",
            "info_nce: R@1 of pictures by caption, test (%; oracle: chance)",
        ),
        "2,748 emoji and a small convolutional net (paper: 400 million pictures, a ResNet or ViT).",
    ),
    "gan_digits": Summary(
        "dca5c79eced8",
        "A conditional GAN covers held-out digits nearly as well as training digits do.",
        "coverage",
        ("coverage (k=5); oracle: training images",),
        "The data set and the network are ours: no paper has GANs on 8x8 digits.",
    ),
    "gan_mnist": Summary(
        "5e794bf96ba4",
        "Samples are not copies of training images.",
        "distance to the nearest training image, relative to test images",
        ("median distance of a sample to its nearest training image, over that of test images",),
        "3e6 images (the authors' code: 1.25e7), Adam instead of SGD, averaged generator.",
    ),
    "gan_recipe": Summary(
        "301187a0d1c5",
        "Averaging G's weights helps most. Three of eight runs end below -100 nats. The longest "
        "one draws only the digit 1.",
        "change of the Parzen log-likelihood (nats): average of G, uniform latents, all three",
        tuple(
            f"{arm} minus parzen_table's recipe, after the same updates (nats)"
            for arm in ("average of G", "uniform latents", "all three")
        ),
        "15,000 updates per detail and one seed; the authors train for 125,000 in their 250 "
        "epochs. The whole schedule is run through in 75,000 updates instead of 2.9 million.",
    ),
    "gpt2": Summary(
        "09536cf947eb",
        "Our model has exactly the parameters of GPT-2.",
        "parameters of the smallest model",
        ("gpt2: parameters",),
        "The text that is scored is not the paper's. "
        "Without `--weights FOLDER` only the parameters are counted, as in this run.",
    ),
    "grokking": Summary(
        "09536cf947eb",
        "Unseen equations are solved long after the training equations are memorised.",
        "updates in between, trained on 0.3 of the equations",
        ("0.3 of the equations: updates from there until 99 % of the others are right",),
        "Addition (figure 1: division), weight decay 1 (figure 1: none), 5,000 updates.",
    ),
    "guidance": Summary(
        "d0aeabbc31a6",
        "Strong guidance costs diversity.",
        "fid_digits at w = 4 over that at w = 0",
        ("digits: fid_digits at w = 4 over that at w = 0",),
        "The data are normals with exact scores, and 8x8 digits measured by our classifier; "
        "the paper has ImageNet measured by Inception.",
    ),
    "heartbeat_and_swiss_roll": Summary(
        "dca5c79eced8",
        "The bound of the heartbeat comes close to its known value, -2.322 bits.",
        "lower bound on log2 p of the heartbeat (bits per sequence)",
        ("heartbeat: K, a lower bound on log2 p (bits a sequence; +- s.e.)",),
        "Heartbeat: 200 steps (paper: 2000). The net predicts x_0 and takes the time as an input; "
        "the paper predicts x_{t-1} with one readout per step. SiLU and Adam replace sigmoids and "
        "SFO. "
        "The levels are cosine instead of 1 / (T - t + 1). "
        "Swiss roll: an MLP with layers of 128 instead of a net of 16 radial units. "
        "The roll's width and noise levels are our choice.",
    ),
    "in_context_regression": Summary(
        "09536cf947eb",
        "The net matches least squares up to 3 examples, but not at 5 in 5 dimensions.",
        "largest difference from least squares (of the variance)",
        ("largest |error - least squares| for k <= d (of the variance)",),
        "5 dimensions (paper: 20), the authors' `tiny` net of 3 layers and width 64 (paper: 12 "
        "and 256), "
        "30,000 updates at 1e-3 with decay (paper: 500,001 at 1e-4).",
    ),
    "induction_heads": Summary(
        "37815c2b7801",
        "Two layers learn to copy suddenly; one layer never does.",
        "share of training in which the best head's score jumps (%)",
        (f"2 layers: share of training in which {SCORE} goes from < .1 to > .5 (%)",),
        "Synthetic sequences of 100 symbols (the paper: text), width 64. "
        "The score is the attention weight on the symbols that followed any earlier copy.",
    ),
    "iwae_longer": Summary(
        "cc9868afed76",
        "One stochastic layer comes within 0.1 nats of the paper in a quarter of its epochs.",
        "NLL on all test images, k = 1 (nats)",
        ("1 layer, VAE k=1, 800 epochs: NLL (nats)",),
        "800 epochs (paper: 3,280) with batches of 100 (paper: 20). "
        "The rate has one cosine decay from 3e-3 after 600 updates of warm-up, instead of the "
        "staircase. "
        "The KL term has 6,000 updates of warm-up. "
        "Flax's initialisation; no bias is set from pixel means.",
    ),
    "iwae_table": Summary(
        "521d17492116",
        "At equal epochs, more importance samples give a better bound.",
        "NLL of k = 1 minus that of k = 50, 25 epochs (nats)",
        ("equal epochs: NLL of k=1 less that of the largest k (nats; +- s.e. over images)",),
        "Each row names its epochs; batches of 100. "
        "The rate has one cosine decay from 3e-3 after 600 updates of warm-up, instead of the "
        "staircase. "
        "The KL term has 6,000 updates of warm-up. "
        "Three seeds for VAE k=1 and IWAE k=5 at 25 epochs, one for the rest. "
        "Table 2 goes on for 10 epochs at 3e-4. Measured on the first 1,000 test images (+- 0.8 "
        "nats). "
        "Flax's initialisation; no bias is set from pixel means. "
        "Other work shared the two cores, so the minutes are upper bounds.",
    ),
    "jsb_chorales": Summary(
        "f01ff03a1928",
        "A small transformer predicts Bach's chorales better than the paper's GRU and LSTM.",
        "test loss (nats per frame)",
        ("test (nats per frame; +- s.e. over seeds)",),
        "A transformer of 0.6 million parameters, trained on batches of 16 pieces. "
        "The paper's TCN has 0.3 million parameters and sees one piece at a time.",
    ),
    "language_models": Summary(
        "6522b1becf09",
        "The LSTM is better than every n-gram, the transformer by 0.02 bits better than the LSTM. "
        "The GRU is best, 0.014 bits ahead of the transformer.",
        "bits per character on Shakespeare: Kneser-Ney 5-gram, LSTM, transformer",
        tuple(
            f"tiny_shakespeare: {model} (bits per character)"
            for model in ("Kneser-Ney 5-gram", "lstm", "transformer")
        ),
        "Characters of Tiny Shakespeare and of Python's source; the papers have words of other "
        "texts. Nets of 0.8 million parameters see 2,000 updates of 32 x 128 characters under "
        "Adam. Weights are not averaged, and there is no dropout.",
    ),
    "markov_text": Summary(
        "6522b1becf09",
        "With an exact posterior the bound of token diffusion is the entropy.",
        "bound minus entropy, absorbing: exact posterior and trained network (nats)",
        (
            "absorbing, exact posterior: bound in continuous time minus the entropy (nats)",
            "absorbing, trained: bound minus entropy (nats)",
        ),
        "A Markov chain of three states, length 8; D3PM and MD4 have text8.",
    ),
    "mode_collapse": Summary(
        "301187a0d1c5",
        "Samples are as near to the modes as the paper's. In this one seed, Pac4 finds more modes "
        "than the plain GAN, and Pac2 fewer.",
        "modes of the grid after 100,000 updates: plain, Pac2, Pac4",
        tuple(f"grid, {arm}: modes of 25" for arm in ("plain", "Pac2", "Pac4")),
        "One seed; the paper has ten. Arms are compared after 100,000 updates, on the ring after "
        "25,000. Plain and Pac2 go on to 400,000 on the grid. Points are packed anew in every "
        "epoch; the authors draw 100,000 packs once. D and G see different noise. BatchNorm's "
        "running averages are of variances with momentum 0.9; theirs are of standard deviations "
        "with 0.95. The arms were trained at once on one GPU.",
    ),
    "parzen_table": Summary(
        "adbd38df3490",
        "Below the paper's score, which rates k-means centroids above real images.",
        "Parzen log-likelihood of the SGD arm (nats)",
        ("GAN, SGD, 12500000 images: Parzen log-likelihood (nats; +- s.e. over test)",),
        "The SGD arm has the authors' nets, dropout, schedule, 250 epochs and test. "
        "It updates D before G, not both at once. Its latents are N(0, I) instead of uniform. "
        "G's last biases start at 0 instead of the log odds of the mean image; "
        "with those, ours collapsed (-334 nats after 250 epochs). "
        "Which checkpoint the authors scored is unknown. "
        "The Adam arm is ours. k-means has 2,000 centroids.",
    ),
    "ppca_exact": Summary(
        "34fc286e7dd4",
        "With the exact posterior, every importance weight equals log p(x).",
        "largest difference (nats)",
        ("exact posterior: largest |log weight - log p(x)| (nats)",),
        "Exact mathematics; there is no paper's protocol.",
    ),
    "progressive": Summary(
        "d0aeabbc31a6",
        "Most bits come in the last tenth of the steps.",
        "share of the bits in the last tenth (%)",
        ("share of the bits that the last tenth of the steps takes (%)",),
        "8x8 digits of 17 levels with T = 100 (paper: CIFAR-10 with T = 1000). "
        "The label is given to the net in every part, except for interpolation.",
    ),
    "schedules": Summary(
        "0727dc0e49b2",
        "Drawing t by importance makes the loss of the bound far less noisy.",
        "variance of the loss, t uniform over t by importance",
        ("variance of the bound's loss over batches, t uniform over t by importance, same net",),
        "8x8 digits with T = 200, 0.7 million parameters and 2,000 updates of 64; "
        "the paper has CIFAR-10 with T = 4000 and 500,000 updates of 128.",
    ),
    "shakespeare_char": Summary(
        "f01ff03a1928",
        "nanoGPT's configuration for CPUs reaches the loss that its README gives, within 0.04.",
        "validation loss on random crops (nats per character)",
        (f"{NANOGPT}: validation, random crops (nats per character; +- s.e. over seeds)",),
        "nanoGPT's configuration for CPUs, as its README has it, with GELU in its tanh form. "
        "Scored on 200 batches of crops (nanoGPT: 20). The second model is ours.",
    ),
    "tang_poems": Summary(
        "15dbcb9635d8",
        "The autoregressive model learns the form of the poems, the masked one less well. Neither "
        "learns to rhyme.",
        "well-formed samples (%): autoregressive, masked",
        tuple(f"{model}: well-formed samples (%)" for model in ("autoregressive", "masked")),
        "Our own set: no paper has numbers for it.",
    ),
    "text_diffusion": Summary(
        "fbd71a4a2e17",
        "Masked diffusion learns slowly: its gap to the autoregressive model is more than twice "
        "what we asked for. It is better than the uniform process only with flat weights.",
        "bits per character: autoregressive, absorbing, uniform",
        tuple(
            f"{model}: held-out text (bits per character; +- s.e. over seeds)"
            for model in ("autoregressive", "absorbing", "uniform")
        ),
        "Tiny Shakespeare instead of text8, nets of 0.16 million parameters. "
        "The absorbing model trains with flat weights, the uniform one on the bound. "
        "The record is of commit fbd71a4a2e17, which compares the two with equal losses for one "
        "seed only; docs/measured.md has three.",
    ),
    "text_to_image": Summary(
        "cb5a9bb3ce23",
        "A caption gives its emoji in a skin tone that training lacks for it.",
        "right skin tone, and the asked picture is the nearest of all 3,786 (%)",
        (
            "skin tone of samples for test captions (%; oracle: true test pictures)",
            "R@1 of samples for test captions among all true pictures (%; oracle: chance)",
        ),
        "2,748 emoji of 32x32 and their names (paper: 400 million pictures of 256x256). "
        "The text net is that of our own CLIP.",
    ),
    "transformer_text": Summary(
        "09536cf947eb",
        "A small model predicts Python's source better than any n-gram up to 6.",
        "best n-gram minus the model (nats per character)",
        ("best n-gram less the model (nats per character)",),
        "The data set is ours: no paper has numbers for it.",
    ),
    "unet_or_dit": Summary(
        "0727dc0e49b2",
        "At equal size, a U-Net has a better bound than a DiT.",
        "bounds of U-Net and DiT on test digits (bits per dim)",
        (
            "U-Net: bound on test, given the label (bits per dim)",
            "DiT: bound on test, given the label (bits per dim)",
        ),
        "8x8 digits and 0.7 million parameters (paper: ImageNet, 33 to 675 million). "
        "Both nets have the U-Net's learning rate. Its decay is cut off after 2,000 of 2,500 "
        "updates.",
    ),
    "loss_zoo": Summary(
        "301187a0d1c5",
        "Penalties on gradients save five to seven of ten random networks, where plain losses save "
        "none or one. WGAN-GP's loss tells the quality of samples.",
        "networks that succeed by WGAN-GP alone minus by the first GAN's loss alone",
        ("digits: networks that succeed by WGAN-GP alone minus by the non-saturating loss alone",),
        "10 MLPs on digits of 8x8 for 200 networks on ImageNet of 32x32; our classifier for "
        "Inception.",
    ),
    "unrolled_gan": Summary(
        "301187a0d1c5",
        "Three seeds do not tell the two apart: the unrolled GAN ends with 8, 7 and 7 modes, the "
        "plain one with 2, 8 and 8.",
        "modes: unrolled minus plain",
        ("modes: unrolled minus plain (+- s.e. over seeds)",),
        "8 distinct modes; the demonstration's code has 7, one of them twice. D and G see different "
        "points and noise. Adam adds 1e-16 inside the root.",
    ),
    "vae_digits": Summary(
        "dca5c79eced8",
        "A VAE has a lower negative bound on digits than a model without latents.",
        "negative bound, and the per-pixel marginal (nats)",
        (
            "negative bound, test (nats, -ELBO; +- s.e. over seeds)",
            "per-pixel marginal, test (nats)",
        ),
        "The data set and the network are ours: AEVB has no 8x8 digits. Run with `--seeds 5`.",
    ),
    "vae_elbo_curves": Summary(
        "aa60e4867a12",
        "AEVB has a better bound than wake-sleep at every latent size.",
        "smallest lead (nats)",
        ("AEVB ahead of wake-sleep, smallest lead over the sizes (nats, test)",),
        "2e6 images per arm (paper: 1e8), Adam instead of Adagrad, no prior on the weights, "
        "Flax's initialisation. Binarisation is dynamic; the paper does not say.",
    ),
    "vae_manifold": Summary(
        "dca5c79eced8",
        "Two latents learn a smooth map of the digits.",
        "bound below the per-pixel marginal (nats)",
        ("negative bound, test: below the per-pixel marginal (nats)",),
        "2.4e6 images, Adam instead of Adagrad, no weight decay, grey-level targets. "
        "The weights are initialised as Flax does it.",
    ),
    "vae_samples": Summary(
        "aa60e4867a12",
        "With more latent dimensions the bound improves, but fewer samples look like digits.",
        "smallest gain from one size to the next (nats)",
        ("smallest gain of the bound from one size to the next (nats, test)",),
        "2.4e6 images per size, Adam instead of Adagrad, no prior on the weights, Flax's "
        "initialisation. "
        "Targets are grey levels.",
    ),
    "vdm_invariance": Summary(
        "af8ace8e5f91",
        "The bound in continuous time depends on a schedule only through its ends.",
        "largest difference between two schedules (nats)",
        ("grid: largest difference between two schedules (nats)",),
        "The data are a grid of normals with its exact denoiser, and 8x8 digits; "
        "the paper has CIFAR-10 and 31 residual blocks of 128.",
    ),
    "wgan_gp_samples": Summary(
        "301187a0d1c5",
        "WGAN-GP finds all modes. After a tenth of the authors' updates, more than half of the "
        "samples of both mixtures are not near a mode.",
        "HQ samples (%): 8 Gaussians, 25 Gaussians, swiss roll",
        tuple(f"{name}: HQ samples (%)" for name in ("8 Gaussians", "25 Gaussians", "swiss roll")),
        "10,000 updates of G instead of 100,000. Fresh points instead of 100,000 fixed ones of 25 "
        "Gaussians. First weights are truncated normals of the same variance as the authors' "
        "uniform ones.",
    ),
    "wgan_gp_toys": Summary(
        "dca5c79eced8",
        "A critic with a gradient penalty comes close to the Wasserstein distance.",
        "its estimate over the exact distance, 8 Gaussians",
        (f"{RING}: the penalty's E D(real) - E D(fake) over the Wasserstein distance",),
        "5,000 critic updates of width 256. "
        "The authors' code has width 512 and 5 critic updates for each of 100,000 of the "
        "generator. "
        "Figure 1b has width 128 after 2,000 updates; its generator is fixed as in figure 1a.",
    ),
}

HEADS = {
    "vae": "Variational autoencoders",
    "gan": "GANs",
    "ddpm": "Diffusion models",
    "transformer": "Transformers",
    "language": "Language models before the transformer",
    "contrastive": "Contrastive models",
    "several": "Several families",
}

INTRODUCTION = """\
# What was reproduced

This page is made by `python -m experiments table` from `results/*.json`. Do not edit it.

How to read it:

- *Paper* is the number that the paper gives, *ours* the one that we measured. A dash means none.
- *+-* is a standard error; the quantity says over what. A dash means that none was estimated.
- *Oracle* is the value that exact mathematics gives, or that real data get in place of samples.
- *Verdict* compares ours with a criterion that was committed before the run. A row without a
  criterion only informs. A criterion that is not met stays in the table.
- Scale *cpu* shows the effect of the paper at reduced scale. Only scale *paper* follows a
  published protocol. Each entry says how it differs from the paper.
- Minutes are those of the recorded run on 2 CPU cores, or on an NVIDIA H100 where it says GPU. A
  `+` means that the run continued an earlier one, whose time is not counted. A dash means that it
  only measured what earlier processes had trained.
- Numbers have four digits; `results/NAME.json` has all of them.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def verdicts(rows: list[dict]) -> str:
    """How many of a record's criteria are met."""
    judged = [plain(row["verdict"]) for row in rows if row["verdict"]]
    met = sum(verdict.startswith("met") for verdict in judged)
    if not judged:
        return "no criterion"
    if len(judged) == 1:
        return "met" if met else "not met"
    return f"{'all' if met == len(judged) else f'{met} of'} {len(judged)} met"


def _line(record: dict, minutes: str) -> str:
    """The line of the summary: claim, paper's number, ours, verdict, minutes."""
    summary, rows = SUMMARIES.get(record["name"]), {row["quantity"]: row for row in record["rows"]}
    if not summary or summary.commit != record["commit"]:
        judged = [row for row in record["rows"] if row["verdict"]] or record["rows"]
        headline = judged[0]["quantity"]
        summary = Summary("", record["title"], plain(headline), (headline,), "")
    found = [rows[quantity] for quantity in summary.quantities]
    papers = [number(row["paper"]) for row in found]
    cells = (
        f"[`{record['name']}`](#{record['name']})",
        summary.claim,
        summary.measured,
        "-" if set(papers) == {"-"} else ", ".join(papers),
        ", ".join(number(row["ours"]) for row in found),
        verdicts(record["rows"]),
        minutes,
    )
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _entry(record: dict) -> list[str]:
    """The long part: the title, how the run was made, and all rows."""
    summary, e = SUMMARIES.get(record["name"]), record["environment"]
    described = summary is not None and summary.commit == record["commit"]
    differs = summary.differs if described else f"{record['difference'] or 'Nothing'}."
    lines = [
        f"### {record['name']}",
        "",
        f"{record['title']}.",
        "",
        f"- Command: `{record['command']}`",
        f"- Scale {record['scale']}. Differences from the paper: {differs}",
        f"- {'Data: ' + record['data'] + '. ' if record['data'] else ''}Seeds: {record['seeds']}. "
        f"Commit {record['commit']}. "
        f"{record['seconds']:g} s{' (continued)' if record['continued'] else ''} "
        f"on {e['device']}, {e['cores']} cores; jax {e['jax']}.",
        "",
        "| quantity | paper | ours | +- | oracle | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        numbers = (number(row[key]) for key in ("paper", "ours", "error", "oracle"))
        cells = (plain(row["quantity"]), *numbers, plain(row["verdict"]))
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return lines


def page(results: Path) -> str:
    """The whole of docs/reproduction.md."""
    groups: dict[str, list[dict]] = {family: [] for family in HEADS}
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text())
        found = families(record["name"])
        groups[next(iter(found)) if len(found) == 1 else "several"].append(record)
    groups = {family: records for family, records in groups.items() if records}
    lines = [INTRODUCTION, "## One line per experiment"]
    for family, records in groups.items():
        lines += [
            "",
            f"**{HEADS[family]}**",
            "",
            "| experiment | claim | measured | paper | ours | criteria | minutes |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(_line(record, minutes(record["name"])) for record in records),
        ]
    for family, records in groups.items():
        lines += ["", f"## {HEADS[family]}"]
        for record in records:
            lines += ["", *_entry(record)]
    return "\n".join(lines) + "\n"
