"""What a GPU computes faster than torch's plain operations: attention over rows, liger-kernel's programs, dropout."""
