"""What a tower's weights are called: alike wherever they are alike."""

from __future__ import annotations

import torch

from waybill.engine.encoder.tower import weights_of

PIXELS = {"image_mean": [0.5, 0.5, 0.5], "rescale_factor": 1 / 255}


def tower(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)).to(dtype)


def test_towers_have_one_name_where_they_make_the_same_of_an_image() -> None:
    name = weights_of(tower(), PIXELS)
    assert name == weights_of(tower(), dict(reversed(PIXELS.items())))
    changed = tower()
    with torch.no_grad():
        changed[0].weight[1, 2] += 1
    others = [
        weights_of(changed, PIXELS),
        weights_of(tower(torch.float32), PIXELS),
        weights_of(tower(), PIXELS | {"image_mean": [0.5, 0.5, 0.4]}),
    ]
    assert len({name, *others}) == 4
