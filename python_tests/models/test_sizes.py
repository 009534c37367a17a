"""Parameters and multiply-accumulates of the published sizes, counted on the meta device."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spikecore.models import create_model


def macs(model: nn.Module, shape: tuple[int, ...], tokens_first: bool) -> int:
    """Of an attention: two products per step, sample and head, as q (k^T v) or, `tokens_first`, as (q k^T) v."""

    def attention_flops(q: tuple[int, ...], *_: Any, **__: Any) -> int:
        T, B, H, D, N = q
        return 2 * 2 * T * B * H * D * N * (N if tokens_first else D)

    attention = {torch.ops.spikecore.spiking_self_attention_fwd: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter, torch.no_grad():
        model(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


# Name, settings, parameters, MACs at an input (None: not published).
ECSNN = [  # of one step; the ReLU twin's biases beside them
    ("vgg9", (1, 28, 28), 4_105_024, None, 147_328_000),
    ("vgg5", (3, 32, 32), 8_622_400, 1_354, 66_791_424),
    ("vgg9", (3, 32, 32), 5_941_184, 2_186, 194_717_696),
    ("vgg16", (3, 32, 32), 33_634_240, 12_426, 332_111_872),
    ("vgg19", (3, 32, 32), 38_945_216, 13_706, 417_046_528),
    ("cifarnet", (3, 32, 32), 9_326_208, 2_122, 1_674_389_376),
    ("vgg5", (2, 128, 128), 134_450_944, 1_354, 1_059_072_000),
    ("vgg9", (2, 128, 128), 68_855_168, 2_186, 3_105_892_352),
    ("vgg16", (2, 128, 128), 65_090_944, 12_426, 5_052_080_128),
    ("vgg19", (2, 128, 128), 70_401_920, 13_706, 6_411_034_624),
    ("cifarnet", (2, 128, 128), 103_695_744, 2_122, 26_751_346_560),
    ("vgg9", (3, 224, 224), 207_267_776, None, 9_540_675_584),
    ("vgg9", (1, 96, 323), 127_574_848, None, 5_827_244_032),
    ("vgg5", (1, 40, 173), 56_593_600, 1_354, 440_793_600),
    ("vgg9", (1, 40, 173), 29_270_848, 2_186, 1_301_117_440),
    ("vgg16", (1, 40, 173), 42_021_696, 12_426, 2_061_758_976),
    ("vgg19", (1, 40, 173), 47_332_672, 13_706, 2_610_295_296),
    ("cifarnet", (1, 40, 173), 45_300_864, 2_122, 11_264_946_048),
]
SIZES = [
    *[(f"{kind}_resnet{depth}", {}, parameters, count, (3, 224, 224))
      for kind in ("sew", "spiking")
      for depth, parameters, count in ((18, 11_689_512, 6_900_715_520), (34, 21_797_672, 14_299_467_776),
                                       (50, 25_557_032, 15_996_551_168), (101, 44_549_160, 30_845_435_904),
                                       (152, 60_192_808, 45_694_320_640))],
    ("sew_dvs_wide", {}, 1_192_218, 26_107_446_528, (16, 2, 128, 128)),
    *[("sew_dvs_7b", {"kind": kind}, 130_426, 6_458_835_296, (16, 2, 128, 128)) for kind in ("sew", "plain", "basic")],
    ("ms_resnet18", {}, 11_693_736, 10_958_950_400, (6, 3, 224, 224)),
    ("ms_resnet34", {}, 21_801_896, 22_057_078_784, (6, 3, 224, 224)),
    ("ms_resnet104", {}, 77_350_504, 75_582_427_136, (6, 3, 224, 224)),
    ("att_resnet18", {}, 11_867_960, None, (3, 224, 224)),
    ("ms_resnet18_sma", {}, 71_087_400, None, (3, 224, 224)),
    ("ms_resnet34_sma", {}, 129_065_112, None, (3, 224, 224)),
    ("ms_resnet104_sma", {}, 447_363_348, None, (3, 224, 224)),
    ("qkformer_10_384", {}, 16_473_688, 23_593_540_608, (4, 3, 224, 224)),
    ("qkformer_10_512", {}, 29_079_336, 41_708_408_832, (4, 3, 224, 224)),
    ("qkformer_10_768", {}, 64_962_760, 93_313_677_312, (4, 3, 224, 224)),
    ("qkformer_10_768", {}, 64_962_760, 154_252_720_128, (4, 3, 288, 288)),
    ("qkformer_10_768", {}, 64_962_760, 274_226_460_672, (4, 3, 384, 384)),
    ("qkformer_10_768", {"T": 1}, 64_962_760, 23_328_995_328, (1, 3, 224, 224)),
    ("qkformer_4_384", {}, 6_706_234, 6_063_984_384, (4, 3, 32, 32)),
    ("qkformer_4_384", {"num_classes": 100}, 6_740_884, 6_064_018_944, (4, 3, 32, 32)),
    ("qkformer_dvs_256", {}, 1_504_138, 8_120_175_104, (16, 2, 128, 128)),
    ("qkformer_dvs_256", {"mlp_ratio": 4, "num_classes": 11}, 1_999_371, 8_925_481_728, (16, 2, 128, 128)),
    *[(f"spikingformer_{name}", {"num_classes": classes}, parameters, count, (4, 3, size, size))
      for name, classes, size, parameters, count in (
          ("8_384", 1000, 224, 16_816_024, 18_872_982_528), ("8_512", 1000, 224, 29_689_384, 33_436_192_768),
          ("8_768", 1000, 224, 66_338_632, 74_970_937_344), ("4_256", 10, 32, 4_152_106, 1_672_874_496),
          ("4_256", 100, 32, 4_175_236, 1_672_897_536), ("2_384", 10, 32, 5_762_746, 2_805_010_176),
          ("2_384", 100, 32, 5_797_396, 2_805_044_736), ("4_384", 10, 32, 9_320_122, 3_736_145_664),
          ("4_384", 100, 32, 9_354_772, 3_736_180_224))],
    # The published count holds two unused layer norms in each of the two blocks.
    ("spikingformer_dvs_2_256", {}, 2_568_714 - 2 * 4 * 256, 6_056_577_536, (16, 2, 128, 128)),
    *[(f"spikformer_{name}", {}, parameters, None, (4, 3, 224, 224))  # published: 16.81, 29.68, 66.34, 9.32 M
      for name, parameters in (("8_384", 16_816_024), ("8_512", 29_689_384), ("8_768", 66_338_632),
                               ("4_384", 9_320_122))],
    *[(f"sdt_{name}", {}, parameters, None, (4, 3, 224, 224))
      for name, parameters in (("8_384", 16_816_536), ("6_512", 23_373_736), ("8_512", 29_689_896),
                               ("8_768", 66_339_144))],
    # MACs are known of the caption encoder's head, which classifies every token.
    ("sdt_caption_6_512", {}, 25_426_248, 30_109_417_472, (4, 3, 224, 224)),
    *[("sdt_caption_6_512", {"embed_dim": width, "depth": depth, "num_classes": 1000}, parameters, count,
       (4, 3, 224, 224))
      for depth, width, parameters, count in (
          (8, 384, 16_816_920, 18_943_979_520), (6, 512, 23_374_248, 28_495_593_472),
          (8, 512, 29_690_408, 33_428_094_976), (8, 768, 66_339_912, 74_650_509_312))],
    *[(f"ecsnn_{arch}{kind}", {"in_chans": c, "img_size": (h, w), "T": 1}, parameters + (biases if kind else 0), count,
       (1, c, h, w))
      for arch, (c, h, w), parameters, biases, count in ECSNN
      for kind in ("", "_ann") if kind == "" or biases],
    ("svmamba", {}, 14_789_284, 18_276_546_048, (4, 3, 224, 224)),
    ("vmamba_tiny_s1l8", {}, 30_249_064, 4_812_621_312, (3, 224, 224)),
    ("vmamba_small_s2l15", {}, 50_147_752, 8_498_976_768, (3, 224, 224)),
    ("vmamba_base_s2l15", {}, 88_557_800, 15_069_880_320, (3, 224, 224)),
    ("vmamba_mini", {}, 29_556_964, 4_811_930_112, (3, 224, 224)),
    ("sma_vgg8", {}, 22_452_531, 197_788_418_688, (16, 2, 128, 128)),
    ("sma_vgg8", {"T": 10, "num_classes": 10, "channel_drop": 4}, 22_451_014, 123_617_751_240, (10, 2, 128, 128)),
    ("sma_vgg8", {"T": 14, "num_classes": 101, "channel_drop": 24}, 22_544_543, 455_686_175_140, (14, 2, 180, 240)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "parameters", "count", "shape"), SIZES, ids=lambda v: str(v))
def test_published_sizes(name: str, settings: dict, parameters: int, count: int | None, shape: tuple) -> None:
    with torch.device("meta"):
        model = create_model(name, **settings).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    small = name.startswith("spikingformer") and "_8_" not in name  # the published files of CIFAR and events
    assert count is None or macs(model, shape, tokens_first=small) == count
