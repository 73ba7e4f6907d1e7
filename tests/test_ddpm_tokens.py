"""Diffusion of tokens against a Markov chain, whose every posterior is known by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from aigc_jax.ddpm import tokens as td

V = 3
P0 = np.array([0.5, 0.3, 0.2])
P = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.05, 0.7]])
SCHEDULES = ("linear", "cosine")


def chain(L):
    """Returns all texts [V^L, L] and their probabilities."""
    texts = np.array(list(itertools.product(range(V), repeat=L)))
    p = P0[texts[:, 0]]
    for i in range(1, L):
        p = p * P[texts[:, i - 1], texts[:, i]]
    return texts, p


def entropy(p):
    return -(p * np.log(p)).sum()


def absorbing_table(L):
    """Returns the posterior [(V+1)^L, L, V] of each token, given any text with masks."""
    _, p = chain(L)
    joint = p.reshape((V,) * L)
    table = np.zeros((V + 1,) * L + (L, V))
    for masked in itertools.product([False, True], repeat=L):
        hidden = tuple(i for i in range(L) if masked[i])
        where = tuple(V if m else slice(0, V) for m in masked)
        for i in range(L):
            others = tuple(j for j in hidden if j != i)
            both = joint.sum(others, keepdims=True)  # of token i and what is seen
            if masked[i]:
                post = both / both.sum(i, keepdims=True)
                post = np.moveaxis(post, i, -1)
                post = post.reshape([V] * (L - len(hidden)) + [V])
            else:
                seen = [V] * (L - len(hidden))
                at = [j for j in range(L) if not masked[j]].index(i)
                post = np.broadcast_to(
                    np.eye(V).reshape([1] * at + [V] + [1] * (len(seen) - at - 1) + [V]),
                    [*seen, V],
                )
            table[(*where, i)] = post
    return table.reshape(-1, L, V)


def lookup(table, base):
    """Returns the logits_fn that looks a text up in a table; impossible tokens get -100."""
    L = table.shape[1]
    logits = jnp.asarray(np.log(np.maximum(table, np.exp(-100.0))))
    weight = jnp.asarray(base ** np.arange(L)[None, ::-1])

    def logits_fn(x_t, t):
        return logits[(x_t * weight).sum(-1)]

    return logits_fn


def enumerated(L, schedule):
    """Returns the logits_fn of the uniform process: its posterior at any t, by Bayes."""
    texts, p = (jnp.asarray(a) for a in chain(L))

    def logits_fn(x_t, t):
        a, u = (
            td.alpha(schedule, t)[:, None, None],
            td.one_minus_alpha(schedule, t)[:, None, None] / V,
        )
        q = a * (x_t[:, None] == texts[None]) + u  # [B, V^L, L]
        joint = p[None] * q.prod(-1)
        one_hot = jax.nn.one_hot(texts, V, dtype=joint.dtype)
        post = jnp.einsum("bn,nlv->blv", joint, one_hot) / joint.sum(-1)[:, None, None]
        return jnp.log(post)

    return logits_fn


def expected(process, L, schedule, times, logits_fn):
    """Returns the exact mean over x_0 and x_t of the rate, or of a step's KL, for each of `times`.

    times: pairs (s, t); s None: the rate at t.
    """
    texts, p = chain(L)
    symbols = V + 1 if process == "absorbing" else V
    states = np.array(list(itertools.product(range(symbols), repeat=L)))

    @jax.jit
    def at(t, s, x_t):  # all x_0, one x_t
        x_t = jnp.broadcast_to(x_t, texts.shape)
        T = jnp.full(len(texts), t)
        a, lost = td.alpha(schedule, T)[:, None], td.one_minus_alpha(schedule, T)[:, None]
        if process == "absorbing":
            q = jnp.where(x_t == V, lost, jnp.where(x_t == texts, a, 0.0))
        else:
            q = a * (x_t == texts) + lost / V
        logits = logits_fn(x_t, T)
        options = {"schedule": schedule}
        if s is None:
            nats = td.kl_rate(process, logits, texts, x_t, T, **options)
        else:
            S = jnp.full(len(texts), s)
            nats = td.step_kl(process, logits, texts, x_t, S, T, **options)
        weight = p * q.prod(-1)
        return jnp.where(weight > 0, weight * nats.sum(-1), 0.0).sum()

    each = jax.jit(jax.vmap(at, (None, None, 0)))
    return np.array([float(each(t, s, jnp.asarray(states)).sum()) for s, t in times])


def in_steps(T):
    return [(i / T, (i + 1) / T) for i in range(T)]


def gauss(n):
    """Returns nodes and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(n)
    return (x + 1) / 2, w / 2


