"""Every picture of a batch also reads the keys and values of the first one."""

import torch
from reattend.hooks import Plan, Share, attach, sites
from reattend.interventions import AppendKV
from tiny_denoisers import build


def use() -> None:
    unet, inputs = build("UNet2DConditionModel")
    plain = unet(**inputs)[0]

    def append(call, shared):  # key and value [B, heads, m, head size]: those of the anchor, for each row
        return AppendKV(key=shared.key, value=shared.value, rows=(shared.rows != torch.arange(call.batch))[:, None])

    style = Share(sites(unet).kind("self"), append, of="batch", rows=lambda n: [0] * n)
    with attach(unet, [Plan("style", [style])]):
        styled = unet(**inputs)[0]
    assert torch.equal(styled[0], plain[0]) and not torch.allclose(styled[1], plain[1])
    assert style.bytes == 0
