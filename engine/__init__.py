"""What every training run shares: the loop, its batches, its log, its checkpoints."""
