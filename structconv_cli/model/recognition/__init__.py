"""Which architecture the tensors of a checkpoint belong to."""
