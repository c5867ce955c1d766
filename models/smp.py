"""Any network of segmentation_models_pytorch: --model smp:UnetPlusPlus --encoder resnet34."""

import functools
import re

from torch import nn

from models import distributed


class SMP(nn.Module):
    """images [B, C, H, W] -> logits [B, K, H, W], for sides that are multiples of `multiple`.

    ValueError if the package is not installed.
    """

    def __init__(self, architecture, channels, classes, dims=2, encoder="resnet34"):
        super().__init__()
        try:
            import segmentation_models_pytorch as smp
        except ImportError as error:
            raise ValueError(
                f"segmentation_models_pytorch cannot be imported ({error}); "
                "pip install segmentation-models-pytorch"
            ) from None
        if dims == 3:
            raise ValueError("segmentation_models_pytorch has networks for slices alone")
        if not re.fullmatch(r"[\w.-]+", encoder):  # it would look for other names on the net
            raise ValueError(f"{encoder!a:.40} is no encoder of it")
        self.make = functools.partial(
            smp.create_model, architecture, encoder, in_channels=channels, classes=classes
        )
        self.net = self.make(encoder_weights=None)
        stride = self.net.encoder.output_stride
        self.coarsest = stride
        self.multiple = stride if self.net.requires_divisible_input_shape else 1

    def load_named(self, source):
        """Begins anew with encoder weights that the package knows by name: "imagenet", ..."""
        for first in (True, False):  # of several processes, the first one fetches them
            if (distributed.rank() == 0) == first:
                self.net = self.make(encoder_weights=source)
            distributed.wait()

    def encode(self, x):
        return self.net.encoder(x)

    def decode(self, features):
        return self.net.segmentation_head(self.net.decoder(features))

    def forward(self, x):
        return self.decode(self.encode(x))
