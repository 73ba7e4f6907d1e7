"""What the script on emoji measures besides training, against independent mathematics."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aigc_jax import metrics, vae
from aigc_jax.vae import autoencoder
from experiments import _criteria, emoji_autoencoder

CFG = vae.AutoencoderConfig(
    shape=(4, 4, 3), latent_channels=2, widths=(4,), blocks=0, groups=2, patch=2
)


def pictures(n, seed=0):
    return np.random.default_rng(seed).random((n, 4, 4, 3), np.float32)


def test_psnr_is_a_mean_of_logarithms_over_images():
    a = np.zeros((2, 4, 4, 3))
    b = a.copy()
    b[0] += 0.1  # 20 dB
    b[1, :2] += 0.2  # mean squared error 0.02
    expected = (20 - 10 * np.log10(0.02)) / 2
    assert metrics.psnr(a, b) == pytest.approx(expected, rel=1e-12)
    assert metrics.psnr(a, b) == metrics.psnr(b, a)
    assert metrics.psnr(a, a) == 100  # at most
    with pytest.raises(ValueError, match="image by image, got 2 and 1 images"):
        metrics.psnr(a, b[:1])
    with pytest.raises(ValueError, match="equally wide"):
        metrics.psnr(a, b[:, :2])


def test_principal_components_are_those_of_a_singular_value_decomposition():
    x = {split: pictures(n, n) for split, n in (("train", 40), ("test", 7), ("unseen", 9))}
    setup = replace(emoji_autoencoder.SMOKE, components=(3, 20))
    rows = {row.quantity: row.ours for row in emoji_autoencoder.components(setup, x)}
    flat = x["train"].reshape(40, -1).astype(float)
    _, _, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    for split in ("test", "unseen"):
        for k in (3, 20):
            y = x[split].reshape(len(x[split]), -1) - flat.mean(0)
            y_hat = np.clip(flat.mean(0) + y @ axes[:k].T @ axes[:k], 0, 1)
            mse = np.square(x[split].reshape(len(y), -1) - y_hat).mean(1)
            name = f"{k} principal components: PSNR, {split} (dB, mean over pictures)"
            assert rows[name] == pytest.approx(float(-10 * np.log10(mse).mean()), rel=1e-6)
    assert len(rows) == 4


def test_chunks_change_nothing():
    x = pictures(7)

    def sums(cfg, weights, x):
        return weights * x.sum((1, 2)), x

    found, same = emoji_autoencoder.in_chunks(sums, CFG, 3.0, x, size=3)
    np.testing.assert_allclose(found, 3 * x.sum((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(same, x)


@pytest.mark.slow
def test_the_rate_is_the_kl_term_and_the_noise_is_in_the_sampled_images():
    params = jax.jit(partial(autoencoder.init, CFG))(jax.random.key(0))
    x = jnp.asarray(pictures(30))
    params = autoencoder.measure(CFG, params, x)
    bits, sampled, means = emoji_autoencoder.rate_and_psnr(CFG, params, np.asarray(x))
    mu, logvar = autoencoder.encode(CFG, params, x)
    kl = 0.5 * (mu**2 + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3)).mean()
    assert bits == pytest.approx(float(kl) / np.log(2), rel=1e-5)
    expected = metrics.psnr(x, autoencoder.reconstruct(CFG, params, x))
    assert means == pytest.approx(expected, rel=1e-5) and abs(sampled - means) > 0.01


def test_criteria_name_rows_and_can_be_read():
    criteria = {**emoji_autoencoder.CRITERIA, **emoji_autoencoder.INVARIANTS}
    for criterion in criteria.values():
        _criteria.parse(criterion)
    assert _criteria.parse(criteria[emoji_autoencoder.UNSEEN])(25.5)
    assert not _criteria.parse(emoji_autoencoder.CRITERIA[emoji_autoencoder.TEST])(27.99)
    for wrong in ((0.1,), (0.3, 0.1), (0.1, 0.1), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="two or more rising numbers from 0 on"):
            replace(emoji_autoencoder.SMOKE, betas=wrong)
    for wrong in ((), (0, 256), (256, 3073), (8, 8)):
        with pytest.raises(
            ValueError, match=r"components must hold different numbers in 1\.\.3072"
        ):
            replace(emoji_autoencoder.SMOKE, components=wrong)
