"""What a training step costs on a TPU, told by the TPU's own compiler before a TPU is paid for."""
