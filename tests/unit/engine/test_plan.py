"""The sizes that steps are padded to: as the leaders choose them, and as the runner finds its graphs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from waybill.engine.plan import GraphChoice, GraphSizes
from waybill.engine.runner.decode_cuda_graphs import capture_sizes as decode_sizes
from waybill.engine.runner.prefill_cuda_graphs import capture_sizes as prefill_sizes
from waybill.parallel.dp_attention import rows_per_rank


@given(
    max_running=st.integers(1, 600),
    chunk=st.integers(1, 9000),
    tp_size=st.sampled_from([1, 2, 3, 8]),
    num_tokens=st.integers(1, 10_000),
    is_decode=st.booleans(),
    has_images=st.booleans(),
)
def test_a_step_is_padded_to_a_graphs_size_and_fits_the_ring(
    max_running: int, chunk: int, tp_size: int, num_tokens: int, is_decode: bool, has_images: bool
) -> None:
    max_tokens = chunk + max_running
    sizes = GraphSizes(
        decode_sizes(rows_per_rank([max_running], tp_size)), prefill_sizes(rows_per_rank([max_tokens], tp_size))
    )
    num_tokens = min(num_tokens, max_running if is_decode else max_tokens)
    num_rows = rows_per_rank([num_tokens], tp_size)
    kind = {"is_decode": is_decode, "has_images": has_images}
    padded = sizes.pad(num_rows, **kind)
    # A slot of the ring has room for so many.
    assert num_rows <= padded <= rows_per_rank([max_tokens], tp_size)
    assert sizes.pad(padded, **kind) == padded
    # What the runner looks for, which is told the padded number.
    chosen = sizes.choose(padded, **kind)
    if chosen is None:
        assert padded == num_rows and (has_images or num_rows > sizes.prefill[-1])
    else:
        assert chosen == GraphChoice(padded, is_decode=is_decode and padded <= sizes.decode[-1]) and not has_images


def test_without_graphs_nothing_is_padded() -> None:
    for num_rows in (1, 3, 5000):
        for is_decode in (False, True):
            assert GraphSizes().pad(num_rows, is_decode=is_decode, has_images=False) == num_rows
            assert GraphSizes().choose(num_rows, is_decode=is_decode, has_images=False) is None


def test_a_full_chunk_beside_decodes_has_a_graph() -> None:
    assert prefill_sizes(2048 + 256)[-1] == 2304
    assert prefill_sizes(100) == (64, 100) and decode_sizes(3) == (1, 2, 3)
