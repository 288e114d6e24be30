"""Memory of layouts: exact sums where sizes divide, and the table of the documentation."""

import pytest

from smalt.model import LanguageConfig, ModelConfig, VisionConfig, build_model
from smalt.parallel import ParallelConfig
from smalt.profiling import memory

MODEL = ModelConfig(
    vision=VisionConfig(num_layers=2, width=16, num_heads=2, ffn=32, patch=2, tile=4),
    language=LanguageConfig(num_layers=4, width=16, num_heads=4, num_kv_heads=2, head_dim=4, ffn=32, vocabulary=64),
)
COUNTS = {name: p.numel() for name, p in build_model(MODEL, 0, "meta").named_parameters()}
TOTAL = sum(COUNTS.values())


def of(size, **axes):
    return memory.rank_memory(MODEL, size, ParallelConfig(**axes), (64,))


def test_one_process_holds_everything():
    found = of(1)
    assert (found.weights, found.gradients, found.state, found.gathered) == (4 * TOTAL, 4 * TOTAL, 8 * TOTAL, 0)
    assert found.kept == {64: 4 * 4 * 16 * 64}  # bytes, blocks, width, rows
    assert found.total(64) == 16 * TOTAL + found.kept[64]


@pytest.mark.slow
def test_shards_hold_equal_parts_and_replicas_all_of_them():
    assert of(4).weights == TOTAL
    assert of(8, dp=2).weights == TOTAL
    assert of(4, cp=4).weights == TOTAL
    assert of(4, cp=4).kept[64] == of(4).kept[64] // 4


def test_tensor_parallel_leaves_norms_whole():
    norms = sum(n for name, n in COUNTS.items() if name.startswith("language") and "norm" in name)
    language = sum(n for name, n in COUNTS.items() if name.startswith("language"))
    rest = TOTAL - language
    # The tower is sharded over fsdp x tp, the decoder's matrices over tp and then fsdp.
    assert of(4, tp=2).weights == 4 * ((language - norms) // 4 + norms // 2 + rest // 4)


def test_gathered_are_the_root_and_two_blocks():
    block = sum(n for name, n in COUNTS.items() if name.startswith("language.blocks.0."))
    tower = sum(n for name, n in COUNTS.items() if name.startswith("vision.blocks.0."))
    blocks = 4 * block + 2 * tower
    assert of(2).gathered == 2 * (TOTAL - blocks + 2 * max(block, tower))
    assert of(2, reshard_after_forward=False).gathered == 2 * TOTAL


def test_the_fullest_pipeline_stage_counts():
    first = of(2, pp=2)
    assert first.weights < 4 * TOTAL
    assert first.kept[64] > 0


@pytest.mark.slow
def test_table_of_the_documentation(tmp_path):
    copy = tmp_path / "parallel.md"
    copy.write_text(memory.DOCS.read_text())
    memory.write_docs(memory.memory_table(), copy)
    assert copy.read_text() == memory.DOCS.read_text(), "run smalt memory --write"


@pytest.mark.slow
def test_whole_gradients_wait_where_a_step_has_several_packs():
    assert of(1).waiting == 0
    assert of(2).waiting == of(4, dp=2).waiting == 4 * TOTAL
    assert of(2).total(64) == of(2).weights + of(2).gradients + of(2).state + of(2).gathered + of(2).kept[64]
    staged = of(2, pp=2)
    assert staged.total(64) == staged.weights + staged.gradients + staged.state + staged.gathered + staged.waiting + staged.kept[64]
