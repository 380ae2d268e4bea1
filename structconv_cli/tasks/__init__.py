"""What models are trained for and judged by."""
