"""The vision tower and the projector: which pixel ends up in which token."""

import torch
import torch.nn.functional as F

from smalt.kernels import attention_plan
from smalt.model.vision import Projector, VisionTower


def tiles(n, seed=0):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_patches_are_those_of_a_convolution(make_config, error):
    # SigLIP's patch embedding is a convolution whose kernel is the patch.
    vision = make_config().vision.model_copy(update={"num_layers": 0})
    tower = VisionTower(vision).double()
    torch.nn.init.normal_(tower.position)
    tower.norm = torch.nn.Identity()
    x = tiles(2)
    kernel = tower.patch_embed.weight.view(8, 3, 2, 2)
    want = F.conv2d(x, kernel, tower.patch_embed.bias, stride=2).permute(0, 2, 3, 1) + tower.position.view(3, 3, 8)
    assert error(tower(x), want) <= 1e-14


def test_a_block_is_torchs_encoder_layer(make_model, error):
    block = make_model().vision.blocks[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():  # norms and biases too
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    layer = torch.nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0, activation=lambda x: F.gelu(x, approximate="tanh"), layer_norm_eps=1e-6, batch_first=True, norm_first=True
    ).double()
    names = {"out": "self_attn.out_proj", "up": "linear1", "down": "linear2"}
    own = {".".join([names.get(part, part) for part in name.split(".")]): p for name, p in block.state_dict().items()}
    for kind in ("weight", "bias"):
        own[f"self_attn.in_proj_{kind}"] = torch.cat([own.pop(f"{x}.{kind}") for x in "qkv"])
    layer.load_state_dict(own)
    x = torch.randn(3, 9, 8, generator=generator, dtype=torch.float64)
    kv_start = torch.arange(3, dtype=torch.int32).repeat_interleave(9) * 9
    kv_end = kv_start + 9
    got = block(x.flatten(0, 1), kv_start, kv_end, attention_plan(kv_start, kv_end)).view(3, 9, 8)
    assert error(got, layer(x)) <= 1e-13


def test_tiles_do_not_see_each_other(make_model, error):
    model = make_model()
    x = tiles(3)
    together = model.projector(model.vision(x))
    assert together.shape == (3 * 4, 12)
    assert error(together, torch.cat([model.projector(model.vision(one[None])) for one in x])) <= 1e-13


def test_a_patch_sees_its_whole_tile(make_model):
    model = make_model()
    x, other = tiles(1), tiles(1)
    other[..., 5, 5] += 1
    assert ((model.vision(x) - model.vision(other)).abs().amax(-1) > 1e-6).all()


def test_neighbours_are_merged_in_reading_order(make_config):
    # A 3 x 3 grid, padded to 4 x 4, gives the tokens (0, 0), (0, 1), (1, 0), (1, 1), each of 2 x 2 patches.
    projector = Projector(make_config()).double()
    grid = torch.randn(2, 3, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = projector(grid)
    for row in range(3):
        for column in range(3):
            other = grid.clone()
            other[1, row, column] += 1
            changed = (projector(other) - before).abs().amax(1) > 1e-9
            assert changed.nonzero().flatten().tolist() == [4 + 2 * (row // 2) + column // 2]


def test_merging_by_hand(make_config, error):
    projector = Projector(make_config()).double()
    grid = torch.randn(1, 3, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nothing = torch.zeros(8, dtype=torch.float64)
    merged = torch.stack(
        [
            torch.cat([grid[0, 0, 0], grid[0, 0, 1], grid[0, 1, 0], grid[0, 1, 1]]),
            torch.cat([grid[0, 0, 2], nothing, grid[0, 1, 2], nothing]),
            torch.cat([grid[0, 2, 0], grid[0, 2, 1], nothing, nothing]),
            torch.cat([grid[0, 2, 2], nothing, nothing, nothing]),
        ]
    )
    want = projector.down(F.gelu(projector.up(merged), approximate="tanh"))
    assert error(projector(grid), want) <= 1e-14
