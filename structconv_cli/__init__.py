"""structconv: makes trained CNNs faster on ONNX Runtime with Structured Convolutions."""

__version__ = "0.1.0"
