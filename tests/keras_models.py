"""Run as a program, in a process of its own: Keras models with random weights, saved, and what Keras makes of them.

    python keras_models.py torch|tensorflow|tf_keras FOLDER [FAMILY ...]

TensorFlow and Keras on torch cannot live in one process, so the tests start one for each. For every case FOLDER gets
`name.keras` and `name.h5` where Keras can write them, and `name.npz` with the input `x` (channels last) and every
layer's output: `conv1`, of its second call `conv1#1`. The cases are small models of each class of layer, or families
of keras.applications.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Make = Callable[[Any, Any], Any]  # (layer module, input) -> output
SHAPE = (13, 9, 4)


def cases() -> dict[str, tuple[tuple[int | None, ...], Make]]:
    """name -> (input shape without the batch, channels last; what makes the output of keras.layers and an input)."""
    found: dict[str, tuple[tuple[int | None, ...], Make]] = {}

    def case(name: str, make: Make, shape: tuple[int | None, ...] = SHAPE) -> None:
        assert name not in found
        found[name] = (shape, make)

    def one(name: str, kind: str, shape: tuple[int | None, ...] = SHAPE, **options: Any) -> None:
        case(name, lambda L, x: getattr(L, kind)(**options)(x), shape)

    for padding in ("same", "valid"):
        for strides in (1, 2, 3):
            one(f"conv_{padding}_{strides}", "Conv2D", filters=6, kernel_size=3, strides=strides, padding=padding,
                activation="relu")  # fmt: skip
            one(f"depthwise_{padding}_{strides}", "DepthwiseConv2D", kernel_size=3, strides=strides, padding=padding,
                depth_multiplier=2)  # fmt: skip
            one(f"transposed_{padding}_{strides}", "Conv2DTranspose", filters=5, kernel_size=3, strides=strides,
                padding=padding)  # fmt: skip
            one(f"max_{padding}_{strides}", "MaxPooling2D", pool_size=3, strides=strides, padding=padding)
            one(f"average_{padding}_{strides}", "AveragePooling2D", pool_size=(3, 2), strides=strides, padding=padding)
        one(f"separable_{padding}", "SeparableConv2D", filters=6, kernel_size=(3, 5), strides=2, padding=padding,
            depth_multiplier=2, activation="tanh")  # fmt: skip
        one(f"conv1d_{padding}", "Conv1D", (17, 4), filters=6, kernel_size=4, strides=2, padding=padding)
        one(f"depthwise1d_{padding}", "DepthwiseConv1D", (17, 4), kernel_size=3, strides=2, padding=padding)
        one(f"separable1d_{padding}", "SeparableConv1D", (17, 4), filters=5, kernel_size=3, padding=padding)
        one(f"transposed1d_{padding}", "Conv1DTranspose", (9, 4), filters=5, kernel_size=3, strides=2, padding=padding)
        one(f"max1d_{padding}", "MaxPooling1D", (17, 4), pool_size=3, strides=2, padding=padding)
        one(f"average1d_{padding}", "AveragePooling1D", (17, 4), pool_size=3, strides=2, padding=padding)
        one(f"conv3d_{padding}", "Conv3D", (7, 6, 5, 3), filters=4, kernel_size=3, strides=2, padding=padding)
        one(f"transposed3d_{padding}", "Conv3DTranspose", (3, 4, 5, 2), filters=3, kernel_size=3, strides=2,
            padding=padding)  # fmt: skip
        one(f"max3d_{padding}", "MaxPooling3D", (7, 6, 5, 3), pool_size=2, strides=2, padding=padding)
        one(f"average3d_{padding}", "AveragePooling3D", (7, 6, 5, 3), pool_size=2, strides=2, padding=padding)
    one(
        "conv_even", "Conv2D", (12, 8, 3), filters=6, kernel_size=(4, 2), strides=(2, 1), padding="same", use_bias=False
    )
    one("conv_dilated", "Conv2D", filters=6, kernel_size=3, dilation_rate=(2, 3), padding="same")
    one("conv_groups", "Conv2D", filters=6, kernel_size=3, groups=2)
    one("conv_causal", "Conv1D", (17, 4), filters=6, kernel_size=3, dilation_rate=2, padding="causal")
    one("conv_short_kernel", "Conv2D", filters=6, kernel_size=1, strides=3, padding="same")
    one("depthwise_dilated", "DepthwiseConv2D", kernel_size=3, dilation_rate=2, padding="same")
    one("transposed_4_2", "Conv2DTranspose", filters=5, kernel_size=4, strides=2, padding="same")
    one("transposed_2_3", "Conv2DTranspose", filters=5, kernel_size=2, strides=3, padding="valid")
    one("transposed_2_3_same", "Conv2DTranspose", filters=5, kernel_size=2, strides=3, padding="same")
    one("transposed_output", "Conv2DTranspose", filters=5, kernel_size=3, strides=2, padding="same", output_padding=1)
    one("transposed_no_bias", "Conv2DTranspose", filters=5, kernel_size=(5, 2), strides=(3, 1), padding="same",
        use_bias=False)  # fmt: skip
    for kind in ("GlobalMaxPooling2D", "GlobalAveragePooling2D"):
        one(kind, kind)
        one(f"{kind}_keep", kind, keepdims=True)
    for kind in ("GlobalMaxPooling1D", "GlobalAveragePooling1D"):
        one(kind, kind, (17, 4))
    for kind in ("GlobalMaxPooling3D", "GlobalAveragePooling3D"):
        one(kind, kind, (7, 6, 5, 3))
    one("batch_norm", "BatchNormalization")
    one("batch_norm_bare", "BatchNormalization", scale=False, center=False, epsilon=0.01)
    one("batch_norm_rows", "BatchNormalization", axis=1)
    one("layer_norm", "LayerNormalization")
    one("layer_norm_all", "LayerNormalization", axis=(1, 2, 3))
    one("layer_norm_rows", "LayerNormalization", axis=1, scale=False)
    one("layer_norm_columns_channels", "LayerNormalization", axis=(2, 3))
    one("group_norm", "GroupNormalization", groups=2)
    one("group_norm_instance", "GroupNormalization", groups=-1, scale=False)
    one("unit_norm", "UnitNormalization")
    one("rms_norm", "RMSNormalization")
    one("thresholded", "ThresholdedReLU", theta=0.3)
    one("masking1d", "Masking", (9, 4))
    one("rescaling", "Rescaling", scale=0.5, offset=-1.0)
    one("rescaling_channels", "Rescaling", (13, 9, 3), scale=[0.5, 0.25, 2.0], offset=[-1.0, 0.0, 1.0])
    one("normalization_given", "Normalization", (13, 9, 3), mean=[0.1, 0.2, 0.3], variance=[1.0, 4.0, 9.0])
    one("normalization_scalar", "Normalization", axis=None, mean=0.3, variance=2.0)
    one("normalization_weights", "Normalization", axis=-1)
    one("padding", "ZeroPadding2D", padding=((1, 2), (3, 0)))
    one("padding1d", "ZeroPadding1D", (9, 4), padding=(2, 1))
    one("padding3d", "ZeroPadding3D", (7, 6, 5, 3), padding=1)
    one("cropping", "Cropping2D", cropping=((1, 2), (3, 0)))
    one("cropping1d", "Cropping1D", (9, 4), cropping=(2, 1))
    one("cropping3d", "Cropping3D", (7, 6, 5, 3), cropping=1)
    for how in ("nearest", "bilinear", "bicubic"):
        one(f"upsampling_{how}", "UpSampling2D", size=(2, 3), interpolation=how)
        one(f"resizing_{how}", "Resizing", height=7, width=20, interpolation=how)
    one("resizing_crop", "Resizing", height=6, width=6, crop_to_aspect_ratio=True)
    one("upsampling1d", "UpSampling1D", (9, 4), size=2)
    one("upsampling3d", "UpSampling3D", (3, 4, 5, 2), size=(1, 2, 3))
    one("center_crop", "CenterCrop", height=8, width=4)
    for kind, options in {
        "ReLU": {}, "ReLU_6": {"max_value": 6.0}, "ReLU_slope": {"negative_slope": 0.1},
        "ReLU_all": {"max_value": 1.0, "negative_slope": 0.1, "threshold": 0.2}, "ELU": {"alpha": 0.7},
        "PReLU": {}, "PReLU_shared": {"shared_axes": [1, 2]}, "Softmax": {}, "Softmax_rows": {"axis": 1},
        "Softmax_two": {"axis": [1, 2]},
    }.items():  # fmt: skip
        one(kind, kind.partition("_")[0], **options)
    one("LeakyReLU", "LeakyReLU")
    for name in ("linear relu relu6 sigmoid tanh softmax elu selu softplus softsign swish gelu mish exponential "
                 "hard_sigmoid leaky_relu").split():  # fmt: skip
        case(f"activation_{name}", lambda L, x, name=name: L.Activation(name)(L.Conv2D(5, 3)(x)))
    for kind in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate"):
        case(f"merge_{kind}", lambda L, x, kind=kind: getattr(L, kind)()(
            [L.Conv2D(5, 3, padding="same")(x), L.Conv2D(5, 1, activation="relu")(x)]))  # fmt: skip
    case("concatenate_rows", lambda L, x: L.Concatenate(axis=1)([L.Conv2D(4, 3, padding="same")(x), x]))
    case("concatenate_vectors", lambda L, x: L.Concatenate()([L.Flatten()(x), L.GlobalMaxPooling2D()(x)]))
    case("merge_ranks", lambda L, x: L.Multiply()([x, L.Dense(4, activation="sigmoid")(L.GlobalAveragePooling2D()(x))]))
    case("squeeze_excite", lambda L, x: L.Multiply()([x, L.Conv2D(4, 1, activation="hard_sigmoid")(
        L.Reshape((1, 1, 4))(L.GlobalAveragePooling2D()(x)))]))  # fmt: skip
    case("dense", lambda L, x: L.Dense(7, activation="softmax")(L.Flatten()(x)))
    case("dense_pictures", lambda L, x: L.Conv2D(3, 2)(L.Dense(7, activation="softmax")(L.Conv2D(5, 3)(x))))
    case("reshape", lambda L, x: L.Conv2D(3, 2)(L.Reshape((9, -1, 6))(L.Conv2D(6, 3, padding="same")(x))))
    case("permute", lambda L, x: L.Conv2D(3, 2)(L.Permute((3, 1, 2))(L.Conv2D(6, 3)(x))))
    case("repeat", lambda L, x: L.Conv1D(4, 2)(L.RepeatVector(5)(L.GlobalMaxPooling2D()(L.Conv2D(3, 3)(x)))))
    case("time_distributed", lambda L, x: L.TimeDistributed(L.Dense(5, activation="relu"))(L.Conv2D(6, 3)(x)))
    case("time_conv", lambda L, x: L.TimeDistributed(L.Conv1D(5, 3))(L.Conv2D(6, 3)(x)))
    case("attention", lambda L, x: (lambda t: L.MultiHeadAttention(2, 5)(t, t))(
        L.Reshape((-1, 6))(L.Conv2D(6, 3, strides=2)(x))))  # fmt: skip
    case("attention_cross", lambda L, x: (lambda t: L.MultiHeadAttention(3, 4, value_dim=5, use_bias=False)(
        t, L.Reshape((-1, 4))(x)))(L.Reshape((-1, 6))(L.Conv2D(6, 3, strides=2)(x))))  # fmt: skip
    case("einsum_dense", lambda L, x: L.EinsumDense("abcd,de->abce", output_shape=(None, None, 6), bias_axes="e",
                                                    activation="relu")(x))  # fmt: skip
    case("identities", lambda L, x: L.Conv2D(3, 3)(L.GaussianNoise(0.1)(L.SpatialDropout2D(0.5)(L.Dropout(0.5)(x)))))
    case("shared", lambda L, x: (lambda c: L.Add()([c(x), c(L.MaxPooling2D(3, 1, "same")(x))]))(
        L.Conv2D(5, 3, name="twice")))  # fmt: skip
    case("softmax_last", lambda L, x: L.Softmax()(L.Dense(5)(L.GlobalAveragePooling2D()(L.Conv2D(8, 3)(x)))))
    case("open_size", lambda L, x: L.Conv2D(3, 3, strides=2, padding="same")(x), (None, None, 3))
    case("no_channel", lambda L, x: L.Dense(4)(L.Flatten()(x)), (11, 7))
    case("vector", lambda L, x: L.Dense(4)(L.Dense(6, activation="relu")(x)), (48,))
    case("slash", lambda L, x: L.DepthwiseConv2D(3, name="deep/depthwise" if "tf_keras" in L.__name__ else "deep")(
        L.Conv2D(5, 3, name="deep/conv" if "tf_keras" in L.__name__ else "conv")(x)))  # fmt: skip
    return found


def nested(keras: Any) -> Iterator[tuple[str, Any]]:
    """Models whose inside takes more than one expression."""
    L = keras.layers

    def block(name: str, channels: int, start: int = 4) -> Any:
        x = keras.Input((None, None, start), name=f"{name}_in")
        y = L.Conv2D(channels, 3, padding="same", name="conv1")(x)
        y = L.BatchNormalization(name="bn1")(y)
        y = L.ReLU(name="relu1")(y)
        return keras.Model(x, y, name=name)

    x = keras.Input(SHAPE, name="picture")
    base = block("base", 6)
    yield "nested", keras.Model(x, L.Dense(3, name="head")(L.GlobalAveragePooling2D(name="gap")(base(x))))

    x = keras.Input(SHAPE, name="picture")
    first, second = block("first", 4), block("second", 4)
    second.trainable = False
    y = L.Add(name="sum")([first(x), second(first(x))])
    yield "nested_twice", keras.Model(x, L.Conv2D(3, 1, name="conv1")(y))

    x = keras.Input(SHAPE, name="picture")
    inner = block("inner", 4)
    i = keras.Input((None, None, 4), name="outer_in")
    outer = keras.Model(i, L.Conv2D(5, 3, name="conv2")(inner(i)), name="outer")
    yield "nested_deep", keras.Model(x, L.GlobalMaxPooling2D(name="gmp")(outer(x)))

    chain = keras.Sequential(
        [keras.Input(SHAPE), L.Conv2D(5, 3, name="c1"), L.MaxPooling2D(name="p1"), L.Flatten(name="f"),
         L.Dense(4, activation="softmax", name="d")], name="chain",
    )  # fmt: skip
    yield "sequential", chain

    augment = keras.Sequential([L.RandomFlip(name="flip"), L.Rescaling(1 / 255, name="rescale")], name="augment")
    x = keras.Input((16, 12, 3), name="picture")
    y = L.Conv2D(4, 3, name="c1")(augment(x))
    yield "sequential_inside", keras.Model(x, L.Dense(2, activation="sigmoid", name="d")(L.Flatten(name="f")(y)))

    x = keras.Input((None, None, 3), name="picture")
    base = keras.Model(x, L.Conv2D(6, 3, name="c2")(L.ReLU(6.0, name="r1")(L.Conv2D(4, 3, name="c1")(x))), name="base")
    styles = {
        "tf": lambda x: x / 127.5 - 1.0,
        "torch": lambda x: (x * (1 / 255) - 0.45) / 0.22,
        "caffe": lambda x: x[..., ::-1] - np.float32([103.939, 116.779, 123.68]),
    }
    for style, scaled in styles.items():
        if style == "caffe" and getattr(getattr(keras, "config", None), "backend", str)() == "torch":
            continue  # which knows no negative steps
        x = keras.Input((16, 12, 3), name="picture")
        y = L.GlobalAveragePooling2D(name="gap")(base(scaled(L.RandomFlip(name="flip")(x))))
        yield f"transfer_{style}", keras.Model(x, L.Dense(2, activation="softmax", name="head")(y))

    x = keras.Input(SHAPE, name="picture")
    y = L.Conv2D(4, 3, name="c1")(x)
    yield "two_outputs", keras.Model(x, [L.GlobalMaxPooling2D(name="g")(y), L.Conv2D(2, 1, name="c2")(y)])


def channels_first(keras: Any) -> Iterator[tuple[str, Any]]:
    """TensorFlow has no kernels for these on a CPU; their inputs are (C, H, W)."""
    L, first = keras.layers, {"data_format": "channels_first"}

    def parts(x: Any) -> dict[str, Any]:
        y = L.Conv2D(6, 3, 2, padding="same", **first)(x)
        return {
            "dense": L.Dense(3)(L.Flatten(**first)(L.BatchNormalization(axis=1)(y))),
            "pool": L.GlobalAveragePooling2D(**first)(L.MaxPooling2D(2, 1, "same", **first)(y)),
            "depthwise": L.ZeroPadding2D(((2, 1), (1, 1)), **first)(L.DepthwiseConv2D(3, 1, **first)(y)),
            "transposed": L.Cropping2D(1, **first)(L.Conv2DTranspose(4, 3, 2, padding="same", **first)(y)),
            "separable": L.Concatenate(axis=1)([y, L.SeparableConv2D(5, 3, padding="same", **first)(y)]),
            "upsampling": L.PReLU(shared_axes=[2, 3])(L.UpSampling2D(2, **first)(y)),
            "softmax": L.Softmax(axis=1)(L.Conv2D(4, 1, activation="softmax", **first)(y)),
            "turned": L.Conv2D(4, 3)(L.Permute((2, 3, 1))(y)),
            "groups": L.GroupNormalization(2, axis=1)(y),
            "keep": L.Multiply()([y, L.GlobalMaxPooling2D(keepdims=True, **first)(y)]),
        }  # fmt: skip

    for name in parts(keras.Input((4, 13, 9))):
        x = keras.Input((4, 13, 9), name="picture")
        yield f"first_{name}", keras.Model(x, parts(x)[name])
    x = keras.Input((4, 13, 9), name="picture")
    yield "first_permuted", keras.Model(x, L.Conv2D(4, 3)(L.Permute((2, 3, 1))(x)))


def operations(keras: Any) -> Iterator[tuple[str, Any]]:
    """Functions on Keras tensors: operations of Keras 3, TFOpLambda of Keras 2."""
    L = keras.layers
    if hasattr(keras, "ops"):
        o = keras.ops
        table = dict(  # noqa: C408
            relu6=o.relu6, relu=o.relu, sigmoid=o.sigmoid, silu=o.silu, gelu=o.gelu, softmax=o.softmax, exp=o.exp,
            mean=lambda y: o.mean(y, axis=(1, 2)), mean_keep=lambda y: o.mean(y, axis=[1, 2], keepdims=True) + y,
            mean_last=lambda y: o.mean(y, axis=-1), max_rows=lambda y: L.Conv1D(3, 2, name="last")(o.max(y, axis=1)),
            clip=lambda y: o.clip(y, -0.5, 0.5), concatenate=lambda y: o.concatenate([y, y * 2.0], axis=-1),
            stack=lambda y: o.stack([y, y], axis=1), reshape=lambda y: o.reshape(y, (-1, 11 * 7, 6)),
            transpose=lambda y: L.Conv2D(3, 1, name="last")(o.transpose(y, (0, 2, 3, 1))),
            expand=lambda y: o.expand_dims(o.mean(y, axis=-1), -1), squeeze=lambda y: o.squeeze(y[:, :1], 1),
            slice=lambda y: L.Conv2D(3, 1, name="last")(y[:, 1:-1, ::2, :]), index=lambda y: y[..., 0],
            split=lambda y: o.split(y, 2, axis=-1)[1], pad=lambda y: o.pad(y, [[0, 0], [1, 2], [0, 3], [0, 0]]),
            matmul=lambda y: o.matmul(y, o.transpose(y, (0, 1, 3, 2))), hard=o.hard_sigmoid,
            minimum=lambda y: o.minimum(y, 0.25), channel=lambda y: y * np.arange(6, dtype="float32"),
            resize=lambda y: o.image.resize(y, (7, 20)), celu=o.celu,
            elu=o.elu, selu=o.selu, leaky=o.leaky_relu, squareplus=o.squareplus, tanh=o.tanh,
            soft_shrink=o.soft_shrink, hard_shrink=o.hard_shrink, tanh_shrink=o.tanh_shrink, sparse=o.sparse_plus,
            log_sigmoid=o.log_sigmoid, hard_tanh=o.hard_tanh, hard_silu=o.hard_silu, softsign=o.softsign,
            log_softmax=o.log_softmax, cast=lambda y: o.cast(y, "float32") + 1.0, abs=o.abs, square=o.square,
            maximum=lambda y: o.maximum(y, 0.1), sum=lambda y: o.sum(y, axis=[1, 2]), rsqrt=lambda y: o.rsqrt(o.exp(y)),
            normalize=lambda y: o.normalize(y, axis=-1), einsum=lambda y: o.einsum("nhwc,nhwd->ncd", y, y),
        )  # fmt: skip
    else:
        import tensorflow as tf

        table = dict(  # noqa: C408
            relu6=tf.nn.relu6, relu=tf.nn.relu, sigmoid=tf.nn.sigmoid, silu=tf.nn.silu, gelu=tf.nn.gelu,
            softmax=tf.nn.softmax, exp=tf.exp,
            mean=lambda y: tf.reduce_mean(y, axis=[1, 2]),
            mean_keep=lambda y: tf.reduce_mean(y, axis=[1, 2], keepdims=True) + y,
            mean_last=lambda y: tf.reduce_mean(y, axis=-1),
            clip=lambda y: tf.clip_by_value(y, -0.5, 0.5), concatenate=lambda y: tf.concat([y, y * 2.0], axis=-1),
            stack=lambda y: tf.stack([y, y], axis=1), reshape=lambda y: tf.reshape(y, (-1, 11 * 7, 6)),
            transpose=lambda y: L.Conv2D(3, 1, name="last")(tf.transpose(y, (0, 2, 3, 1))),
            expand=lambda y: tf.expand_dims(tf.reduce_mean(y, axis=-1), -1), squeeze=lambda y: tf.squeeze(y[:, :1], 1),
            slice=lambda y: L.Conv2D(3, 1, name="last")(y[:, 1:-1, ::2, :]), index=lambda y: y[..., 0],
            split=lambda y: tf.split(y, 2, axis=-1)[1], pad=lambda y: tf.pad(y, [[0, 0], [1, 2], [0, 3], [0, 0]]),
            matmul=lambda y: tf.matmul(y, y, transpose_b=True), leaky=lambda y: tf.nn.leaky_relu(y, 0.3),
            resize=lambda y: tf.image.resize(y, (7, 20)),
            minimum=lambda y: tf.minimum(y, 0.25), channel=lambda y: y * np.arange(6, dtype="float32"),
            bias=lambda y: tf.nn.bias_add(y, np.arange(6, dtype="float32")),
            depth=lambda y: tf.nn.depth_to_space(L.Conv2D(8, 1, name="c8")(y), 2),
            space=lambda y: tf.nn.space_to_depth(y[:, :10, :6], 2),
        )  # fmt: skip
    arithmetic = lambda y: 2.0 - (y + 1.0) / (y * y + 3.0) * (1.0 - y) + (-y) ** 2  # noqa: E731
    for name, fn in {**table, "arithmetic": arithmetic}.items():
        x = keras.Input(SHAPE, name="picture")
        yield f"op_{name}", keras.Model(x, fn(L.Conv2D(6, 3, name="conv")(x)))


def models(keras: Any) -> Iterator[tuple[str, Any]]:
    for name, (shape, make) in cases().items():
        try:
            x = keras.Input(shape, name="picture")
            y = make(keras.layers, x)
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            print(f"{name}: this Keras cannot build it ({error})", file=sys.stderr)
            continue
        yield name, keras.Model(x, y, name="small")
    yield from nested(keras)
    yield from operations(keras)
    if getattr(getattr(keras, "config", None), "backend", str)() == "torch":
        yield from channels_first(keras)


FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "ConvNeXtTiny": (64, {}), "DenseNet121": (64, {}), "DenseNet201": (64, {}), "EfficientNetB0": (64, {}),
    "EfficientNetV2B0": (64, {}), "EfficientNetV2S": (64, {}), "InceptionResNetV2": (80, {}), "InceptionV3": (80, {}),
    "MobileNet": (64, {"alpha": 0.25}), "MobileNetV2": (64, {"alpha": 0.35}), "MobileNetV3Small": (64, {}),
    "MobileNetV3Large": (64, {}), "NASNetMobile": (64, {}), "ResNet50": (64, {}), "ResNet50V2": (64, {}),
    "VGG16": (48, {}), "VGG19": (48, {}), "Xception": (80, {}),
}  # fmt: skip


def application(keras: Any, name: str) -> Any:
    side, options = FAMILIES[name]
    return getattr(keras.applications, name)(
        weights=None, input_shape=(side, side - 5 if side > 50 else side, 3), include_top=name[:3] != "VGG", **options
    )


def disturb(model: Any, rng: np.random.Generator) -> None:
    """The weights of a fresh deep model, with those that are 0 or 1 moved, and batch norms that know their input.

    Whatever the precision of the model, they are float32's numbers, as files are read.
    """
    values = []
    for value in model.get_weights():
        some = value.ndim < 2 and value.dtype.kind == "f"
        values.append(value + rng.normal(0, 0.1, value.shape) if some else value)
    model.set_weights([value.astype(np.float32) for value in values])
    finalize(model)
    norms = [layer for layer in model.layers if type(layer).__name__ == "BatchNormalization"]
    for layer in norms:
        layer.momentum = 0.0
    if norms:
        model(picture(model, rng, (8, *model.inputs[0].shape[1:])), training=True)
        model.set_weights([value.astype(np.float32) for value in model.get_weights()])


def picture(model: Any, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise around 0, or pixels where the model scales them itself."""
    noise = rng.normal(0, 1, shape)
    pixels = any(type(layer).__name__ in ("Rescaling", "Normalization") for layer in model.layers[:3])
    return (127.5 + 60 * noise if pixels else noise).astype(np.float32)


