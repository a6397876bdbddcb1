"""Keys: names of what a page can ask for. They are looked up, never joined to a path.

picture/0                       a picture as people see it
maps/0/0/layer1.0.conv1         network, picture, layer: all channels as bytes
stats/0/0/layer1.0.conv1        what each channel does there, and a thumbnail of the most active one
relevance/0/0/layer1.0.conv1/7  and what each says for a class
filters/0/layer1.0.conv1        its weights
effective/0/layer1.0.conv1      the box that moves its middle unit most
saliency/0123abcd               a saliency map, by the hash of what was asked for
channels, strip, images, gallery: see dataset.py
"""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import quote, unquote

from innersight import errors


def key(kind: str, *parts: object) -> str:
    """A key; each part may hold any character.

    >>> key("maps", 0, 1, "block/conv 1")
    'maps/0/1/block%2Fconv%201'
    """
    return "/".join([kind, *(quote(str(p), safe="") for p in parts)])


def parse(text: str) -> tuple[str, list[str]]:
    """The kind and the parts of a key."""
    kind, *parts = text.split("/")
    if not kind or not all(parts) or len(text) > 2000:
        raise errors.InputError("this is no key of a viewer")
    return kind, [unquote(p) for p in parts]


def digest(asked: Any) -> str:
    """Eight bytes that name a question, the same for the same question."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
