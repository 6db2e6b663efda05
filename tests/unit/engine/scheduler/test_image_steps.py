"""Steps with tokens of images, on several dp ranks: all of them run such a step as the same thing, and without a graph."""

from __future__ import annotations

from collections import defaultdict

import pytest
from support.dp_harness import DpGroup, graph_sizes_of

from waybill.engine.config import EngineConfig
from waybill.engine.plan import ScheduleBatch
from waybill.engine.vision.placed_image import PlacedImage

# Tokens [4, 10) of a prompt.
IMAGE = PlacedImage(1, 4, 2, 3, 4, "/nowhere", 0, "float32")


class Steps:
    """The batches of each step, one for each leader."""

    def __init__(self, group: DpGroup) -> None:
        self.batches: dict[int, list[ScheduleBatch]] = defaultdict(list)
        for leader in group.leaders:
            leader.runner._on_launch = self._note_before(leader.runner._on_launch)

    def _note_before(self, on_launch):  # type: ignore[no-untyped-def]
        def note(batch: ScheduleBatch) -> None:
            self.batches[batch.step].append(batch)
            on_launch(batch)

        return note


@pytest.mark.parametrize("chunk", [4, 16])
def test_no_rank_runs_a_graph_while_another_has_tokens_of_an_image(chunk: int) -> None:
    config = EngineConfig(
        model_path="",
        dp_size=2,
        tp_size=1,
        page_size=1,
        max_running_requests=4,
        overlap_depth=1,
        chunked_prefill_size=chunk,
        enable_return_routed_experts=True,
    )
    group = DpGroup(config, num_pages=64)
    steps, sizes = Steps(group), graph_sizes_of(group.limits, 1)
    group.frontend.submit(1, "text", [1, 2, 3], max_new_tokens=20, ignore_eos=True)
    # The second one finds all but its last token, which is the image's, in the cache.
    for rid, prompt in (("shown", list(range(12))), ("ends in it", list(range(10)))):
        group.frontend.submit(0, rid, prompt, images=[IMAGE], max_new_tokens=3, ignore_eos=True)
        group.run_until_rest()
    kinds = set()
    for batches in steps.batches.values():
        assert len(batches) == 2
        (shape,) = {(batch.num_rows, batch.is_decode, batch.has_images) for batch in batches}
        num_rows, is_decode, has_images = shape
        reqs = [req for batch in batches for req in batch.reqs]
        assert has_images == any(req.start < IMAGE.end and req.start + req.num_tokens > 4 for req in reqs if req.images)
        assert has_images == any(req.images for req in reqs)
        graph = sizes.choose(num_rows, is_decode=is_decode, has_images=has_images)
        assert graph is None or not has_images
        if has_images:
            assert num_rows == max(batch.num_tokens for batch in batches), "padded for a graph"
        kinds.add((has_images, None if graph is None else graph.is_decode, max(req.num_tokens for req in reqs)))
    assert (True, None, 1) in kinds, "the token that looks like a decode's"
    assert any(kind[:2] == (False, True) for kind in kinds), "decodes behind the image are graphs"
