"""What a training step would need, before there is one: counted on tensors without values."""
