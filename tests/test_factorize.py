"""The closed forms: exact at full rank, optimal below, nested, finite whatever comes in."""

import pytest
import torch
from torch import Tensor

from comcat.errors import CalibrationError
from comcat.layers.heads import gram
from comcat.linalg.factorize import (
    REFIT_RIDGE,
    RIDGE,
    factor_qk,
    order_neurons,
    project,
    refit_neurons,
    refit_output,
    ridge_used,
    whitening,
)

H, d, D, OUT, N = 3, 5, 13, 11, 997


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second(x: Tensor) -> Tensor:
    return x.mT @ x / x.shape[-2]


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Samples of very different variance in directions that are not the axes."""
    return normal(rows, width, seed=seed) * torch.logspace(0, -2, width).double() @ normal(width, width, seed=seed + 1)


def random_projector(n: int, rank: int, seed: int) -> Tensor:
    down, up = normal(n, rank, seed=seed), normal(rank, n, seed=seed + 50)
    return down @ torch.linalg.solve(up @ down, up)


def test_whitening_is_a_root() -> None:
    G = second(correlated(N, d))
    R = whitening(G)
    assert torch.equal(R, R.triu())
    torch.testing.assert_close(R.mT @ R, G, rtol=1e-8, atol=1e-9 * float(G.diagonal().mean()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_whitening_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        whitening(torch.full((d, d), bad))


def test_whitening_refuses_an_indefinite_matrix() -> None:
    with pytest.raises(CalibrationError, match="not positive semi-definite"):
        whitening(torch.diag(torch.tensor([1.0, -5.0])))


@pytest.mark.parametrize(("n", "m"), [(5, 11), (11, 5), (7, 7)])
def test_projection_error_is_the_tail_and_no_projector_does_better(n: int, m: int) -> None:
    x, M = correlated(N, n), normal(n, m, seed=3)
    p = project(second(x), M)
    assert len(p.gains) == min(n, m)
    for rank in range(1, min(n, m) + 1):
        lost = (x @ M - x @ p.down[:, :rank] @ p.up[:rank] @ M).square().sum(-1).mean()
        torch.testing.assert_close(lost, p.gains[rank:].sum(), rtol=1e-6, atol=1e-8 * float(p.gains.sum()))
        for seed in range(4):
            other = (x @ M - x @ random_projector(n, rank, seed) @ M).square().sum(-1).mean()
            assert lost <= other * (1 + 1e-6) + 1e-8 * float(p.gains.sum())


def test_projections_are_nested_and_oblique_projectors() -> None:
    p = project(second(correlated(N, 7)), normal(7, 11))
    torch.testing.assert_close(p.up @ p.down, torch.eye(7).double(), rtol=0, atol=1e-9)
    assert (p.gains.diff() <= 0).all()


def test_projection_is_per_head() -> None:
    G, M = torch.stack([second(correlated(N, d, seed=h)) for h in range(H)]), normal(H, d, D)
    together = project(G, M)
    for h in range(H):
        alone = project(G[h], M[h])
        torch.testing.assert_close(together.gains[h], alone.gains)
        torch.testing.assert_close(together.down[h, :, :2] @ together.up[h, :2], alone.down[:, :2] @ alone.up[:2])


@pytest.mark.parametrize("rank", range(1, d + 1))
def test_data_free_query_key_product_is_the_truncated_svd(rank: int) -> None:
    query, key = normal(H, d, D), normal(H, d, D, seed=1)
    f = factor_qk(gram(query), gram(key))
    got = (f.q_map[..., :rank].mT @ query).mT @ (f.k_map[..., :rank].mT @ key)
    U, S, Vh = torch.linalg.svd(query.mT @ key)
    torch.testing.assert_close(got, U[..., :rank] * S[:, None, :rank] @ Vh[:, :rank], rtol=0, atol=1e-7)
    torch.testing.assert_close(f.gains, S[:, :d].square(), rtol=1e-6, atol=1e-7)


def centred_scores(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT
    return scores - scores.mean(-1, keepdim=True)


@pytest.mark.parametrize("rank", range(1, d + 1))
def test_calibrated_scores_have_the_predicted_error_and_nothing_beats_it(rank: int) -> None:
    """All queries against all keys: there the moments describe the centred scores exactly."""
    q, k = correlated(101, d) + normal(1, d, seed=9), correlated(103, d, seed=5) + normal(1, d, seed=8)
    f = factor_qk(second(q)[None], second(k - k.mean(0))[None])
    T_q, T_k = f.q_map[0, :, :rank], f.k_map[0, :, :rank]
    dense = centred_scores(q, k)
    lost = (dense - centred_scores(q @ T_q, k @ T_k)).square().mean()
    total = float(f.gains.sum())
    torch.testing.assert_close(lost, f.gains[0, rank:].sum(), rtol=1e-6, atol=1e-8 * total)
    free = factor_qk(torch.eye(d).double()[None], torch.eye(d).double()[None])
    others = [random_projector(d, rank, seed) for seed in range(4)]
    others += [free.q_map[0, :, :rank] @ free.k_map[0, :, :rank].mT]
    for P in others:
        assert lost <= (dense - centred_scores(q @ P, k)).square().mean() * (1 + 1e-6) + 1e-8 * total


def test_query_and_key_share_the_scale_of_every_component() -> None:
    q, k = correlated(N, d) * 1e3, correlated(N, d, seed=5) * 1e-3
    f = factor_qk(second(q)[None], second(k)[None])
    root = f.gains[0].sqrt()
    torch.testing.assert_close((q @ f.q_map[0]).square().mean(0), root, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close((k @ f.k_map[0]).square().mean(0), root, rtol=1e-5, atol=1e-8)


def test_value_output_error_is_the_tail() -> None:
    z, output = correlated(N, d) - 0.3, normal(d, OUT)
    C = second(z - z.mean(0))
    p = project(C, output)
    for rank in range(1, d + 1):
        kept = p.down[:, :rank] @ p.up[:rank]
        bias = z.mean(0) @ (output - kept @ output)
        lost = (z @ output - z @ kept @ output - bias).square().sum(-1).mean()
        torch.testing.assert_close(lost, p.gains[rank:].sum(), rtol=1e-6, atol=1e-8 * float(p.gains.sum()))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_joint_refit_solves_the_normal_equations(rank: int) -> None:
    z, output = correlated(N, H * d), normal(H, d, OUT)
    C = second(z)
    blocks = C.view(H, d, H, d)
    p = project(torch.stack([blocks[h, :, h] for h in range(H)]), output)
    down, up = p.down[..., :rank], p.up[..., :rank, :]
    new = refit_output(down, up, output, C, ridge=1e-14)
    T = torch.block_diag(*down)
    reduced, dense = z @ T, z @ output.flatten(0, 1)
    residual = dense - reduced @ new.flatten(0, 1)
    scale = float(dense.square().mean() ** 0.5 * reduced.square().mean() ** 0.5)
    assert (reduced.mT @ residual / N).abs().max() < 1e-7 * scale
    separate = (dense - reduced @ (up @ output).flatten(0, 1)).square().mean()
    assert residual.square().mean() < separate


def test_joint_refit_is_exact_at_full_rank_for_a_singular_covariance() -> None:
    z, output = normal(2, H * d), normal(H, d, OUT)
    p = project(second(z).view(H, d, H, d)[range(H), :, range(H)], output)
    new = refit_output(p.down, p.up, output, second(z))
    torch.testing.assert_close(p.down @ new, output, rtol=0, atol=1e-9)


M = 17


@pytest.mark.parametrize("count", [1, 5, 12, M])
def test_neuron_refit_solves_the_normal_equations(count: int) -> None:
    h, output = correlated(N, M), normal(M, OUT)
    keep = torch.randperm(M, generator=torch.Generator().manual_seed(count))[:count].sort().values
    new = refit_neurons(second(h), output, keep, ridge=1e-14)
    residual = h @ output - h[:, keep] @ new
    scale = float((h @ output).square().mean() ** 0.5 * h.square().mean() ** 0.5)
    assert (h[:, keep].mT @ residual / N).abs().max() < 1e-7 * scale


@pytest.mark.parametrize("block", [1, 3, None])
def test_neuron_errors_are_those_of_the_refit(block: int | None) -> None:
    h, output = correlated(N, M), normal(M, OUT)
    found = order_neurons(second(h), output, block)
    assert sorted(found.order.tolist()) == list(range(M))
    assert len(found.errors) == M + 1
    assert (found.errors.diff() <= 0).all()
    assert found.errors[-1] == 0
    # Within a block the order is by score alone: only sums over whole blocks are those of a refit.
    step = block or 1
    for count in range(M, 0, -step):
        keep = found.order[:count]
        lost = (h @ output - h[:, keep] @ refit_neurons(second(h), output, keep)).square().sum(-1).mean()
        torch.testing.assert_close(lost, found.errors[count], rtol=0.02, atol=1e-5 * float(found.errors[0]))
    torch.testing.assert_close(found.errors[0], (h @ output).square().sum(-1).mean(), rtol=1e-4, atol=0)


def test_one_neuron_at_a_time_drops_the_cheapest_first() -> None:
    h, output = correlated(N, M), normal(M, OUT)
    found = order_neurons(second(h), output, 1)
    costs = []
    for j in range(M):
        keep = torch.tensor([i for i in range(M) if i != j])
        costs.append((h @ output - h[:, keep] @ refit_neurons(second(h), output, keep)).square().sum(-1).mean())
    assert int(found.order[-1]) == int(torch.stack(costs).argmin())


def test_dead_neurons_go_first_and_cost_nothing() -> None:
    h, output = correlated(N, M), normal(M, OUT)
    h[:, [2, 11]] = 0
    found = order_neurons(second(h), output, 1)
    assert set(found.order[-2:].tolist()) == {2, 11}
    assert found.errors[M - 2] < 1e-4 * found.errors[0]


WILD = {
    "zeros": torch.zeros(N, d).double(),
    "rank one": normal(N, 1) @ normal(1, d),
    "one sample": normal(1, d),
    "tiny": 1e-12 * normal(N, d),
    "huge": 1e12 * normal(N, d),
    "mixed": normal(N, d) * torch.tensor([1e12, 1.0, 1e-12, 0.0, 1e-150]).double(),
}


@pytest.mark.parametrize("left", WILD)
@pytest.mark.parametrize("right", WILD)
def test_wild_statistics_give_finite_factors(left: str, right: str) -> None:
    G, C = second(WILD[left])[None], second(WILD[right])[None]
    qk, vo = factor_qk(G, C), project(G, WILD[right][:d].mT)
    for tensor in (*qk, *vo):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("samples", WILD)
def test_wild_statistics_are_exact_at_full_rank(samples: str) -> None:
    G = second(WILD[samples])
    p, qk = project(G, normal(d, OUT)), factor_qk(G[None], second(normal(N, d, seed=2))[None])
    for identity in (p.down @ p.up, qk.q_map[0] @ qk.k_map[0].mT):
        torch.testing.assert_close(identity, torch.eye(d).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("samples", WILD)
def test_wild_statistics_give_finite_neurons(samples: str) -> None:
    C, output = second(WILD[samples]), normal(d, OUT)
    found = order_neurons(C, output)
    assert torch.isfinite(found.errors).all()
    assert torch.isfinite(refit_neurons(C, output, found.order[:2])).all()


def test_only_the_matrix_that_fails_gets_a_larger_ridge() -> None:
    """One head whose statistics are slightly indefinite must not blur the others of its layer."""
    good = torch.diag(torch.tensor([1.0, 1e-6, 1e-7], dtype=torch.float64))
    bad = torch.diag(torch.tensor([1.0, 1.0, -1e-3], dtype=torch.float64))
    alone, R = whitening(good), whitening(torch.stack([good, bad, good]))
    for kept in (R[0], R[2]):
        torch.testing.assert_close(kept, alone, rtol=1e-12, atol=0)
    torch.testing.assert_close((R.mT @ R)[1].diagonal(), bad.diagonal(), rtol=0, atol=0.01)
    assert ridge_used(good) == RIDGE
    assert ridge_used(torch.stack([good, bad])) == pytest.approx(1e-2)


def test_the_order_of_neurons_survives_many_downdates() -> None:
    """A nearly singular moment: every step removes the neuron whose removal costs least under an inverse made anew."""
    size = 48
    mixed = normal(4 * size, size) @ torch.diag(torch.logspace(0, -6, size, dtype=torch.float64)) @ normal(size, size)
    moment, output = second(mixed), normal(size, OUT)
    found = order_neurons(moment, output, 1)
    assert (found.errors.diff() <= 0).all()
    lifted = (R := whitening(moment, REFIT_RIDGE)).mT @ R
    for count in (40, 24, 12, 5, 1):
        keep, dropped = found.order[:count], found.order[count:]
        cross = torch.linalg.solve(lifted[keep][:, keep], lifted[keep][:, dropped])
        schur = lifted[dropped][:, dropped] - lifted[dropped][:, keep] @ cross
        lost = (output[dropped] * (schur @ output[dropped])).sum()
        torch.testing.assert_close(found.errors[count], lost, rtol=1e-5, atol=0)
