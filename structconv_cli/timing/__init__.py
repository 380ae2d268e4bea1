"""Timing ONNX models against one another."""
