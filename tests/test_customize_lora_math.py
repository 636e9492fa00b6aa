"""An added product as a LoRA and back, against the D x D singular value decomposition."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from comcat.customize.lora.algebra import (
    HeadUpdate,
    LoraPair,
    LoraWeights,
    lora_of_columns,
    lora_of_rows,
    lora_to_product,
    product_to_lora,
    truncate_lora,
    update_of_columns,
    update_of_rows,
)
from comcat.errors import CheckpointError

H, d, D, r, D_r = 3, 5, 17, 2, 13


class Product(NamedTuple):
    left: Tensor
    left_added: Tensor
    right: Tensor
    right_added: Tensor

    @property
    def base(self) -> Tensor:
        return self.left @ self.right.mT

    @property
    def target(self) -> Tensor:
        return self.base + self.left_added @ self.right_added.mT


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(seed: int = 0, strength: float = 1.0, left_rows: int = D, right_rows: int = D_r, rank: int = r) -> Product:
    draw = [randn(H, rows, n, seed=100 * seed + i) for i, (rows, n) in enumerate([(left_rows, d), (right_rows, d)])]
    left, right = draw
    left_added = strength * randn(H, left_rows, rank, seed=100 * seed + 2)
    return Product(left, left_added, right, randn(H, right_rows, rank, seed=100 * seed + 3))


def norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix)


def applied(p: Product, pair: LoraPair) -> Tensor:
    return (p.left + p.left_added @ pair.X) @ (p.right + pair.Y @ pair.Z).mT


def optimum(p: Product) -> Tensor:
    """Error of the best rank-d product, from the full matrix."""
    return torch.linalg.svdvals(p.target)[:, d:].square().sum(-1).sqrt()


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1, 30])
@pytest.mark.parametrize("seed", range(5))
def test_export_is_the_truncated_svd(seed: int, strength: float) -> None:
    p = product(seed, strength)
    pair = product_to_lora(*p, rounding=0)
    torch.testing.assert_close(norm(applied(p, pair) - p.target), pair.error, rtol=1e-8, atol=0)
    torch.testing.assert_close(pair.effect, norm(p.left_added @ p.right_added.mT), rtol=1e-12, atol=0)
    # exactly the optimum unless a singular value is floored; then within a thousandth of the effect
    assert ((pair.error - optimum(p)) / pair.effect).abs().max() < 1e-3


def test_export_is_the_truncated_svd_to_rounding() -> None:
    p = product(strength=0.1)
    pair = product_to_lora(*p)
    torch.testing.assert_close(pair.error, optimum(p), rtol=1e-10, atol=0)
    U, S, Vh = torch.linalg.svd(p.target)
    torch.testing.assert_close(applied(p, pair), (U[..., :d] * S[:, None, :d]) @ Vh[:, :d])


@pytest.mark.parametrize("side", ["left_added", "right_added"])
def test_an_untrained_adapter_exports_as_exact_zeros(side: str) -> None:
    p = product()
    pair = product_to_lora(*p._replace(**{side: torch.zeros_like(getattr(p, side))}))
    for value in (pair.X, pair.Y, pair.Z, pair.error, pair.effect):
        assert (value == 0).all()


@pytest.mark.parametrize(
    ("left_in", "right_in"), [(0, 2), (2, 0), (2, 2), (1, 2), (2, 1)], ids=lambda columns: f"{columns} of 2"
)
def test_an_added_product_within_the_weights_is_exact(left_in: int, right_in: int) -> None:
    p = product()
    left, right = p.left @ randn(H, d, r, seed=11), p.right @ randn(H, d, r, seed=12)
    p = p._replace(
        left_added=torch.cat([left[..., :left_in], p.left_added[..., left_in:]], -1),
        # what the left side does not hold, the right one does
        right_added=torch.cat([p.right_added[..., : r - right_in], right[..., r - right_in :]], -1),
    )
    pair = product_to_lora(*p)
    assert (optimum(p) < 1e-13 * pair.effect).all()
    assert (pair.error < 1e-9 * pair.effect).all()
    assert (norm(applied(p, pair) - p.target) < 1e-9 * pair.effect).all()


def degenerate() -> dict[str, Product]:
    p = product()
    mask = torch.tensor([1, 1, 1, 1, 0], dtype=torch.float64)
    weak = torch.tensor([1, 1, 1, 1, 1e-5], dtype=torch.float64)
    left, right = torch.linalg.qr(randn(H, D, d + r)).Q, torch.linalg.qr(randn(H, D_r, d + r)).Q
    scale = torch.arange(d, 0, -1, dtype=torch.float64)
    return {
        "few outputs": product(right_rows=6),
        "few inputs": product(left_rows=6),
        "fewer rows than rank and width": product(left_rows=4, right_rows=3),
        "rank above width": product(rank=7),
        "rank above rows": product(rank=19),
        "no left weights": p._replace(left=0 * p.left),
        "no right weights": p._replace(right=0 * p.right),
        "no weights": p._replace(left=0 * p.left, right=0 * p.right),
        "dead direction": p._replace(left=p.left * mask, right=p.right * mask),
        "dead direction, left": p._replace(left=p.left * mask),
        "dead direction, right": p._replace(right=p.right * mask),
        "weak direction": p._replace(left=p.left * weak, right=p.right * weak),
        "weak direction, left": p._replace(left=p.left * weak),
        "weak direction, right": p._replace(right=p.right * weak),
        "columns alike": p._replace(right_added=p.right_added[..., :1].expand(-1, -1, r)),
        "orthogonal and weaker": Product(left[..., :d] * scale, 0.5 * left[..., d:], right[..., :d], right[..., d:]),
        "orthogonal and equal": Product(left[..., :d] * scale, left[..., d:], right[..., :d], right[..., d:]),
        "orthogonal and stronger": Product(left[..., :d] * scale, 3 * left[..., d:], right[..., :d], right[..., d:]),
        "other scales": Product(p.left * 1e8, p.left_added * 1e-7, p.right * 1e-8, p.right_added * 1e7),
        "one head of three": p._replace(right_added=p.right_added * torch.tensor([0.0, 1.0, 0.0])[:, None, None]),
    }


@pytest.mark.parametrize("case", degenerate())
def test_degenerate_products_are_never_worse_than_no_update(case: str) -> None:
    p = degenerate()[case]
    pair = product_to_lora(*p)
    for value in (pair.X, pair.Y, pair.Z, pair.error):
        assert torch.isfinite(value).all()
    assert (pair.error <= pair.effect).all()
    scale = norm(p.base) + pair.effect
    assert ((norm(applied(p, pair) - p.target) - pair.error).abs() < 1e-9 * scale).all()
    # out of reach of finite updates in some of these, but near
    assert ((pair.error - optimum(p)) < 2e-3 * scale).all()


def test_large_factors_that_cancel_are_not_worth_their_rounding() -> None:
    """An added direction stronger than a base one replaces it only in the limit of infinite factors."""
    p = degenerate()["orthogonal and stronger"]
    tame, wild = product_to_lora(*p, rounding=2.0**-11), product_to_lora(*p, rounding=0)
    assert (wild.error <= tame.error).all()
    assert norm(tame.X).max() < 0.1 * norm(wild.X).max()
    stored = [t.half().double() for t in (p.left + p.left_added @ tame.X, p.right + tame.Y @ tame.Z)]
    assert (norm(stored[0] @ stored[1].mT - p.target) < tame.error + 0.05 * tame.effect).all()


def test_a_bias_row_stays_unless_the_adapter_has_one() -> None:
    p = product()
    p.left_added[:, -1] = 0
    pair = product_to_lora(*p)
    assert ((p.left_added @ pair.X)[:, -1] == 0).all()


def test_moments_of_the_inputs_choose_the_directions_that_count() -> None:
    p = product()
    left_root, right_root = randn(19, D, seed=7) * torch.logspace(0, -3, D), randn(7, D_r, seed=8)
    pair = product_to_lora(*p, rounding=0, left_root=left_root, right_root=right_root)
    weighted = left_root @ (applied(p, pair) - p.target) @ right_root.mT
    torch.testing.assert_close(norm(weighted), pair.error, rtol=1e-6, atol=1e-9)
    tail = torch.linalg.svdvals(left_root @ p.target @ right_root.mT)[:, d:]
    assert ((pair.error - tail.square().sum(-1).sqrt()) < 1e-3 * pair.effect).all()
    plain = left_root @ (applied(p, product_to_lora(*p)) - p.target) @ right_root.mT
    assert (pair.error < norm(plain)).all()


def test_layers_of_column_heads() -> None:
    """to_q, to_k and to_v split their outputs into heads."""
    basis, mix = randn(H, D, r), randn(H, r, d, seed=1)
    lora = lora_of_columns(basis, mix)
    assert (lora.down.shape, lora.up.shape) == ((H * r, D), (H * d, H * r))
    x = randn(7, D, seed=2)
    torch.testing.assert_close((x @ (lora.up @ lora.down).mT).unflatten(-1, (H, d)), (x @ basis @ mix).movedim(0, 1))
    update = update_of_columns(lora, H)
    torch.testing.assert_close(update.basis @ update.mix, basis @ mix)


def test_layers_of_row_heads() -> None:
    """to_out splits its inputs into heads; the right matrix of a head is the transposed block."""
    basis, mix = randn(H, D, r), randn(H, r, d, seed=1)
    lora = lora_of_rows(basis, mix)
    assert (lora.down.shape, lora.up.shape) == ((H * r, H * d), (D, H * r))
    z = randn(7, H, d, seed=2)
    expected = sum(z[:, h] @ (basis[h] @ mix[h]).mT for h in range(H))
    torch.testing.assert_close(z.flatten(1) @ (lora.up @ lora.down).mT, expected)
    update = update_of_rows(lora, H)
    torch.testing.assert_close(update.basis @ update.mix, basis @ mix)


@pytest.mark.parametrize("rank", [1, 3, 6, 11])
def test_truncated_lora_is_the_truncated_svd(rank: int) -> None:
    down, up = 1e6 * randn(6, D), 1e-6 * randn(D_r, 6, seed=1)
    lora, error = truncate_lora(down, up, rank)
    S = torch.linalg.svdvals(up @ down)
    assert lora.down.shape[0] == min(rank, 6)
    expected = float(S[rank:6].square().sum().sqrt() / S.square().sum().sqrt())
    assert error == pytest.approx(expected, rel=1e-10, abs=1e-12)
    torch.testing.assert_close(norm(up @ down - lora.up @ lora.down) / norm(up @ down), torch.tensor(error).double())
    torch.testing.assert_close(lora.down.square().sum(1), lora.up.square().sum(0))


def test_a_lora_of_zeros_truncates_to_zeros() -> None:
    lora, error = truncate_lora(randn(3, D), torch.zeros(D_r, 3), 2)
    assert error == 0
    assert (lora.up @ lora.down == 0).all()


def changes(rank: int, seed: int = 0) -> tuple[HeadUpdate, HeadUpdate]:
    left = LoraWeights(randn(rank, D, seed=seed), 0.1 * randn(H * d, rank, seed=seed + 1))
    right = LoraWeights(randn(rank, H * d, seed=seed + 2), 0.1 * randn(D_r, rank, seed=seed + 3))
    return update_of_columns(left, H), update_of_rows(right, H)


@pytest.mark.parametrize("sides", ["both", "left", "right"])
@pytest.mark.parametrize("lora_rank", [2, 7])
@pytest.mark.parametrize("rank", [1, 3, 11])
def test_import_is_the_truncated_svd_of_the_change(rank: int, lora_rank: int, sides: str) -> None:
    p = product(left_rows=D + 1)  # the last row is a bias, which the LoRA leaves alone
    left, right = changes(lora_rank)
    dL = torch.nn.functional.pad(left.basis @ left.mix, (0, 0, 0, 1)) * (sides != "right")
    dR = right.basis @ right.mix * (sides != "left")
    change = (p.left + dL) @ (p.right + dR).mT - p.base
    added = lora_to_product(
        p.left, None if sides == "right" else left, p.right, None if sides == "left" else right, rank
    )
    assert (added.left_added.shape, added.right_added.shape) == ((H, D + 1, rank), (H, D_r, rank))
    U, S, Vh = torch.linalg.svd(change)
    torch.testing.assert_close(
        added.left_added @ added.right_added.mT, (U[..., :rank] * S[:, None, :rank]) @ Vh[:, :rank]
    )
    expected = S[:, rank:].square().sum(-1).sqrt() / norm(change)
    torch.testing.assert_close(added.error, expected, rtol=1e-9, atol=1e-13)
    k = added.singular_values.shape[-1]
    torch.testing.assert_close(added.singular_values, S[:, :k], rtol=1e-9, atol=1e-12)
    assert k == min(lora_rank, d) * (2 if sides == "both" else 1)


def test_import_of_a_right_update_moves_the_bias_into_the_adapter() -> None:
    p = product()
    _, right = changes(2)
    assert (lora_to_product(p.left, None, p.right, right, 2).left_added[:, -1].abs() > 1e-3).any()


def test_import_without_updates_is_zero() -> None:
    p = product()
    added = lora_to_product(p.left, None, p.right, None, r)
    assert (added.left_added.shape, added.right_added.shape) == ((H, D, r), (H, D_r, r))
    assert (added.left_added == 0).all()
    assert (added.error == 0).all()


def test_import_of_an_export_returns_the_added_product() -> None:
    p = product()
    p = p._replace(right_added=p.right @ randn(H, d, r, seed=5))  # exact as a LoRA
    pair = product_to_lora(*p)
    added = lora_to_product(p.left, HeadUpdate(p.left_added, pair.X), p.right, HeadUpdate(pair.Y, pair.Z), r)
    torch.testing.assert_close(added.left_added @ added.right_added.mT, p.left_added @ p.right_added.mT)
    assert added.error.max() < 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_refused(value: float) -> None:
    p = product()
    p.right_added[1, 2, 0] = value
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        product_to_lora(*p)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        truncate_lora(randn(3, D) * value, randn(D_r, 3), 2)
