"""Two networks side by side: float against int8, epoch against epoch, one format against another, a device's dump.

    c = innersight.compare("float.tflite", "int8.tflite", "photos/")
    print(c.layers)             # signal to noise in dB, cosine, ranges, saturation, dead channels, layer by layer
    c.first_divergence          # the first layer where they part, by a rule that is stated
    c.save("compare.html")

Pictures are prepared for each network its own way and go through both chunk by chunk; of the maps only sums are kept,
in double precision. `a` is the reference throughout.
"""

from __future__ import annotations

from innersight.comparison.asking import compare as compare
from innersight.comparison.asking import dump as dump
from innersight.comparison.result import Comparison as Comparison
