"""Products of two tall matrices through their cores, against the D x D decomposition."""

import pytest
import torch

from comcat.linalg.products import core, norm_of_product, svd_of_product

H, D_l, D_r, m = 3, 17, 13, 5


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(H, D_l, m).double(), torch.randn(H, D_r, m).double()


@pytest.mark.parametrize("rank", range(1, m + 1))
def test_a_truncated_product_is_the_best_of_its_rank(pair: tuple[torch.Tensor, torch.Tensor], rank: int) -> None:
    left, right = pair
    svd = svd_of_product(left, right)
    a, b = svd.truncated(rank)
    U, S, Vh = torch.linalg.svd(left @ right.mT)
    torch.testing.assert_close(a @ b.mT, U[..., :rank] * S[:, None, :rank] @ Vh[:, :rank], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.square().sum(-2), b.square().sum(-2))  # equal shares
    expected = torch.linalg.vector_norm(S[:, rank:], dim=-1) / torch.linalg.vector_norm(S, dim=-1)
    torch.testing.assert_close(svd.error(rank), expected, rtol=1e-10, atol=1e-12)


def test_more_rank_than_there_is_adds_nothing(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    svd = svd_of_product(*pair)
    a, b = svd.truncated(m + 2)
    assert a.shape == (H, D_l, m)
    torch.testing.assert_close(a @ b.mT, pair[0] @ pair[1].mT)
    assert not svd.error(m + 2).any()


def test_a_product_of_zero_has_no_error() -> None:
    svd = svd_of_product(torch.zeros(D_l, m), torch.zeros(D_r, m))
    assert svd.error(1) == 0


def test_the_core_has_the_inner_products_and_the_norm(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    left, right = pair
    torch.testing.assert_close(core(left).mT @ core(left), left.mT @ left)
    torch.testing.assert_close(norm_of_product(left, right).flatten(), torch.linalg.matrix_norm(left @ right.mT))