def finalize(model: Any) -> None:
    for layer in model.layers:
        if hasattr(layer, "finalize_state"):  # Normalization computes with what it made of its weights earlier
            layer.finalize_state()


def randomize(model: Any, rng: np.random.Generator) -> None:
    """Weights of every kind that are neither 0 nor 1, and variances above 0."""
    values = []
    for variable in model.weights:
        shape = tuple(variable.shape)
        value = rng.normal(0, 0.4, shape)
        label = f"{getattr(variable, 'path', '')} {variable.name}"
        if "variance" in label:
            value = np.abs(value) + 0.5
        elif "gamma" in label:
            value = value + 1
        integer = "int" in str(variable.dtype)
        values.append(np.zeros(shape, np.int64) if integer else value.astype(np.float32))
    model.set_weights(values)
    finalize(model)


def outputs(model: Any) -> dict[str, Any]:
    """Every value that is made on the way, by layer and call."""
    found: dict[str, Any] = {}
    used = {id(node) for nodes in _nodes_by_depth(model) for node in nodes}
    for layer in model.layers:
        nodes = [node for node in layer._inbound_nodes if id(node) in used]
        for k, node in enumerate(nodes):
            made = node.output_tensors if hasattr(node, "output_tensors") else node.outputs
            made = made[0] if isinstance(made, (list, tuple)) else made
            found[layer.name if k == 0 else f"{layer.name}#{k}"] = made
    return found