def exact_bound(process, L, schedule, steps):
    """Returns the bound's exact mean: every text, every x_t, and quadrature over t."""
    fn = lookup(absorbing_table(L), V + 1) if process == "absorbing" else enumerated(L, schedule)
    if steps:
        return expected(process, L, schedule, in_steps(steps), fn).sum()
    u, weights = gauss(24)  # with t = u^4, because log t grows near 0
    return 4 * u**3 * weights @ expected(process, L, schedule, [(None, t) for t in u**4], fn)


# ------------------------------------------------------------------------------- the process


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    t = jnp.linspace(0, 1, 101)
    a, b = td.alpha(schedule, t), td.one_minus_alpha(schedule, t)
    np.testing.assert_allclose(a + b, 1, atol=1e-6)
    assert a[0] > 1 - 1e-6 and a[-1] == 0 and b[0] == 0 and b[-1] == 1
    slope = jax.vmap(jax.grad(lambda t: td.one_minus_alpha(schedule, t)))(t)
    np.testing.assert_allclose(td.minus_alpha_slope(schedule, t), slope, atol=1e-6)
    np.testing.assert_allclose(td.time_of(schedule, b), t, atol=1e-3)
    tiny = jnp.float32(1e-5)
    np.testing.assert_allclose(td.alpha(schedule, 1 - tiny) > 0, True)
    np.testing.assert_allclose(
        td.one_minus_alpha(schedule, tiny),
        {"linear": 1, "cosine": np.pi / 2}[schedule] * 1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_corrupt_has_the_law_of_q(process, schedule):
    n, t = 40_000, 0.3
    x_0 = jnp.broadcast_to(jnp.array([0, 1, 2, 2]), (n, 4))
    mask = jnp.broadcast_to(jnp.array([1, 1, 1, 0]), (n, 4))
    x_t = td.corrupt(
        process, x_0, jnp.full(n, t), jax.random.key(0), vocab=V, schedule=schedule, mask=mask
    )
    assert (x_t[:, 3] == 2).all()
    lost = float(td.one_minus_alpha(schedule, t))
    for i, own in enumerate((0, 1, 2)):
        share = np.bincount(np.asarray(x_t[:, i]), minlength=V + 1) / n
        if process == "absorbing":
            wanted = np.array([0, 0, 0, lost])
            wanted[own] = 1 - lost
        else:
            wanted = np.array([lost / V] * V + [0])
            wanted[own] += 1 - lost
        np.testing.assert_allclose(share, wanted, atol=4 * 0.5 / np.sqrt(n))


# --------------------------------------------------------------------------------- the bound


def marginal_entropies(L):
    texts, p = chain(L)
    each = [np.bincount(texts[:, i], weights=p, minlength=V) for i in range(L)]
    return sum(entropy(m) for m in each)


def test_one_absorbing_step_costs_the_sum_of_marginal_entropies():
    with jax.enable_x64(True):
        for schedule in SCHEDULES:
            np.testing.assert_allclose(
                exact_bound("absorbing", 4, schedule, 1), marginal_entropies(4), rtol=1e-12
            )


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_absorbing_bound_falls_with_steps_to_the_entropy(schedule):
    with jax.enable_x64(True):
        bounds = [exact_bound("absorbing", 4, schedule, T) for T in (1, 2, 3, 4, 8, 32, None)]
    assert (np.diff(bounds) < 0).all()
    np.testing.assert_allclose(bounds[-1], entropy(chain(4)[1]), atol=1e-9)


def test_absorbing_bound_is_the_entropy_for_eight_tokens():
    """The numbers of the chain of eight tokens, from the mean cross entropy per set of masks."""
    L = 8
    texts, p = chain(L)
    fn = lookup(absorbing_table(L), V + 1)
    with jax.enable_x64(True):
        fn = lookup(absorbing_table(L), V + 1)

        @jax.jit
        def masked_nats(masks):  # at a time when the weight is 1
            x_t = jnp.where(masks, V, texts)
            t = jnp.ones(len(texts))
            return p @ td.kl_rate("absorbing", fn(x_t, t), texts, x_t, t).sum(-1)

        sets = np.array(list(itertools.product([False, True], repeat=L)))
        nats = np.array([float(masked_nats(m)) for m in sets])
    size = sets.sum(-1)
    nodes, weights = gauss(8)  # exact for degree 15

    def mean(share):
        return (share**size * (1 - share) ** (L - size) * nats).sum()

    bound = sum(w / t * mean(t) for t, w in zip(nodes, weights, strict=True))
    np.testing.assert_allclose(bound, entropy(p), atol=1e-5)
    steps = [sum((t - s) / t * mean(t) for s, t in in_steps(T)) for T in (1, 2, 4, 8, 64)]
    np.testing.assert_allclose(steps[0], marginal_entropies(L), rtol=1e-12)
    assert (np.diff([*steps, bound]) < 0).all()


def brute_force_bound(L, T, schedule):
    """Returns the bound of the uniform process from q's joint law alone, in numpy."""
    texts, p = chain(L)
    alpha = [float(td.alpha(schedule, jnp.float64(i / T))) for i in range(T + 1)]
    total = 0.0
    for i in range(T):
        a_s, a_t = alpha[i], alpha[i + 1]
        a_ts = a_t / a_s
        given_s = a_ts * np.eye(V) + (1 - a_ts) / V  # [x_s, x_t]
        s_given_0 = a_s * np.eye(V) + (1 - a_s) / V  # [x_0, x_s]
        t_given_0 = a_t * np.eye(V) + (1 - a_t) / V  # [x_0, x_t]
        one = s_given_0[:, :, None] * given_s[None]  # [x_0, x_s, x_t]
        posterior = one / one.sum(1, keepdims=True)
        for x_t in texts:
            weight = p * np.prod([t_given_0[texts[:, j], x_t[j]] for j in range(L)], 0)
            for j in range(L):
                q = posterior[texts[:, j], :, x_t[j]]  # [x_0, x_s]
                mean = weight @ q / weight.sum()
                with np.errstate(divide="ignore", invalid="ignore"):
                    kl = np.where(q > 0, q * np.log(q / mean), 0.0).sum(-1)
                total += weight @ kl
    return total


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_uniform_bound_is_that_of_bayes(schedule, steps):
    with jax.enable_x64(True):
        ours, theirs = (
            exact_bound("uniform", 3, schedule, steps),
            brute_force_bound(3, steps, schedule),
        )
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_uniform_bound_falls_with_steps_to_the_entropy(schedule):
    with jax.enable_x64(True):
        bounds = [exact_bound("uniform", 3, schedule, T) for T in (1, 2, 4, 16, 64, None)]
    assert (np.diff(bounds) < 0).all()
    np.testing.assert_allclose(bounds[-1], entropy(chain(3)[1]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_rate_is_the_limit_of_steps(process):
    with jax.enable_x64(True):
        for schedule in SCHEDULES:
            fn = (
                enumerated(2, schedule)
                if process == "uniform"
                else lookup(absorbing_table(2), V + 1)
            )
            t, d = 0.4, 1e-6
            rate, step = (expected(process, 2, schedule, [(s, t)], fn)[0] for s in (None, t - d))
            np.testing.assert_allclose(step / d, rate, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("t", [1e-14, 6e-8, 1e-5, 1e-3, 0.5, 0.999])
@pytest.mark.parametrize("vocab", [3, 65, 6882])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_uniform_rate_in_float32_is_that_in_float64(schedule, vocab, t):
    """Early, a changed token is V alpha / (1 - alpha) times less probable: a ratio beyond 2^24."""
    logits = 2 * np.random.default_rng(0).normal(size=(1, 3, vocab))
    tokens, x_t = np.array([[0, 1, 2]]), np.array([[0, 1, 0]])

    def rate(logits):
        time = jnp.asarray([np.float32(t)], logits.dtype)
        return td.kl_rate("uniform", logits, tokens, x_t, time, schedule=schedule)

    found = rate(jnp.asarray(logits, jnp.float32))
    gradient = jax.grad(lambda logits: rate(logits).sum())(jnp.asarray(logits, jnp.float32))
    with jax.enable_x64(True):
        np.testing.assert_allclose(found, rate(jnp.asarray(logits, jnp.float64)), rtol=1e-4)
    assert jnp.isfinite(gradient).all()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_estimate_is_unbiased_in_float32(process, schedule, steps):
    L, copies = 3, 200
    texts, p = chain(L)
    x = jnp.asarray(np.tile(texts, (copies, 1)), jnp.int32)
    weight = jnp.asarray(np.tile(p, copies) / copies, jnp.float32)
    fn = lookup(absorbing_table(L), V + 1) if process == "absorbing" else enumerated(L, schedule)
    with jax.enable_x64(True):
        exact = exact_bound(process, L, schedule, steps)

    @jax.jit
    def estimate(key):
        options = {"steps": steps, "schedule": schedule, "terms": 2}
        return weight @ td.token_vlb(process, fn, x, key, **options)

    means = np.array([estimate(jax.random.key(i)) for i in range(10)])
    assert abs(means.mean() - exact) < 5 * means.std() / np.sqrt(10) + 1e-5
    assert means.std() < 0.2


def test_given_tokens_stay_and_do_not_count():
    seen = []

    def fn(x_t, t):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x_t)
        return jnp.zeros((*x_t.shape, V))

    tokens = jnp.array([[0, 1, 2, 1]] * 3)
    mask = jnp.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    found = td.token_vlb("absorbing", fn, tokens, jax.random.key(0), steps=1, mask=mask)
    np.testing.assert_allclose(found, np.log(V) * np.array([2, 0, 4]), rtol=1e-6)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[-1], np.where(mask == 1, V, tokens))
    found = td.token_vlb("uniform", fn, tokens, jax.random.key(0), mask=mask, terms=3)
    assert found[1] == 0 and (found[jnp.array([0, 2])] > 0).all()


@pytest.mark.slow
def test_gradients_are_finite_where_a_token_is_impossible():
    logits = jnp.array([[[0.0, -1e9, -200.0]] * 4])
    tokens, x_t = jnp.array([[0, 0, 2, 0]]), jnp.array([[0, 1, 2, 0]])
    for schedule in SCHEDULES:
        for s, t in ((0.0, 1e-3), (0.0, 1.0), (0.5, 1.0), (0.999, 1.0)):
            s, t = jnp.array([s]), jnp.array([t])

            def kl(logits, x_t=x_t, process="uniform", s=s, t=t, schedule=schedule):
                return td.step_kl(process, logits, tokens, x_t, s, t, schedule=schedule).sum()

            def rate(logits, x_t=x_t, process="uniform", t=t, schedule=schedule):
                return td.kl_rate(process, logits, tokens, x_t, t, schedule=schedule).sum()

            for f in (kl, rate):
                value, slope = jax.value_and_grad(f)(logits)
                assert np.isfinite(value) and value > -1e-4 and np.isfinite(slope).all()
                value, slope = jax.value_and_grad(f)(logits, jnp.full((1, 4), V), "absorbing")
                assert np.isfinite(value) and value >= 0 and np.isfinite(slope).all()


# --------------------------------------------------------------------------------- sampling


def law(samples, L):
    """Returns how often each text occurs."""
    return np.bincount(np.asarray(samples) @ V ** np.arange(L)[::-1], minlength=V**L)


def p_value(samples, p, L):
    count = law(samples, L)
    return scipy.stats.chisquare(count, p * count.sum()).pvalue


def drawn(process, L, steps, n=20_000, fn=None, **options):
    fn = fn or lookup(absorbing_table(L), V + 1)
    return jax.jit(
        lambda key: td.sample_tokens(
            process, fn, key, shape=(n, L), vocab=V, steps=steps, **options
        )
    )(jax.random.key(5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"schedule": "cosine"}, {"block": 2}, {"block": 1}, {"block": 4}]
)
def test_one_token_per_step_has_the_exact_law(options):
    samples = drawn("absorbing", 4, 4, **options)
    assert p_value(samples, chain(4)[1], 4) > 1e-3


def marginal(kept, L):
    """Returns P(x_kept) broadcast over all texts [V]*L."""
    joint = chain(L)[1].reshape((V,) * L)
    return joint.sum(tuple(i for i in range(L) if i not in kept), keepdims=True)


def law_of_sets(sets, L):
    """Returns the law [V^L] of a sampler that reveals these sets of tokens in turn."""
    seen, p = (), np.ones((V,) * L)
    for new in sets:
        for i in new:
            p = p * marginal((*seen, i), L) / marginal(seen, L)
        seen = (*seen, *new)
    return p.ravel()


@pytest.mark.slow
def test_fewer_steps_have_the_known_wrong_law():
    L, truth = 4, chain(4)[1]
    one = drawn("absorbing", L, 1)
    assert p_value(one, law_of_sets([range(L)], L), L) > 1e-3 and p_value(one, truth, L) < 1e-9
    pairs = [set(pair) for pair in itertools.combinations(range(L), 2)]
    halves = np.mean([law_of_sets([a, set(range(L)) - a], L) for a in pairs], 0)
    two = drawn("absorbing", L, 2)
    assert p_value(two, halves, L) > 1e-3 and p_value(two, truth, L) < 1e-9
    left = drawn("absorbing", L, 2, block=2)  # one step per block
    assert p_value(left, law_of_sets([(0, 1), (2, 3)], L), L) > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_steps_have_their_known_law(schedule):
    """Two tokens ignore each other where one step reveals both."""
    S = 3
    lost = np.array([float(td.one_minus_alpha(schedule, jnp.float32(i / S))) for i in range(S + 1)])
    together = (np.diff(lost) ** 2).sum()
    truth, apart = chain(2)[1], law_of_sets([(0, 1)], 2)
    samples = drawn("absorbing", 2, S, order="ancestral", schedule=schedule)
    assert p_value(samples, (1 - together) * truth + together * apart, 2) > 1e-3
    assert p_value(samples, truth, 2) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_uniform_steps_have_their_known_law(schedule):
    L, S = 2, 3
    texts, _ = chain(L)
    fn = enumerated(L, schedule)
    p = np.full(len(texts), 1 / len(texts))
    with jax.enable_x64(True):
        for i in reversed(range(S)):
            s, t = (jnp.full(len(texts), (i + j) / S) for j in (0, 1))
            step = np.exp(td.step_log_probs(fn(texts, t), texts, s, t, schedule=schedule))
            np.testing.assert_allclose(step.sum(-1), 1, rtol=1e-9)
            p = p @ np.prod([step[:, j][:, texts[:, j]] for j in range(L)], 0)
    assert p_value(drawn("uniform", L, S, fn=fn, schedule=schedule), p, L) > 1e-3


def test_infilling_has_the_conditional_law():
    known = np.array([1, -1, -1, 2])
    samples = np.asarray(drawn("absorbing", 4, 4, known=known))
    assert (samples[:, 0] == 1).all() and (samples[:, 3] == 2).all()
    inside = chain(4)[1].reshape((V,) * 4)[1, :, :, 2].ravel()
    assert p_value(samples[:, 1:3], inside / inside.sum(), 2) > 1e-3
    rows = np.array([[-1, -1], [2, -1], [0, 1]])
    some = np.asarray(drawn("absorbing", 2, 2, n=3, known=rows))
    assert (some[1, 0], *some[2]) == (2, 0, 1) and some.max() < V


def test_uniform_infilling_keeps_what_is_known():
    known = np.array([2, -1, 0])
    samples = np.asarray(drawn("uniform", 3, 50, n=500, fn=enumerated(3, "linear"), known=known))
    assert (samples[:, 0] == 2).all() and (samples[:, 2] == 0).all()


def counting(confidence):
    """Returns a logits_fn that predicts, everywhere, how many tokens have been revealed."""
    L = len(confidence)

    def fn(x_t, t):
        count = (x_t != L).sum(-1)
        return jnp.asarray(confidence)[None, :, None] * jax.nn.one_hot(count, L)[:, None]

    return fn


def order_of(steps, confidence, n=3, **options):
    L = len(confidence)
    options = {"shape": (n, L), "vocab": L, "steps": steps, "temperature": 0.0, **options}
    found = td.sample_tokens("absorbing", counting(confidence), jax.random.key(0), **options)
    return np.asarray(found)


@pytest.mark.slow
def test_confidence_reveals_the_surest_token_first():
    sure = np.array([3.0, 9.0, 1.0, 7.0])
    assert (order_of(4, sure, order="confidence") == [2, 0, 3, 1]).all()
    assert (order_of(2, sure, order="confidence") == [2, 0, 2, 0]).all()
    assert (order_of(4, sure, order="confidence", block=2) == [1, 0, 3, 2]).all()
    found = order_of(4, sure, n=200)  # at random, in every order
    assert len({tuple(row) for row in found}) == 24
    assert (order_of(4, sure, n=50, block=1) == [0, 1, 2, 3]).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_reveals_as_many_as_the_schedule_says(schedule):
    L, S = 12, 5
    found = order_of(S, np.ones(L), schedule=schedule)
    begun = np.sort(found, -1)
    wanted = [
        round(L * float(td.alpha(schedule, jnp.float32((S - i) / S)))) for i in range(S)
    ]  # revealed before step i
    for row in begun:
        assert sorted(set(row.tolist())) == sorted(set(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("p, rows", [(1e-6, 20_000), (4e-8, 60_000)])
def test_rare_tokens_come_at_their_true_rate(p, rows):
    """With JAX's default Gumbel noise, the second case draws 2 rare tokens; 24 are expected."""
    rare, chunks = 100, 100
    logits = jnp.log(jnp.array([1 - rare * p] + [p] * rare))

    def count(key):
        drawn = td.draw_tokens(jnp.broadcast_to(logits, (1, rows, rare + 1)), key)
        return (drawn > 0).sum()

    fast = {"xla_backend_optimization_level": 3}
    many = jax.jit(lambda keys: jax.lax.map(count, keys).sum(), compiler_options=fast)
    found = int(many(jax.random.split(jax.random.key(0), chunks)))
    wanted = p * rare * rows * chunks
    assert abs(found - wanted) < 3.5 * np.sqrt(wanted)


# ------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_is_refused():
    fn, key = lookup(absorbing_table(2), V + 1), jax.random.key(0)
    tokens = np.zeros((2, 2), np.int32)

    def refused(words, call, *args, **options):
        with pytest.raises(ValueError, match=words):
            call(*args, **options)

    bound = (td.token_vlb, "absorbing", fn)
    refused(
        "process must be absorbing or uniform, got 'mask'", td.token_vlb, "mask", fn, tokens, key
    )
    refused("tokens must lie in 0..2, got 0..3", *bound, tokens + [0, 3], key)
    refused("tokens must lie in 0..2, got -1..-1", *bound, tokens - 1, key)
    refused("tokens must be whole numbers, got float32", *bound, tokens.astype(np.float32), key)
    refused("steps and terms must be at least 1, got 0 and 1", *bound, tokens, key, steps=0)
    refused("schedule must be linear or cosine, got 'sine'", *bound, tokens, key, schedule="sine")
    flat = (td.token_vlb, "absorbing", lambda x_t, t: jnp.zeros((2, V)))
    refused(r"logits_fn must return \[2, 2, V\], got \[2, 3\]", *flat, tokens, key)

    some = {"shape": (2, 2), "vocab": V, "steps": 2}
    masked, uniform = (
        (td.sample_tokens, "absorbing", fn, key),
        (td.sample_tokens, "uniform", fn, key),
    )
    refused("steps must lie in 1..2, the number of tokens.*got 3", *masked, **{**some, "steps": 3})
    refused("steps must be at least 1, got 0", *uniform, **{**some, "steps": 0})
    refused("known tokens must lie in -1..2, got -1..3", *masked, **some, known=[3, -1])
    refused(
        r"known tokens must have shape \[2\] or \[2, 2\], got \[3\]", *masked, **some, known=[0] * 3
    )
    refused(
        "order must be random, confidence or ancestral, got 'left'", *masked, **some, order="left"
    )
    refused("order and block belong to the process absorbing", *uniform, **some, block=1)
    refused("block must divide the 2 tokens.*got block 3 and 2 steps", *masked, **some, block=3)
    refused("takes no block", *masked, **some, order="ancestral", block=1)
    refused("temperature must not be negative, got -1", *masked, **some, temperature=-1)
    many = td.sample_tokens("absorbing", fn, key, **{**some, "steps": 9}, order="ancestral")
    assert many.shape == (2, 2)  # there, steps may exceed the length
