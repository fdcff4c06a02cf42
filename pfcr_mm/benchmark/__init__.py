"""What reconstruction, quantized inference and checkpoints cost."""