def _nodes_by_depth(model: Any) -> list[Any]:
    graph = model if hasattr(model, "_nodes_by_depth") else model._functional  # of a Sequential of Keras 3
    return list(graph._nodes_by_depth.values())


def record(keras: Any, name: str, model: Any, folder: Path, seed: int, draw: Callable[..., None] = randomize) -> None:
    rng = np.random.default_rng(seed)
    draw(model, rng)
    shape = [n or 10 + i for i, n in enumerate(model.inputs[0].shape[1:])]
    x = picture(model, rng, (2, *shape))
    every = outputs(model)
    watched = keras.Model(model.inputs, list(every.values()))
    made = watched(x, training=False)
    made = made if isinstance(made, (list, tuple)) else [made]
    values = {key: as_array(value) for key, value in zip(every, made, strict=True)}
    np.savez(folder / f"{name}.npz", **{"x": x, **{f"layer:{k}": v for k, v in values.items()}})
    for suffix in (".keras", ".h5"):
        try:
            model.save(str(folder / f"{name}{suffix}"))
        except Exception as error:
            print(f"{name}{suffix}: not written ({type(error).__name__}: {error})", file=sys.stderr)
            (folder / f"{name}{suffix}").unlink(missing_ok=True)


def as_array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def start(engine: str) -> Any:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if engine == "tf_keras":
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
        import tf_keras

        return tf_keras
    os.environ["KERAS_BACKEND"] = engine
    import keras

    if engine == "torch":
        import torch

        torch.set_num_threads(1)
    return keras


def main(engine: str, folder: str, *families: str) -> None:
    import warnings

    warnings.filterwarnings("ignore")
    keras = start(engine)
    keras.utils.set_random_seed(0)
    if families:  # deep networks gather rounding errors of 1e-5 and more in float32
        keras.config.set_floatx("float64")
    wanted = ((name, application(keras, name)) for name in families) if families else models(keras)
    for seed, (name, model) in enumerate(wanted):
        try:
            record(keras, name, model, Path(folder), seed, disturb if families else randomize)
        except Exception as error:
            print(f"{name}: not recorded ({type(error).__name__}: {str(error)[:200]})", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
