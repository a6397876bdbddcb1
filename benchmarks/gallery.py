"""The pictures of docs/methods.md: every family of methods on one photograph that scikit-image carries (CC0).

    python benchmarks/gallery.py --weights squeezenet1_1_imagenet.pth [--out docs/images]

The weights are those of torchvision's SqueezeNet 1.1 for ImageNet.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import torch
from PIL import Image
from skimage import data

import innersight
from innersight import results, storage

FAMILIES = {
    "gradient": ["gradient", "gradient_x_input", "smoothgrad", "squaregrad"],
    "path": ["integrated_gradients", "blur_integrated_gradients", "guided_integrated_gradients", "expected_gradients"],
    "cam": ["gradcam", "gradcam_plus_plus", "layercam", "eigencam", "scorecam", "ablationcam"],
    "rules": ["lrp", "deeplift", "excitation_backprop", "guided_backprop", "guided_gradcam", "fullgrad"],
    "perturbation": ["occlusion", "rise", "lime", "kernel_shap", "minimal_region"],
}
SMALL = {"masks": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--families", default=",".join(FAMILIES))
    options = parser.parse_args()
    torch.set_num_threads(2)
    net = innersight.open("torchvision:squeezenet1_1", weights=options.weights)
    cat = Image.fromarray(data.cat())
    for family in options.families.split(","):
        maps = {}
        for name in FAMILIES[family]:
            known = inspect.signature(innersight.methods.find(name).function).parameters
            maps[name] = net.explain(cat, name, target="tiger cat", **{k: v for k, v in SMALL.items() if k in known})
            print(maps[name], dict(maps[name].verdict))
        path = options.out / f"methods_{family}.png"
        storage.write_figures(path, [results.plot_comparison(maps)])
        small = Image.open(path).convert("P", palette=Image.Palette.ADAPTIVE, colors=255)
        small.save(path, optimize=True)


if __name__ == "__main__":
    main()
