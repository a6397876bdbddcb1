"""Where relevance goes, on networks of many kinds: `python benchmarks/books.py` writes docs/books.md.

Random weights, jittered so that nothing is zero by its initialization, batch norms calibrated on noise; one image of
noise, the class of the greatest score. For each composite: what of the score reaches the picture and what stays with
biases, constants, epsilon and softmax, and whether the books close. One thread; about ten minutes.

    python benchmarks/books.py [--only NAME] [--out docs/books.md]
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from innersight import errors
from innersight.data.small_cnn import SimpleCNN
from innersight.observe import rules
from innersight.observe.composites import composite
from innersight.observe.passes import INPUT, Engine, Request
from innersight.testing import left_as_found

TORCHVISION = {
    "vgg11": 96, "vgg16": 96, "resnet18": 96, "resnet50": 96, "densenet121": 96, "mobilenet_v2": 96,
    "mobilenet_v3_small": 96, "mobilenet_v3_large": 96, "efficientnet_b0": 96, "regnet_y_400mf": 96,
    "shufflenet_v2_x1_0": 96, "googlenet": 96, "inception_v3": 128, "squeezenet1_1": 96, "convnext_tiny": 96,
    "vit_b_16": 224, "swin_t": 96, "maxvit_t": 224,
}  # fmt: skip
TIMM = """
    deit_tiny_distilled_patch16_224 swinv2_cr_tiny_ns_224 coatnet_nano_rw_224 resnetv2_50 seresnet50 res2net50_26w_4s
    dla34 hrnet_w18_small ghostnet_050 repvgg_a0 mixer_s32_224 gmlp_ti16_224 xcit_nano_12_p16_224 pvt_v2_b0
    poolformer_s12 eca_nfnet_l0 levit_128s mobilevit_s efficientformer_l1 edgenext_xx_small cait_xxs24_224
    eva02_tiny_patch14_224 convmixer_768_32 mobilenetv4_conv_small
    """.split()
CHOSEN = "auto epsilon epsilon_plus_flat epsilon_gamma_box epsilon_alpha2_beta1_flat attnlrp".split()
SHARES = ("bias", "constant", "epsilon", "softmax", "other")


def networks(only: str) -> Iterator[tuple[str, nn.Module, tuple[int, int, int]]]:
    if only in "SimpleCNN":
        yield "SimpleCNN", SimpleCNN(), (1, 28, 28)
    import timm
    import torchvision

    for name, size in TORCHVISION.items():
        if only in name:
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            yield name, torchvision.models.get_model(name, weights=None, **options), (3, size, size)
    for name in TIMM:
        if only in name:
            net = timm.create_model(name, pretrained=False)
            size = net.pretrained_cfg["input_size"][-1] if net.pretrained_cfg["fixed_input_size"] else 96
            yield f"timm {name}", net, (3, size, size)


def ready(net: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Nothing at a value by which random networks differ from trained ones: zero biases, zero heads, tiny scales."""
    for name, p in net.named_parameters():
        if p.dim() == 1 and ("gamma" in name or "layer_scale" in name):
            p.data.fill_(0.3)
        elif p.dim() == 1:
            p.data += 0.05 * torch.randn_like(p)
        elif not bool(p.any()) or "head" in name:
            p.data.normal_(std=0.05)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    if norms:
        with torch.no_grad():
            net.eval()
            for m in norms:
                m.train()
            net(torch.randn(4, *shape))
    return net.eval()


def scored(output: torch.Tensor) -> torch.Tensor:
    return output.amax(1)


def books(name: str, net: nn.Module, shape: tuple[int, int, int]) -> Iterator[dict]:
    x = torch.randn(1, *shape)
    engine = Engine(net)
    with engine.session():
        engine.run(x, Request(gradients=[INPUT], score=scored))
        began = time.perf_counter()
        engine.run(x, Request(gradients=[INPUT], score=scored))
        plain = time.perf_counter() - began
        rules.run(engine, x, composite("epsilon"), scored)  # learnt, so that it costs none of the following
    for chosen in CHOSEN:
        row: dict = {"network": name, "composite": chosen}
        try:
            with left_as_found(net), engine.session():
                began = time.perf_counter()
                r = rules.run(engine, x, composite(chosen), scored)
                row["cost"] = (time.perf_counter() - began) / plain
        except errors.Unsupported as error:
            yield row | {"error": str(error)}
            continue
        score = float(r.scores)
        row["closure"] = float(r.closure)
        row["input"] = float(r.shares["input"]) / score
        row["absolute"] = float(r.relevance.abs().sum()) / abs(score)
        row |= {share: float(r.shares[share]) / score for share in SHARES}
        if chosen == "auto":
            row["composite"] = f"auto: {r.rules.name}"
        if chosen != "attnlrp" or r.met.get("softmax"):
            yield row


def shown(value: float) -> str:
    return "0" if abs(value) < 5e-4 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1e}"


def page(rows: list[dict]) -> str:
    closed = [r for r in rows if "error" not in r]
    worst = max(closed, key=lambda r: r["closure"])
    lines = [
        "# Where relevance goes",
        "",
        "Layer-wise relevance propagation on untrained networks, one image of noise each: what of the score reaches",
        "the picture (input), and what stays with biases, constants that are added (class tokens, position tables),",
        "epsilon, softmax and the rest. `|R|` is the sum of relevance without signs: where it is far above the sum,",
        "large parts cancel and the map is noise. Closure is what the shares and the score differ by, relative to the",
        "greatest of them. Cost is relative to a gradient. `python benchmarks/books.py` writes this page.",
        "",
        f"torch {torch.__version__.split('+')[0]}: {len({r['network'] for r in rows})} networks, {len(closed)} runs, "
        f"the books of all close to {worst['closure']:.0e} or better.",
        "",
        "| network | composite | input | \\|R\\| | bias | constant | epsilon | softmax | other | closure | cost |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['network']} | {r['composite']} | {r['error']} | | | | | | | | |")
            continue
        numbers = [shown(r[k]) for k in ("input", "absolute", *SHARES)]
        cells = (r["network"], r["composite"], *numbers, f"{r['closure']:.0e}", f"{r['cost']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name holds this")
    parser.add_argument("--out", type=Path, default=Path("docs/books.md"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, net, shape in networks(given.only):
        for row in books(name, ready(net, shape), shape):
            rows.append(row)
            print(row, flush=True)
        gc.collect()
    given.out.write_text(page(rows))


if __name__ == "__main__":
    main()
