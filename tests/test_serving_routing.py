# SPDX-License-Identifier: Apache-2.0
"""Tensors of tenants, put on top of one another for the rows of a batch."""

from __future__ import annotations

import torch

from offsite_ray.serving.routing import Stack


def a_stack(**ranks: int) -> tuple[Stack, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """A stack of tenants, 1 and on, with low-rank pairs of a linear layer from 6 to 4."""
    torch.manual_seed(0)
    stack, pairs = Stack(), {}
    for tenant, rank in enumerate(ranks.values(), 1):
        pairs[tenant] = torch.randn(rank, 6), torch.randn(4, rank)
        stack.put(tenant, pairs[tenant])
    return stack, pairs


def test_each_row_gets_what_its_tenant_has_whatever_the_ranks() -> None:
    stack, pairs = a_stack(first=2, second=3, third=1)
    tenants = (2, 0, 1, 2)
    x = torch.randn(4, 6)
    gathered = stack.gather(tenants)
    assert gathered is not None
    down, up = gathered
    assert down.shape == (4, 3, 6)
    added = (up @ (down @ x[..., None]))[..., 0]
    for row, tenant in enumerate(tenants):
        expected = pairs[tenant][1] @ pairs[tenant][0] @ x[row] if tenant else torch.zeros(4)
        torch.testing.assert_close(added[row], expected)


def test_rows_of_tenants_without_any_cost_nothing() -> None:
    stack, _ = a_stack(first=2)
    assert stack.gather((0, 7, 0)) is None


def test_nothing_is_copied_while_the_rows_stay() -> None:
    stack, _ = a_stack(first=2, second=2)
    first, again, other = (stack.gather(rows) for rows in ((1, 2), (1, 2), (2, 1)))
    assert first is again
    assert first is not None
    assert other is not None
    torch.testing.assert_close(other[0], first[0].flip(0))


def test_a_tenant_that_is_replaced_or_removed_leaves_nothing() -> None:
    stack, pairs = a_stack(first=2, second=2)
    stack.gather((1, 2))
    new = torch.ones(2, 6), torch.ones(4, 2)
    stack.put(1, new)
    gathered = stack.gather((1, 2))
    assert gathered is not None
    torch.testing.assert_close(gathered[0], torch.stack([new[0], pairs[2][0]]))
    stack.remove(2)
    gathered = stack.gather((1, 2))
    assert gathered is not None
    assert not gathered[0][1].any()
