"""The count of weights' bytes."""

from benchmarks.sizes import counted


def test_bytes_of_each_part_are_those_of_its_grid() -> None:
    plain, head, ends = (counted(shape) for shape in ("tiny", "tiny-head8", "tiny-ends8"))
    vocabulary, hidden = 128, 64
    assert plain["bf16_weights"] == head["bf16_weights"] == ends["bf16_weights"]
    assert plain["weights"] - head["weights"] == vocabulary * (hidden * (2 - 1) - 4)
    assert head["weights"] - ends["weights"] == vocabulary * (hidden * (2 - 1) - 4)
    blocks = 2 * (2 * hidden * hidden + 2 * hidden * 32 + 3 * hidden * 96)  # linears' weights
    dense = 2 * 2 * vocabulary * hidden  # both ends in bfloat16
    assert plain["bf16_weights"] == 2 * blocks + dense + 2 * 5 * hidden
    assert plain["weights"] > blocks // 2 + dense
