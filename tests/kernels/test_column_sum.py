import pytest
import torch

from smalt.kernels.column_sum import column_sum
from smalt.kernels.launch import configuration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("blocks", [1, 3])
def test_every_row_is_added_once(device, dtype, over, blocks):
    """Rows around whole blocks, a ragged last block of columns; small integers, whose sums are exact."""
    tiles = configuration("column_sum", 7, torch.empty(0, 7, device=device)).tiles
    rows, columns = blocks * tiles["BLOCK_P"] + over, 2 * tiles["BLOCK_D"] + 3
    x = torch.randint(2, (rows, columns), generator=torch.Generator().manual_seed(rows)).float() * 4 + 1
    assert torch.equal(column_sum(x.to(device), dtype).cpu(), x.sum(0).to(dtype))
